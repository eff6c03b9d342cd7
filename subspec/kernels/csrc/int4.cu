// y[row, n] = sum_k x[row, k] * scale[n, k/64] * (q[n, k] - zero[n, k/64]) for a few rows of bfloat16 x and
// q of up to 4 bits, or of 8 bits in two planes: the Linear layers of a draft level, which has few rows.
//
// With so few rows the weights' bytes are all that counts. One tensor-core instruction, mma.m16n8k16, takes 16
// weight rows x 16 weights as its A operand and up to 8 rows of x as B, so no row is padding beyond 8, and each
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
// COLUMNS: eights of rows of x per block (1: there are no more than 8), which share a load and an unpacking of the weight. With more than one, x is
// not loaded ahead: registers are short.
//
// TILES (16-row tiles per block), WARPS, COLUMNS, PLANES, SWIGLU and OVERLAP are set by the host. Each block covers TILES * 16
// rows; its warps share the groups of the block's slice of k and add up in shared memory. A grid with gridDim.y > 1 splits k
// further; the slices' sums are then added by the kernel that reads the output (deterministic, unlike atomics).
//
// OVERLAP: the launch may overlap with the kernel before (launch.py says why that is safe). Only weight and meta are
// touched before the wait: nothing writes them.
//
// With HOST_TEST the file compiles as C++ behind an emulation of the device code.

#ifndef HOST_TEST
__device__ __forceinline__ void release_next() {  // the next kernel's blocks may start
#if OVERLAP
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {  // until the kernel before has ended, its writes visible
#if OVERLAP
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if OVERLAP
#define FIXED volatile  // the compiler must not move the first loads behind the wait
#else
#define FIXED
#endif

__device__ __forceinline__ Word4 load_once(const Word4* p) {  // weights are used once: keep them out of L1
  Word4 v;
  asm FIXED("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// value & 0x000F000F | 0x43004300 as the one instruction that it is. One of the constants has to lie in a register, and
// the compiler, left alone, spends a second instruction instead: 26 us of gate and up were 22 without those.
__device__ __forceinline__ unsigned nibbles_on_128(unsigned value) {
  unsigned r, base;
  asm("mov.u32 %0, 0x43004300;" : "=r"(base));
  asm("lop3.b32 %0, %1, 0x000F000F, %2, 0xea;" : "=r"(r) : "r"(value), "r"(base));
  return r;
}

__device__ __forceinline__ float2 half_pair(unsigned v) {
  float2 f;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(f.x), "=f"(f.y) : "r"(v));
  return f;
}
#endif

// Sums over one group's 64 weights of k, of each of the 8 rows of x (its two columns of this thread).
__device__ __forceinline__ void sum_x(float (&xs)[4], const Word4& xa, const Word4& xb) {
  const unsigned one = 0x3F803F80u;
  mma(xs, one, one, one, one, xa.x, xa.y);
  mma(xs, one, one, one, one, xa.z, xa.w);
  mma(xs, one, one, one, one, xb.x, xb.y);
  mma(xs, one, one, one, one, xb.z, xb.w);
}

struct Inputs {  // of a thread's row of x, in each column: its share of a group's 64
  Word4 a, b;
};

__device__ __forceinline__ void mma_word(float (&d)[COLUMNS][4], unsigned word, const Inputs (&x)[COLUMNS], int i) {
  const unsigned a0 = nibbles_on_128(word), a1 = nibbles_on_128(word >> 4);
  const unsigned a2 = nibbles_on_128(word >> 8), a3 = nibbles_on_128(word >> 12);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const Word4 half = i < 2 ? x[c].a : x[c].b;
    mma(d[c], a0, a1, a2, a3, i & 1 ? half.z : half.x, i & 1 ? half.w : half.y);
  }
}

// One group of one tile: acc += scale * (w - zero) x; scales and zeros of weight rows g and g + 8.
__device__ __forceinline__ void add_tile(float (&acc)[COLUMNS][4], const Word4& w, unsigned low_pair, unsigned high_pair,
                                         const Inputs (&x)[COLUMNS], const float (&xs)[COLUMNS][4]) {
  float d[COLUMNS][4];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) d[c][0] = d[c][1] = d[c][2] = d[c][3] = 0.f;
  mma_word(d, w.x, x, 0);
  mma_word(d, w.y, x, 1);
  mma_word(d, w.z, x, 2);
  mma_word(d, w.w, x, 3);
  const float2 low = half_pair(low_pair), high = half_pair(high_pair);
  const float low_zero = low.y + 128.f, high_zero = high.y + 128.f;
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    acc[c][0] += low.x * (d[c][0] - low_zero * xs[c][0]);
    acc[c][1] += low.x * (d[c][1] - low_zero * xs[c][1]);
    acc[c][2] += high.x * (d[c][2] - high_zero * xs[c][0]);
    acc[c][3] += high.x * (d[c][3] - high_zero * xs[c][1]);
  }
}

