// y[row, n] = sum_k x[row, k] * scale[n, k/64] * (q[n, k] - zero[n, k/64]) for up to 8 * EIGHTS rows of half x and
// q of up to 4 bits, or of 8 bits in two planes: the Linear layers of a draft level, which has few rows.
//
// With so few rows the weights' bytes are what counts: they are read once. One tensor-core instruction, mma.m16n8k16,
// takes 16 weight rows x 16 weights as its A operand and 8 rows of x as B, so no row is padding beyond 8, and each
// thread's share of A is 8 weights: exactly one 32-bit word of nibbles. The words lie in memory in the order the
// threads want them (see int4.py), so a warp's load is one contiguous run, and unpacking is one logic operation per pair
// and one shift per word: OR-ing a nibble into half 1024.0 gives 1024 + q, exact, and the 1024 joins the zero point. A
// nibble four bits higher gives 1024 + 16 q: those of weight rows g + 8, whose scale is divided by 16. (With bfloat16,
// which has no room for the higher nibble, there were three shifts: a tenth of the time.) Scales are applied once per
// group to the sums, not to the weights:
//   sum_k s (q - z) x = s (sum_k (1024 + q) x - (1024 + z) sum_k x),
// where sum_k x comes from the same instruction with A = 1.
//
// PLANES: 1, or 2 for 8-bit q = low + 16 * high. Then the group of the high nibbles, with scale 16 s, follows that of the low
// nibbles, with scale s; both multiply the same 64 inputs. Either has the zero z / 17. 16 s is exact in half precision.
//
// More than 8 * EIGHTS rows take several blocks of threads (gridDim.z), the later of which find the weights in the L2 cache.
//
// TILES (16-row tiles per block), WARPS, EIGHTS, PLANES, SWIGLU and OVERLAP are set by the host. Each block covers TILES * 16
// rows; its warps share the groups of the block's slice of k and add up in shared memory. A grid with gridDim.y > 1 splits k
// further; the slices' sums are then added by the kernel that reads the output (deterministic, unlike atomics).
//
// OVERLAP: the launch may overlap with the kernel before (launch.py says why that is safe). Only weight and scales are
// touched before the wait: nothing writes them.
//
// With HOST_TEST the file compiles as C++ behind an emulation of the device code.

struct __align__(4 * TILES) Scales { unsigned tile[TILES]; };  // pairs of half (group_scales.py), of rows g and g + 8

__device__ __forceinline__ Scales load_scales(const Scales* p) {
  Scales s;
#if TILES == 2
  const Word2 two = load_once((const Word2*)p);
  s.tile[0] = two.x, s.tile[1] = two.y;
#else
#pragma unroll
  for (int i = 0; i < TILES; i += 4) {
    const Word4 four = load_once((const Word4*)(p->tile + i));
    s.tile[i] = four.x, s.tile[i + 1] = four.y, s.tile[i + 2] = four.z, s.tile[i + 3] = four.w;
  }
#endif
  return s;
}

// Sums over one group's 64 weights of k, of each of the 8 rows of x (its two columns of this thread).
__device__ __forceinline__ void sum_x(float (&xs)[4], const Word4& xa, const Word4& xb) {
  const unsigned one = 0x3C003C00u;
  mma_half(xs, one, one, one, one, xa.x, xa.y);
  mma_half(xs, one, one, one, one, xa.z, xa.w);
  mma_half(xs, one, one, one, one, xb.x, xb.y);
  mma_half(xs, one, one, one, one, xb.z, xb.w);
}

// The weights of one word: one A operand.
struct Unpacked {
  unsigned a[4];
};

__device__ __forceinline__ Unpacked unpacked(unsigned word) {
  return {{nibbles_on_1024(word, 0), nibbles_on_1024(word, 1), nibbles_on_1024(word, 2), nibbles_on_1024(word, 3)}};
}

__device__ __forceinline__ void mma_word(float (&d)[4], const Unpacked& w, unsigned b0, unsigned b1) {
  mma_half(d, w.a[0], w.a[1], w.a[2], w.a[3], b0, b1);
}

