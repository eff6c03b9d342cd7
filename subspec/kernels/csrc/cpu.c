/* Decoder layers over a few rows on a CPU with AVX2: exact ones in float32, and quantized ones of a draft.
 *
 * A pass over few rows is bound by reading the weights, so each is read once for all rows, in the order in which it lies
 * in memory. Every sum of a row has the same order for any number of rows.
 *
 * Quantized weights lie in tiles of 8 outputs and 64 inputs. A vector of 32 bytes has 4 inputs of each output, so that
 * no sum runs across a vector: signed bytes, or with 4 bits 4 inputs in the low nibbles and those 32 later in the high
 * ones. scales has 8 factors and then 8 constants per tile, float16: a weight is q * factor + constant. Inputs are rounded
 * to 8 bits per row and 64 inputs, so that products are sums of integers.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64  /* inputs that share a factor */
#define TILE 8    /* outputs of a tile */
#define CHUNK 64  /* outputs that a thread computes at a time */
#define AHEAD 2048 /* bytes of tiles that are fetched in advance */
#define INLINE static inline __attribute__((always_inline))

struct matrix {
    const void *values;      /* float32 [outputs, inputs], or tiles */
    const uint16_t *scales;  /* of tiles; null: float32 */
    int64_t bits;            /* of tiles: 4 or 8 */
};

struct layer {
    struct matrix q, k, v, out, gate, up, down;
    const float *input_norm, *post_norm;
    const float *q_bias, *k_bias, *v_bias, *q_norm, *k_norm; /* null: none */
};

struct pass {
    int64_t rows, hidden, inner, q_heads, kv_heads, dim, threads;
    float eps, scaling;
    float *x;                /* [rows, hidden]: the residual stream, changed in place */
    const float *turns;      /* [rows, dim]: cosines, then sines */
    int64_t head_stride;     /* floats between two KV heads of the cache */
    int64_t write, read, length; /* cache rows: the first that is written; the first that is read, and their number */
    const uint8_t *mask;     /* which of masked rows, from the one numbered mask_start of those read, a row attends to */
    int64_t mask_stride, mask_start, masked;
    char *scratch;
};

/* ---- float32 ---- */

INLINE __m128 sums_of_4(__m256 a, __m256 b, __m256 c, __m256 d) {
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

/* Products of 4 (or 1) rows of w and `rows` rows of x: y[row * ldy + output]. Meanwhile fetches lines of the weights that
 * are next, which the processor does not foresee. */
INLINE void dots(const float *w, int64_t ldw, int outputs, const float *x, int64_t ldx, int rows, int64_t k, float *y,
                 int64_t ldy, const float *next, int64_t lines) {
    __m256 sum[3][4];
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < 4; o++) sum[r][o] = _mm256_setzero_ps();
    for (int64_t i = 0; i < k; i += 8) {
        if (lines > 0) {
            _mm_prefetch((const char *)next, _MM_HINT_T0);
            _mm_prefetch((const char *)(next + 16), _MM_HINT_T0);
            next += 32, lines -= 2;
        }
        __m256 of[3];
        for (int r = 0; r < rows; r++) of[r] = _mm256_loadu_ps(x + r * ldx + i);
        for (int o = 0; o < outputs; o++) {
            __m256 weight = _mm256_loadu_ps(w + o * ldw + i);
            for (int r = 0; r < rows; r++) sum[r][o] = _mm256_fmadd_ps(weight, of[r], sum[r][o]);
        }
    }
    for (int r = 0; r < rows; r++) {
        float four[4];
        _mm_storeu_ps(four, sums_of_4(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
        for (int o = 0; o < outputs; o++) y[r * ldy + o] = four[o];
    }
}

static void multiply_float(const float *w, int64_t ldw, int64_t outputs, const float *x, int64_t ldx, int64_t rows,
                           int64_t k, float *y, int64_t ldy) {
    /* Each group of rows fetches its share of the next 4 rows of w. */
    const int64_t groups = (rows + 2) / 3, lines = (k / 4 + groups - 1) / groups;
    int64_t o = 0;
    for (; o + 4 <= outputs; o += 4) {
        const float *four = w + o * ldw, *next = four + 4 * ldw;
        int64_t r = 0;
        for (; r + 3 <= rows; r += 3, next += 16 * lines)
            dots(four, ldw, 4, x + r * ldx, ldx, 3, k, y + r * ldy + o, ldy, next, lines);
        if (rows - r == 2) dots(four, ldw, 4, x + r * ldx, ldx, 2, k, y + r * ldy + o, ldy, next, lines);
        if (rows - r == 1) dots(four, ldw, 4, x + r * ldx, ldx, 1, k, y + r * ldy + o, ldy, next, lines);
    }
    for (; o < outputs; o++)
        for (int64_t r = 0; r < rows; r++)
            dots(w + o * ldw, ldw, 1, x + r * ldx, ldx, 1, k, y + r * ldy + o, ldy, w, 0);
}

INLINE __m256 exponential(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.f), _mm256_min_ps(_mm256_set1_ps(88.f), x)); /* in this order NaN stays */
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x); /* log 2 in two parts */
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.f / 5040); /* the series, whose rest is below float32's precision for |r| < 0.35 */
    const float terms[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (int i = 0; i < 7; i++) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(terms[i]));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

