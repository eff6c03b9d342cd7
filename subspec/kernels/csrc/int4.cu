// y[row, n] = sum_k x[row, k] * scale[n, k/64] * (q[n, k] - zero[n, k/64]) for up to 8 * EIGHTS rows of bfloat16 x and
// q of up to 4 bits, or of 8 bits in two planes: the Linear layers of a draft level, which has few rows.
//
// With so few rows the weights' bytes are what counts: they are read once. One tensor-core instruction, mma.m16n8k16,
// takes 16 weight rows x 16 weights as its A operand and 8 rows of x as B, so no row is padding beyond 8, and each
// thread's share of A is 8 weights: exactly one 32-bit word of nibbles. The words lie in memory in the order the
// threads want them (see int4.py), so a warp's load is one contiguous run, and unpacking is one shift and one
// logic operation per pair: OR-ing a nibble into bfloat16 128.0 gives 128 + q, exact, and the 128 joins the zero
// point. Scales are applied once per group to the sums, not to the weights:
//   sum_k s (q - z) x = s (sum_k (128 + q) x - (128 + z) sum_k x),
// where sum_k x comes from the same instruction with A = 1.
//
// PLANES: 1, or 2 for 8-bit q = low + 16 * high. Then the group of the high nibbles, with scale 16 s and zero 0,
// follows that of the low nibbles, with scale s and zero z; both multiply the same 64 inputs. 16 s is exact in half
// precision.
//
// More than 8 * EIGHTS rows take several blocks of threads (gridDim.z), the later of which find the weights in the L2 cache.
//
// TILES (16-row tiles per block), WARPS, EIGHTS, PLANES, SWIGLU and OVERLAP are set by the host. Each block covers TILES * 16
// rows; its warps share the groups of the block's slice of k and add up in shared memory. A grid with gridDim.y > 1 splits k
// further; the slices' sums are then added by the kernel that reads the output (deterministic, unlike atomics).
//
// OVERLAP: the launch may overlap with the kernel before (launch.py says why that is safe). Only weight and meta are
// touched before the wait: nothing writes them.
//
// With HOST_TEST the file compiles as C++ behind an emulation of the device code.

// Sums over one group's 64 weights of k, of each of the 8 rows of x (its two columns of this thread).
__device__ __forceinline__ void sum_x(float (&xs)[4], const Word4& xa, const Word4& xb) {
  const unsigned one = 0x3F803F80u;
  mma(xs, one, one, one, one, xa.x, xa.y);
  mma(xs, one, one, one, one, xa.z, xa.w);
  mma(xs, one, one, one, one, xb.x, xb.y);
  mma(xs, one, one, one, one, xb.z, xb.w);
}

// The weights of one word: one A operand.
struct Unpacked {
  unsigned a[4];
};

__device__ __forceinline__ Unpacked unpacked(unsigned word) {
  return {{nibbles_on_128(word), nibbles_on_128(word >> 4), nibbles_on_128(word >> 8), nibbles_on_128(word >> 12)}};
}

__device__ __forceinline__ void mma_word(float (&d)[4], const Unpacked& w, unsigned b0, unsigned b1) {
  mma(d, w.a[0], w.a[1], w.a[2], w.a[3], b0, b1);
}

// One group of one tile: acc += scale * (w - zero) x; scales and zeros of weight rows g and g + 8.
__device__ __forceinline__ void add_tile(float (&acc)[EIGHTS][TILES][4], int tile, const Word4& w, unsigned low_pair,
                                         unsigned high_pair, const Word4 (&xa)[EIGHTS], const Word4 (&xb)[EIGHTS],
                                         const float (&xs)[EIGHTS][4]) {
  const Unpacked w0 = unpacked(w.x), w1 = unpacked(w.y), w2 = unpacked(w.z), w3 = unpacked(w.w);
  const float2 low = half_pair(low_pair), high = half_pair(high_pair);
  const float low_zero = low.y + 128.f, high_zero = high.y + 128.f;
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    mma_word(d, w0, xa[e].x, xa[e].y);
    mma_word(d, w1, xa[e].z, xa[e].w);
    mma_word(d, w2, xb[e].x, xb[e].y);
    mma_word(d, w3, xb[e].z, xb[e].w);
    acc[e][tile][0] += low.x * (d[0] - low_zero * xs[e][0]);
    acc[e][tile][1] += low.x * (d[1] - low_zero * xs[e][1]);
    acc[e][tile][2] += high.x * (d[2] - high_zero * xs[e][0]);
    acc[e][tile][3] += high.x * (d[3] - high_zero * xs[e][1]);
  }
}

