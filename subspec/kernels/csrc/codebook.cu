// y[row, n] = sum_k x[row, k] * scale[n, k/group] * table[code[n, k/2]][k%2] for up to 8 * EIGHTS rows of bfloat16
// x and codes of 4, 6 or 8 bits per pair of weights: the Linear layers of a draft, whose width is a tree level's few rows.
//
// Built like int4.cu: one tensor-core instruction, mma.m16n8k16, takes 16 weight rows x 16 weights as its A operand and
// up to 8 rows of x as B, the words lie in memory in the order the threads want them (see kernels/codebook.py), and
// scales are applied to the sums. The difference is the way from codes to weights: a register of A holds two
// neighbouring weights of a row, which is exactly one entry of the table of pairs, so that one 32-bit load from shared
// memory replaces all arithmetic. The table is kept 32 times, once for each bank: entry e of lane l lies at word 32 e +
// l, and no two lanes of a warp ever wait for each other.
//
// BITS (per weight), GROUP_STEPS (steps of 64 inputs that share a scale), TILES (16-row tiles per block), WARPS, EIGHTS
// and SWIGLU are set by the host. Each block covers TILES * 16 rows; its warps share the steps of the block's slice of k
// and add up in shared memory. A grid with gridDim.y > 1 splits k further; the slices' sums are then added by the
// kernel that reads the output (deterministic, unlike atomics).

#define ENTRIES (1 << (2 * BITS))

__device__ __forceinline__ unsigned load_once(const unsigned* p) {  // weights are used once: keep them out of L1
  unsigned v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ Word4 load_once4(const Word4* p) {
  Word4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ float half_at(const unsigned* words, int i) {  // i is known when compiling
  float f;
  const unsigned v = words[i / 2];
  if (i & 1) asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi;}" : "=f"(f) : "r"(v));
  else asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo;}" : "=f"(f) : "r"(v));
  return f;
}

// Bits at .. at + size of a word, moved to bits 7 ..: the byte offset of an entry, 128 bytes each.
__device__ __forceinline__ unsigned offset(unsigned word, int at, unsigned mask) {
  return (at < 7 ? word << (7 - at) : word >> (at - 7)) & (mask << 7);
}

// A of instruction i, register r: pair j = 4 i + r of the step's 16.
__device__ __forceinline__ unsigned pair(const unsigned (&w)[BITS], int j, const char* table) {
#if BITS == 4
  const unsigned at = offset(w[j / 4], 8 * (j % 4), 255u);
#elif BITS == 3  // four low bits of eight pairs in each of two words, the two high bits of all in the third
  const unsigned at = offset(w[j / 8], 4 * (j % 8), 15u) | (offset(w[2], 2 * j, 3u) << 4);
#else
  const unsigned at = offset(w[j / 8], 4 * (j % 8), 15u);
#endif
  return *(const unsigned*)(table + at);
}

struct Step {
  unsigned w[TILES][BITS];
  unsigned s[TILES];  // 2 * TILES halves
  Word4 xa[EIGHTS], xb[EIGHTS];
};

// One step of x, rows g, g + 8, ...
__device__ __forceinline__ void fetch_x(Step& to, const Word4* x, long long eight_rows, int g, int rows) {
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    if (g + 8 * e < rows) {
      to.xa[e] = load(x + e * eight_rows);
      to.xb[e] = load(x + e * eight_rows + 1);
    }
  }
}

__device__ __forceinline__ void fetch(Step& to, const unsigned* w, const unsigned* s) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
#if BITS == 4
    const Word4 v = load_once4((const Word4*)w + i * 32);
    to.w[i][0] = v.x; to.w[i][1] = v.y; to.w[i][2] = v.z; to.w[i][3] = v.w;
#else
#pragma unroll
    for (int b = 0; b < BITS; ++b) to.w[i][b] = load_once(w + (i * BITS + b) * 32);