// One group of one tile: acc += scale * (w - zero) x; scales and zeros of weight rows g and g + 8.
__device__ __forceinline__ void add_tile(float (&acc)[EIGHTS][TILES][4], int tile, const Word4& w, unsigned scales,
                                         const Word4 (&xa)[EIGHTS], const Word4 (&xb)[EIGHTS],
                                         const float (&xs)[EIGHTS][4]) {
  const Unpacked w0 = unpacked(w.x), w1 = unpacked(w.y), w2 = unpacked(w.z), w3 = unpacked(w.w);
  const float2 scale = half_pair(scales), on_256 = zeros_on_256(scales);
  const float2 zero = {on_256.x + 768.f, on_256.y * 16.f - 3072.f};
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    mma_word(d, w0, xa[e].x, xa[e].y);
    mma_word(d, w1, xa[e].z, xa[e].w);
    mma_word(d, w2, xb[e].x, xb[e].y);
    mma_word(d, w3, xb[e].z, xb[e].w);
    acc[e][tile][0] += scale.x * (d[0] - zero.x * xs[e][0]);
    acc[e][tile][1] += scale.x * (d[1] - zero.x * xs[e][1]);
    acc[e][tile][2] += scale.y / 16.f * (d[2] - zero.y * xs[e][0]);
    acc[e][tile][3] += scale.y / 16.f * (d[3] - zero.y * xs[e][1]);
  }
}

// One group of all tiles.
__device__ __forceinline__ void add_group(float (&acc)[EIGHTS][TILES][4], const Word4 (&w)[TILES],
                                          const Scales& s, const Word4 (&xa)[EIGHTS], const Word4 (&xb)[EIGHTS]) {
  float xs[EIGHTS][4];
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    xs[e][0] = xs[e][1] = xs[e][2] = xs[e][3] = 0.f;
    sum_x(xs[e], xa[e], xb[e]);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) add_tile(acc, i, w[i], s.tile[i], xa, xb, xs);
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

// Blocks that a multiprocessor has registers for. With four warps all blocks of a gate and up are there at once, or nearly
// so. With eight the compiler, left alone, may take registers for one block only: 4.8 us of q, k and v were 3.9 with two.
#if EIGHTS == 1 && TILES == 4
#define BOUNDS __launch_bounds__(WARPS * 32, WARPS == 4 ? 5 : 2)
#elif EIGHTS == 1 && TILES == 2
#define BOUNDS __launch_bounds__(WARPS * 32, 32 / WARPS)
#else
#define BOUNDS __launch_bounds__(WARPS * 32)
#endif

// Whether two groups of x fit into the registers.
#define AHEAD (EIGHTS * TILES <= 8)

extern "C" __global__ void BOUNDS int4_linear(
    const Word4* __restrict__ weight,  // [blocks][groups][TILES][32 lanes] of 4 words
    const Scales* __restrict__ scales, // [blocks][groups][8]
    const Word4* __restrict__ x,       // half [rows][groups / PLANES * 64]
    void* __restrict__ out,            // float [splits][rows][n], or with SWIGLU 16 bits [rows][n / 2] (to_reader)
    int all_rows, int n, int groups, int groups_per_split) {
  release_next();
  const int first_row = blockIdx.z * 8 * EIGHTS, rows = min(all_rows - first_row, 8 * EIGHTS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const long long block = blockIdx.x;
  const int first = blockIdx.y * groups_per_split;
  const int last = min(first + groups_per_split, groups);
  const Word4* w_block = weight + block * groups * TILES * 32 + lane;
  const Scales* s_block = scales + block * groups * 8 + g;
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

  Word4 w[TILES];
  Scales s;
  if (group < last) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = load_once(w_block + ((long long)group * TILES + i) * 32);
    s = load_scales(s_block + (long long)group * 8);
  }
  wait_for_previous();
  if (group < last) load_x(xa, xb, x_row + group / PLANES * 8, 8 * x_stride, g, rows);
  while (group < last) {
    const int next = group + WARPS;
    Word4 w_next[TILES];
    Scales s_next;
    if (next < last) {  // the next group's loads fly while this one is computed
#pragma unroll
      for (int i = 0; i < TILES; ++i) w_next[i] = load_once(w_block + ((long long)next * TILES + i) * 32);
      s_next = load_scales(s_block + (long long)next * 8);
    }
#if AHEAD
    Word4 xa_next[EIGHTS], xb_next[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) xa_next[e] = xb_next[e] = Word4{0u, 0u, 0u, 0u};
    if (next < last) load_x(xa_next, xb_next, x_row + next / PLANES * 8, 8 * x_stride, g, rows);
    add_group(acc, w, s, xa, xb);
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) xa[e] = xa_next[e], xb[e] = xb_next[e];
#else
    add_group(acc, w, s, xa, xb);
    if (next < last) load_x(xa, xb, x_row + next / PLANES * 8, 8 * x_stride, g, rows);
#endif
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = w_next[i];
    s = s_next;
    group = next;
  }

  __shared__ Sums sums[WARPS];
  write_all_sums(sums, acc, out, first_row, all_rows, n, block, blockIdx.y);
}