INLINE float sum_of(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_hadd_ps(half, half);
    return _mm_cvtss_f32(_mm_hadd_ps(half, half));
}

static void normalize(const float *x, const float *weight, int64_t n, float eps, float *y) {
    __m256 squares = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    __m256 factor = _mm256_set1_ps(1.f / sqrtf(sum_of(squares) / n + eps));
    for (int64_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), _mm256_mul_ps(_mm256_loadu_ps(x + i), factor)));
}

/* ---- quantized ---- */

struct inputs {
    const float *x;  /* [rows, k] */
    int8_t *q;       /* [rows, k] */
    float *step;     /* [rows, k / BLOCK], two numbers each: size of a step, and the sum of the block */
};

static void round_inputs(const struct inputs *in, int64_t row, int64_t k) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t block = 0; block < k / BLOCK; block++) {
        const float *x = in->x + row * k + block * BLOCK;
        int8_t *q = in->q + row * k + block * BLOCK;
        __m256 most = _mm256_setzero_ps();
        for (int i = 0; i < BLOCK; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
        float lane[8], largest = 1e-30f;
        _mm256_storeu_ps(lane, most);
        for (int i = 0; i < 8; i++) largest = lane[i] > largest ? lane[i] : largest;
        const __m256 scale = _mm256_set1_ps(127.f / largest);
        __m256i total = _mm256_setzero_si256();
        for (int i = 0; i < BLOCK; i += 32) {
            __m256i part[4];
            for (int j = 0; j < 4; j++) {
                part[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), scale));
                total = _mm256_add_epi32(total, part[j]);
            }
            __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
            _mm256_storeu_si256((__m256i *)(q + i), _mm256_permutevar8x32_epi32(bytes, order));
        }
        float *step = in->step + 2 * (row * (k / BLOCK) + block);
        step[0] = largest / 127.f;
        step[1] = step[0] * sum_of(_mm256_cvtepi32_ps(total));
    }
}

INLINE __m256i four(const int8_t *x) {
    int32_t all;
    memcpy(&all, x, 4);
    return _mm256_set1_epi32(all);
}

/* One tile of outputs and up to 4 rows. */
INLINE void tile(const uint8_t *w, const uint16_t *scales, int bits, const struct inputs *in, int64_t first, int rows,
                 int64_t k, float *y, int64_t ldy) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int64_t blocks = k / BLOCK;
    __m256 sum[4];
    for (int r = 0; r < rows; r++) sum[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        const int8_t *x = in->q + first * k + b * BLOCK;
        __m256i low[4], high[4]; /* with 8 bits: all sums in low */
        for (int r = 0; r < rows; r++) low[r] = high[r] = _mm256_setzero_si256();
        for (int i = 0; i < BLOCK * bits / 8; i += 4) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(w + TILE * i));
            if (i % 8 == 0) _mm_prefetch((const char *)w + AHEAD + TILE * i, _MM_HINT_T0);
            if (bits == 4) { /* 8 sums of two products up to 15 * 127 stay within 16 bits */
                __m256i first_half = _mm256_and_si256(both, nibble);
                __m256i second_half = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
                for (int r = 0; r < rows; r++) {
                    low[r] = _mm256_add_epi16(low[r], _mm256_maddubs_epi16(first_half, four(x + r * k + i)));
                    high[r] = _mm256_add_epi16(high[r], _mm256_maddubs_epi16(second_half, four(x + r * k + 32 + i)));
                }
            } else { /* a size without sign times a number with it */
                __m256i size = _mm256_abs_epi8(both);
                for (int r = 0; r < rows; r++) {
                    __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(x + r * k + i), both));
                    low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        __m256 factor = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 16 * b)));
        __m256 constant = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 16 * b + 8)));
        for (int r = 0; r < rows; r++) {
            if (bits == 4) low[r] = _mm256_add_epi32(_mm256_madd_epi16(low[r], ones), _mm256_madd_epi16(high[r], ones));
            const float *step = in->step + 2 * ((first + r) * blocks + b);
            __m256 product = _mm256_mul_ps(factor, _mm256_broadcast_ss(step));
            sum[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[r]), product, sum[r]);
            sum[r] = _mm256_fmadd_ps(constant, _mm256_broadcast_ss(step + 1), sum[r]);
        }
        w += TILE * BLOCK * bits / 8;
    }
    for (int r = 0; r < rows; r++) _mm256_storeu_ps(y + r * ldy, sum[r]);
}