// One group of all tiles.
__device__ __forceinline__ void add_group(float (&acc)[EIGHTS][TILES][4], const Word4 (&w)[TILES],
                                          const Word4 (&m)[TILES / 2], const Word4 (&xa)[EIGHTS],
                                          const Word4 (&xb)[EIGHTS]) {
  float xs[EIGHTS][4];
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    xs[e][0] = xs[e][1] = xs[e][2] = xs[e][3] = 0.f;
    sum_x(xs[e], xa[e], xb[e]);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const Word4 mm = m[i / 2];
    add_tile(acc, i, w[i], i & 1 ? mm.z : mm.x, i & 1 ? mm.w : mm.y, xa, xb, xs);
  }
}

// One group of x, rows g, g + 8, ...
__device__ __forceinline__ void load_x(Word4 (&xa)[EIGHTS], Word4 (&xb)[EIGHTS], const Word4* x, long long eight_rows,
                                       int g, int rows) {
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    if (g + 8 * e < rows) {
      xa[e] = load(x + e * eight_rows);
      xb[e] = load(x + e * eight_rows + 1);
    }
  }
}

// With four warps: all blocks of a gate and up are on the multiprocessors at once, or nearly so.
#if WARPS == 4 && EIGHTS == 1
#define BOUNDS __launch_bounds__(WARPS * 32, TILES == 4 ? 5 : 8)
#else
#define BOUNDS __launch_bounds__(WARPS * 32)
#endif

// Whether two groups of x fit into the registers.
#define AHEAD (EIGHTS * TILES <= 8)

extern "C" __global__ void BOUNDS int4_linear(
    const Word4* __restrict__ weight,  // [blocks][groups][TILES][32 lanes] of 4 words
    const Word4* __restrict__ meta,    // [blocks][groups][8][TILES * 2] pairs of half: scale, zero
    const Word4* __restrict__ x,       // bfloat16 [rows][groups / PLANES * 64]
    void* __restrict__ out,            // float [splits][rows][n], or bfloat16 [rows][n / 2] with SWIGLU
    int all_rows, int n, int groups, int groups_per_split) {
  release_next();
  const int first_row = blockIdx.z * 8 * EIGHTS, rows = min(all_rows - first_row, 8 * EIGHTS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const long long block = blockIdx.x;
  const int first = blockIdx.y * groups_per_split;
  const int last = min(first + groups_per_split, groups);
  const Word4* w_block = weight + block * groups * TILES * 32 + lane;
  const Word4* m_block = meta + (block * groups * 8 + g) * (TILES / 2);
  const long long x_stride = (long long)(groups / PLANES) * 8;  // of a row, in words
  const Word4* x_row = x + (first_row + g) * x_stride + t * 2;

  float acc[EIGHTS][TILES][4];
  Word4 xa[EIGHTS], xb[EIGHTS];
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    xa[e] = xb[e] = Word4{0u, 0u, 0u, 0u};
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[e][i][j] = 0.f;
  }
  int group = first + warp;

  Word4 w[TILES], m[TILES / 2];
  if (group < last) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = load_once(w_block + ((long long)group * TILES + i) * 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = load_once(m_block + (long long)group * 8 * (TILES / 2) + i);
  }
  wait_for_previous();
  if (group < last) load_x(xa, xb, x_row + group / PLANES * 8, 8 * x_stride, g, rows);
  while (group < last) {
    const int next = group + WARPS;
    Word4 w_next[TILES], m_next[TILES / 2];
    if (next < last) {  // the next group's loads fly while this one is computed
#pragma unroll
      for (int i = 0; i < TILES; ++i) w_next[i] = load_once(w_block + ((long long)next * TILES + i) * 32);
#pragma unroll
      for (int i = 0; i < TILES / 2; ++i) m_next[i] = load_once(m_block + (long long)next * 8 * (TILES / 2) + i);
    }
#if AHEAD
    Word4 xa_next[EIGHTS], xb_next[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) xa_next[e] = xb_next[e] = Word4{0u, 0u, 0u, 0u};
    if (next < last) load_x(xa_next, xb_next, x_row + next / PLANES * 8, 8 * x_stride, g, rows);
    add_group(acc, w, m, xa, xb);
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) xa[e] = xa_next[e], xb[e] = xb_next[e];
#else
    add_group(acc, w, m, xa, xb);
    if (next < last) load_x(xa, xb, x_row + next / PLANES * 8, 8 * x_stride, g, rows);
#endif
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = w_next[i];
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = m_next[i];
    group = next;
  }

  __shared__ Sums sums[WARPS];
  write_all_sums(sums, acc, out, first_row, all_rows, n, block, blockIdx.y);
}