// One group of all tiles.
__device__ __forceinline__ void add_group(float (&acc)[TILES][COLUMNS][4], const Word4 (&w)[TILES],
                                          const Word4 (&m)[TILES / 2], const Inputs (&x)[COLUMNS]) {
  float xs[COLUMNS][4];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    xs[c][0] = xs[c][1] = xs[c][2] = xs[c][3] = 0.f;
    sum_x(xs[c], x[c].a, x[c].b);
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    const Word4 mm = m[i / 2];
    add_tile(acc[i], w[i], i & 1 ? mm.z : mm.x, i & 1 ? mm.w : mm.y, x, xs);
  }
}

// A group's share of x; rows past the last one are zeros.
__device__ __forceinline__ void load_x(Inputs (&x)[COLUMNS], const Word4* from, const bool (&row)[COLUMNS],
                                       int row_words) {
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c)
    if (row[c]) {
      x[c].a = load(from + (long long)c * 8 * row_words);
      x[c].b = load(from + (long long)c * 8 * row_words + 1);
    }
}

// With four warps: all blocks of a gate and up are on the multiprocessors at once, or nearly so.
#if COLUMNS > 1
#define BOUNDS __launch_bounds__(WARPS * 32, (TILES == 2 ? 16 : 8) / WARPS)
#elif WARPS == 4
#define BOUNDS __launch_bounds__(WARPS * 32, TILES == 4 ? 5 : 8)
#else
#define BOUNDS __launch_bounds__(WARPS * 32)
#endif

extern "C" __global__ void BOUNDS int4_linear(
    const Word4* __restrict__ weight,  // [blocks][groups][TILES][32 lanes] of 4 words
    const Word4* __restrict__ meta,    // [blocks][groups][8][TILES * 2] pairs of half: scale, zero
    const Word4* __restrict__ x,       // bfloat16 [rows][groups / PLANES * 64]
    void* __restrict__ out,            // float [splits][rows][n], or bfloat16 [rows][n / 2] with SWIGLU
    int rows, int n, int groups, int groups_per_split) {
  release_next();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
#if COLUMNS == 1
  const long long block = blockIdx.x;
  const int first_row = 0;
#else
  const int parts = (rows + 8 * COLUMNS - 1) / (8 * COLUMNS);  // of x
  const long long block = blockIdx.x / parts;
  const int first_row = blockIdx.x % parts * 8 * COLUMNS;
#endif
  const int first = blockIdx.y * groups_per_split;
  const int last = min(first + groups_per_split, groups);
  const int row_words = groups / PLANES * 8;
  bool row[COLUMNS];  // whether this thread's row of x exists
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) row[c] = first_row + 8 * c + g < rows;
  const Word4* w_block = weight + block * groups * TILES * 32 + lane;
  const Word4* m_block = meta + (block * groups * 8 + g) * (TILES / 2);
  const Word4* x_row = x + (long long)(first_row + g) * row_words + t * 2;

  float acc[TILES][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][c][j] = 0.f;

  const Word4 nothing = {0u, 0u, 0u, 0u};
  Inputs own[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) own[c].a = own[c].b = nothing;
  int group = first + warp;

  Word4 w[TILES], m[TILES / 2];
  if (group < last) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = load_once(w_block + ((long long)group * TILES + i) * 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = load_once(m_block + (long long)group * 8 * (TILES / 2) + i);
  }
  wait_for_previous();
  if (group < last) load_x(own, x_row + group / PLANES * 8, row, row_words);
  while (group < last) {
    const int next = group + WARPS;
    Word4 w_next[TILES], m_next[TILES / 2];
#if COLUMNS == 1
    Inputs own_next[COLUMNS];
    own_next[0].a = own_next[0].b = nothing;
#endif
    if (next < last) {  // the next group's loads fly while this one is computed
#pragma unroll
      for (int i = 0; i < TILES; ++i) w_next[i] = load_once(w_block + ((long long)next * TILES + i) * 32);
#pragma unroll
      for (int i = 0; i < TILES / 2; ++i) m_next[i] = load_once(m_block + (long long)next * 8 * (TILES / 2) + i);
#if COLUMNS == 1
      load_x(own_next, x_row + next / PLANES * 8, row, row_words);
#endif
    }
    add_group(acc, w, m, own);
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = w_next[i];
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = m_next[i];
#if COLUMNS == 1
    own[0] = own_next[0];
#else
    if (next < last) load_x(own, x_row + next / PLANES * 8, row, row_words);
#endif
    group = next;
  }

  __shared__ Sums sums[WARPS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    if (c && first_row + 8 * c >= rows) break;  // the same for all threads
    float column[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) column[i][j] = acc[i][c][j];
    if (c) __syncthreads();  // the column before is written
    keep_sums(sums[warp], column, g, t);
    __syncthreads();
    write_sums(sums, out, rows, first_row + 8 * c, n, block, blockIdx.y);
  }
}