INLINE void multiply_tiles(const struct matrix *m, int bits, int64_t begin, int64_t end, const struct inputs *in,
                           int64_t rows, int64_t k, float *y, int64_t ldy) {
    for (int64_t o = begin; o < end; o += TILE, y += TILE) {
        const uint8_t *w = (const uint8_t *)m->values + o * k * bits / 8;
        const uint16_t *scales = m->scales + 2 * o * (k / BLOCK);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) tile(w, scales, bits, in, r, 4, k, y + r * ldy, ldy);
        if (rows - r == 3) tile(w, scales, bits, in, r, 3, k, y + r * ldy, ldy);
        if (rows - r == 2) tile(w, scales, bits, in, r, 2, k, y + r * ldy, ldy);
        if (rows - r == 1) tile(w, scales, bits, in, r, 1, k, y + r * ldy, ldy);
    }
}

static void multiply_4(const struct matrix *m, int64_t begin, int64_t end, const struct inputs *in, int64_t rows, int64_t k,
                       float *y, int64_t ldy) {
    multiply_tiles(m, 4, begin, end, in, rows, k, y, ldy);
}

static void multiply_8(const struct matrix *m, int64_t begin, int64_t end, const struct inputs *in, int64_t rows, int64_t k,
                       float *y, int64_t ldy) {
    multiply_tiles(m, 8, begin, end, in, rows, k, y, ldy);
}

/* Outputs begin to end of all rows: y[row * ldy + output - begin]. */
static void multiply(const struct matrix *m, int64_t begin, int64_t end, const struct inputs *in, int64_t rows, int64_t k,
                     float *y, int64_t ldy) {
    if (!m->scales)
        multiply_float((const float *)m->values + begin * k, k, end - begin, in->x, k, rows, k, y, ldy);
    else if (m->bits == 4)
        multiply_4(m, begin, end, in, rows, k, y, ldy);
    else
        multiply_8(m, begin, end, in, rows, k, y, ldy);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Inside a parallel region: rounds the inputs if the matrix is quantized. */
static void prepare(const struct matrix *m, const struct inputs *in, int64_t rows, int64_t k) {
    if (!m->scales) return;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) round_inputs(in, r, k);
}

/* ---- a layer ---- */

static void turn(float *head, const float *turns, int64_t dim) {
    for (int64_t i = 0; i < dim / 2; i += 8) {
        __m256 a = _mm256_loadu_ps(head + i), b = _mm256_loadu_ps(head + dim / 2 + i);
        __m256 cosine = _mm256_loadu_ps(turns + i), sine = _mm256_loadu_ps(turns + dim / 2 + i);
        _mm256_storeu_ps(head + i, _mm256_fmsub_ps(a, cosine, _mm256_mul_ps(b, sine)));
        _mm256_storeu_ps(head + dim / 2 + i, _mm256_fmadd_ps(b, cosine, _mm256_mul_ps(a, sine)));
    }
}

/* Biases, norms and rotation of a head, in place; of keys and values also the copy into the cache. */
static void finish_head(const struct layer *l, const struct pass *p, int64_t row, int64_t head, float *x, float *keys,
                        float *values) {
    const int64_t dim = p->dim, k = head - p->q_heads, v = k - p->kv_heads;
    const float *bias = v >= 0 ? l->v_bias : k >= 0 ? l->k_bias : l->q_bias;
    const float *norm = v >= 0 ? 0 : k >= 0 ? l->k_norm : l->q_norm;
    if (bias)
        for (int64_t i = 0; i < dim; i++) x[i] += bias[(v >= 0 ? v : k >= 0 ? k : head) * dim + i];
    if (norm) normalize(x, norm, dim, p->eps, x);
    if (v < 0) turn(x, p->turns + row * dim, dim);
    if (k < 0)
        for (int64_t i = 0; i < dim; i++) x[i] *= p->scaling;
    else
        memcpy((v >= 0 ? values + v * p->head_stride : keys + k * p->head_stride) + (p->write + row) * dim, x,
               dim * sizeof(float));
}