#endif
    to.s[i] = s[i];
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) codebook_linear(
    const unsigned* __restrict__ weight,  // [blocks][steps][TILES][32 lanes][4], with BITS < 4 [..][BITS][32 lanes]
    const unsigned* __restrict__ scale,   // [blocks][groups][8][TILES] pairs of half: rows g and g + 8 of each tile
    const unsigned* __restrict__ pairs,   // [ENTRIES] of two bfloat16
    const Word4* __restrict__ x,          // bfloat16 [rows][steps * 64]
    void* __restrict__ out,               // float [splits][rows][n], or bfloat16 [rows][n / 2] with SWIGLU
    int all_rows, int n, int steps, int steps_per_split) {
  const int first_row = blockIdx.z * 8 * EIGHTS, rows = min(all_rows - first_row, 8 * EIGHTS);
  // The table and, after it is no longer needed, the warps' sums.
  constexpr int TABLE = ENTRIES * 32, SUMS = WARPS * sizeof(Sums) / 4;
  __shared__ __align__(128) unsigned shared[TABLE > SUMS ? TABLE : SUMS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const long long block = blockIdx.x;
  const int first = blockIdx.y * steps_per_split;
  const int last = min(first + steps_per_split, steps);
  const int groups = steps / GROUP_STEPS;
#if BITS == 4
  const unsigned* w_block = weight + block * steps * (TILES * 128) + lane * 4;
#else
  const unsigned* w_block = weight + block * steps * (TILES * BITS * 32) + lane;
#endif
  const unsigned* s_block = scale + (block * groups * 8 + g) * TILES;
  const long long x_stride = (long long)steps * 8;  // of a row, in words
  const Word4* x_row = x + (first_row + g) * x_stride + t * 2;

  Step now, next;
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) now.xa[e] = now.xb[e] = next.xa[e] = next.xb[e] = Word4{0u, 0u, 0u, 0u};
  int step = first + warp;
  if (step < last) {
    fetch(now, w_block + (long long)step * (TILES * BITS * 32), s_block + step / GROUP_STEPS * (8 * TILES));
    fetch_x(now, x_row + step * 8, 8 * x_stride, g, rows);
  }
  for (int e = threadIdx.x; e < ENTRIES * 8; e += WARPS * 32) {  // four of an entry's 32 copies at a time
    const unsigned v = pairs[e / 8];
    ((Word4*)shared)[e] = Word4{v, v, v, v};
  }
  __syncthreads();
  const char* table = (const char*)(shared + lane);

  float acc[EIGHTS][TILES][4];
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[e][i][j] = 0.f;

  while (step < last) {
    const int following = step + WARPS;
    if (following < last) {  // the next step's loads fly while this one is computed
      fetch(next, w_block + (long long)following * (TILES * BITS * 32),
            s_block + following / GROUP_STEPS * (8 * TILES));
#if EIGHTS == 1  // two steps of more rows would not fit into the registers
      fetch_x(next, x_row + following * 8, 8 * x_stride, g, rows);
#endif
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      unsigned a[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) a[j] = pair(now.w[i], j, table);
      const float low = half_at(now.s, 2 * i), high = half_at(now.s, 2 * i + 1);
#pragma unroll
      for (int e = 0; e < EIGHTS; ++e) {
        float d[4] = {0.f, 0.f, 0.f, 0.f};
        const Word4 xa = now.xa[e], xb = now.xb[e];
        const unsigned b[8] = {xa.x, xa.y, xa.z, xa.w, xb.x, xb.y, xb.z, xb.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) mma(d, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], b[2 * k], b[2 * k + 1]);
        acc[e][i][0] += low * d[0];
        acc[e][i][1] += low * d[1];
        acc[e][i][2] += high * d[2];
        acc[e][i][3] += high * d[3];
      }
    }
#if EIGHTS > 1
    if (following < last) fetch_x(next, x_row + following * 8, 8 * x_stride, g, rows);
#endif
    now = next;
    step = following;
  }

  __syncthreads();  // every warp is done with the table
  write_all_sums((Sums*)shared, acc, out, first_row, all_rows, n, block, blockIdx.y);
}