/* Softmax of a row of scores in place; returns the sum that divides it. */
static float soften(float *scores, int64_t n) {
    float most = -INFINITY;
    for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    __m256 total = _mm256_setzero_ps(), shift = _mm256_set1_ps(most);
    for (int64_t i = n; i % 8; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += 8) {
        __m256 x = _mm256_loadu_ps(scores + i);
        __m256 seen = _mm256_cmp_ps(x, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m256 e = _mm256_and_ps(exponential(_mm256_sub_ps(x, shift)), seen);
        _mm256_storeu_ps(scores + i, e);
        total = _mm256_add_ps(total, e);
    }
    return sum_of(total);
}

/* Queries first to first + count (at most 3) of a KV head; query r * group + g is head g of row r. */
static void attend(const struct pass *p, const float *qkv, int64_t width, const float *keys, const float *values,
                   int64_t kv, int64_t first, int64_t count, float *scores, float *out) {
    const int64_t dim = p->dim, group = p->q_heads / p->kv_heads, padded = (p->length + 7) / 8 * 8;
    const float *k = keys + kv * p->head_stride + p->read * dim, *v = values + kv * p->head_stride + p->read * dim;
    float queries[3 * 256];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = (first + i) / group, head = kv * group + (first + i) % group;
        memcpy(queries + i * dim, qkv + row * width + head * dim, dim * sizeof(float));
    }
    multiply_float(k, dim, p->length, queries, dim, count, dim, scores, padded);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = (first + i) / group, head = kv * group + (first + i) % group;
        float *s = scores + i * padded, *y = out + (row * p->q_heads + head) * dim;
        for (int64_t j = 0; j < p->masked; j++)
            if (!p->mask[row * p->mask_stride + j]) s[p->mask_start + j] = -INFINITY;
        const __m256 share = _mm256_set1_ps(1.f / soften(s, p->length));
        for (int64_t begin = 0; begin < dim; begin += 64) {
            const int parts = (int)least(8, (dim - begin) / 8);
            __m256 sum[8];
            for (int d = 0; d < 8; d++) sum[d] = _mm256_setzero_ps();
            if (parts == 8)
                for (int64_t t = 0; t < p->length; t++) {
                    __m256 weight = _mm256_broadcast_ss(s + t);
                    for (int d = 0; d < 8; d++)
                        sum[d] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(v + t * dim + begin + 8 * d), sum[d]);
                }
            else
                for (int64_t t = 0; t < p->length; t++)
                    for (int d = 0; d < parts; d++)
                        sum[d] = _mm256_fmadd_ps(_mm256_broadcast_ss(s + t), _mm256_loadu_ps(v + t * dim + begin + 8 * d),
                                                 sum[d]);
            for (int d = 0; d < parts; d++) _mm256_storeu_ps(y + begin + 8 * d, _mm256_mul_ps(sum[d], share));
        }
    }
}

struct buffers {
    float *normed, *qkv, *attended, *inner, *scores; /* scores: of each thread */
    struct inputs of_hidden, of_attended, of_inner;
    int64_t bytes, scores_size;
};

static void *take(char *base, int64_t *used, int64_t bytes) {
    void *found = base + *used;
    *used += (bytes + 63) / 64 * 64;
    return found;
}

static struct inputs inputs_of(char *base, int64_t *used, const float *x, int64_t rows, int64_t k) {
    struct inputs in = {x, 0, 0};
    in.q = take(base, used, rows * k);
    in.step = take(base, used, rows * (k / BLOCK) * 8);
    return in;
}

static struct buffers buffers_of(const struct pass *p) {
    struct buffers b;
    int64_t used = 0, heads = p->q_heads * p->dim, rows = p->rows;
    b.normed = take(p->scratch, &used, rows * p->hidden * 4);
    b.qkv = take(p->scratch, &used, rows * (p->q_heads + 2 * p->kv_heads) * p->dim * 4);
    b.attended = take(p->scratch, &used, rows * heads * 4);
    b.inner = take(p->scratch, &used, rows * p->inner * 4);
    b.of_hidden = inputs_of(p->scratch, &used, b.normed, rows, p->hidden);
    b.of_attended = inputs_of(p->scratch, &used, b.attended, rows, heads);
    b.of_inner = inputs_of(p->scratch, &used, b.inner, rows, p->inner);
    b.scores_size = 3 * ((p->length + 7) / 8 * 8);
    if (b.scores_size < 2 * CHUNK * rows) b.scores_size = 2 * CHUNK * rows;
    b.scores = take(p->scratch, &used, p->threads * b.scores_size * 4);
    b.bytes = used;
    return b;
}

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

int64_t subspec_scratch_bytes(const struct pass *p) { return buffers_of(p).bytes; }

/* Inside a parallel region: x += inputs times a matrix. */
static void add_product(const struct matrix *m, const struct inputs *in, const struct pass *p, int64_t k, float *own) {
    prepare(m, in, p->rows, k);
#pragma omp for schedule(dynamic, 1)
    for (int64_t begin = 0; begin < p->hidden; begin += CHUNK) {
        int64_t n = least(CHUNK, p->hidden - begin);
        multiply(m, begin, begin + n, in, p->rows, k, own, CHUNK);
        for (int64_t r = 0; r < p->rows; r++)
            for (int64_t i = 0; i < n; i++) p->x[r * p->hidden + begin + i] += own[r * CHUNK + i];
    }
}

/* keys and values: of the layer, [kv heads, cache rows, dim]. */
void subspec_layer(const struct layer *l, const struct pass *p, float *keys, float *values) {
    const struct buffers b = buffers_of(p);
    const int64_t rows = p->rows, heads = p->q_heads + 2 * p->kv_heads, width = heads * p->dim;
    const int64_t queries = p->q_heads / p->kv_heads * rows, parts = (queries + 2) / 3;
#pragma omp parallel num_threads((int)p->threads)
    {
        float *own = b.scores + omp_get_thread_num() * b.scores_size;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            normalize(p->x + r * p->hidden, l->input_norm, p->hidden, p->eps, b.normed + r * p->hidden);
        prepare(&l->q, &b.of_hidden, rows, p->hidden);
#pragma omp for schedule(dynamic, 1)
        for (int64_t head = 0; head < heads; head++) {
            const int64_t k = head - p->q_heads, v = k - p->kv_heads;
            const struct matrix *m = v >= 0 ? &l->v : k >= 0 ? &l->k : &l->q;
            int64_t begin = (v >= 0 ? v : k >= 0 ? k : head) * p->dim;
            multiply(m, begin, begin + p->dim, &b.of_hidden, rows, p->hidden, b.qkv + head * p->dim, width);
            for (int64_t r = 0; r < rows; r++)
                finish_head(l, p, r, head, b.qkv + r * width + head * p->dim, keys, values);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < p->kv_heads * parts; i++)
            attend(p, b.qkv, width, keys, values, i / parts, i % parts * 3, least(3, queries - i % parts * 3), own,
                   b.attended);
        add_product(&l->out, &b.of_attended, p, p->q_heads * p->dim, own);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            normalize(p->x + r * p->hidden, l->post_norm, p->hidden, p->eps, b.normed + r * p->hidden);
        prepare(&l->gate, &b.of_hidden, rows, p->hidden);
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < p->inner; begin += CHUNK) {
            int64_t n = least(CHUNK, p->inner - begin);
            float *gate = own, *up = own + rows * CHUNK;
            multiply(&l->gate, begin, begin + n, &b.of_hidden, rows, p->hidden, gate, CHUNK);
            multiply(&l->up, begin, begin + n, &b.of_hidden, rows, p->hidden, up, CHUNK);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i += 8) {
                    __m256 g = _mm256_loadu_ps(gate + r * CHUNK + i), u = _mm256_loadu_ps(up + r * CHUNK + i);
                    __m256 below = exponential(_mm256_sub_ps(_mm256_setzero_ps(), g));
                    __m256 silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.f), below));
                    _mm256_storeu_ps(b.inner + r * p->inner + begin + i, _mm256_mul_ps(silu, u));
                }
        }
        add_product(&l->down, &b.of_inner, p, p->inner, own);
    }
}

/* y [rows, outputs] = x [rows, k] times a matrix; scratch: for inputs of 8 bits. */
void subspec_linear(const struct matrix *m, const float *x, int64_t rows, int64_t k, int64_t outputs, float *y, char *scratch,
                    int64_t threads) {
    int64_t used = 0;
    const struct inputs in = inputs_of(scratch, &used, x, rows, k);
#pragma omp parallel num_threads((int)threads)
    {
        prepare(m, &in, rows, k);
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < outputs; begin += 4 * CHUNK)
            multiply(m, begin, least(begin + 4 * CHUNK, outputs), &in, rows, k, y + begin, outputs);
    }
}

/* y [rows, n] = x, root-mean-square normed. */
void subspec_norm(const float *x, const float *weight, int64_t rows, int64_t n, float eps, float *y) {
    for (int64_t r = 0; r < rows; r++) normalize(x + r * n, weight, n, eps, y + r * n);
}
