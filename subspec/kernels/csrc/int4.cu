// y[row, n] = sum_k x[row, k] * scale[n, k/64] * (q[n, k] - zero[n, k/64]) for up to 8 rows of bfloat16 x and
// q of up to 4 bits, or of 8 bits in two planes: the Linear layers of a draft level, which has few rows.
//
// With so few rows the weights' bytes are all that counts. One tensor-core instruction, mma.m16n8k16, takes 16
// weight rows x 16 weights as its A operand and up to 8 rows of x as B, so no row is padding beyond 8, and each
// thread's share of A is 8 weights: exactly one 32-bit word of nibbles. The words lie in memory in the order the
// threads want them (see int4.py), so a warp's load is one contiguous run, and unpacking is one shift and one
// logic operation per pair (int4_words.cu). More rows: int4_rows.cu.
//
// PLANES: 1, or 2 for 8-bit q = low + 16 * high. Then the group of the high nibbles, with scale 16 s and zero 0,
// follows that of the low nibbles, with scale s and zero z; both multiply the same 64 inputs. 16 s is exact in half
// precision.
//
// TILES (16-row tiles per block), WARPS, PLANES, SWIGLU and OVERLAP are set by the host. Each block covers TILES * 16
// rows; its warps share the groups of the block's slice of k and add up in shared memory. A grid with gridDim.y > 1 splits k
// further; the slices' sums are then added by the kernel that reads the output (deterministic, unlike atomics).
//
// With HOST_TEST the file compiles as C++ behind an emulation of the device code.

// One group of all tiles.
__device__ __forceinline__ void add_group(float (&acc)[TILES][4], const Word4 (&w)[TILES], const Word4 (&m)[TILES / 2],
                                          const Word4& xa, const Word4& xb) {
  float xs[4] = {0.f, 0.f, 0.f, 0.f};
  sum_x(xs, xa, xb);
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    mma_word(d, unpacked(w[i].x), xa.x, xa.y);
    mma_word(d, unpacked(w[i].y), xa.z, xa.w);
    mma_word(d, unpacked(w[i].z), xb.x, xb.y);
    mma_word(d, unpacked(w[i].w), xb.z, xb.w);
    add_scaled(acc[i], d, scales_of(m[i / 2], i), xs[0], xs[1]);
  }
}

// With four warps: all blocks of a gate and up are on the multiprocessors at once, or nearly so.
#if WARPS == 4
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
  const long long block = blockIdx.x;
  const int first = blockIdx.y * groups_per_split;
  const int last = min(first + groups_per_split, groups);
  const Word4* w_block = weight + block * groups * TILES * 32 + lane;
  const Word4* m_block = meta + (block * groups * 8 + g) * (TILES / 2);
  const Word4* x_row = x + (long long)g * (groups / PLANES) * 8 + t * 2;

  float acc[1][TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[0][i][j] = 0.f;

  const Word4 nothing = {0u, 0u, 0u, 0u};
  Word4 xa = nothing, xb = nothing;
  int group = first + warp;

  Word4 w[TILES], m[TILES / 2];
  if (group < last) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = load_once(w_block + ((long long)group * TILES + i) * 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = load_once(m_block + (long long)group * 8 * (TILES / 2) + i);
  }
  wait_for_previous();
  if (group < last && g < rows) {
    xa = load(x_row + group / PLANES * 8);
    xb = load(x_row + group / PLANES * 8 + 1);
  }
  while (group < last) {
    const int next = group + WARPS;
    Word4 w_next[TILES], m_next[TILES / 2], xa_next = nothing, xb_next = nothing;
    if (next < last) {  // the next group's loads fly while this one is computed
#pragma unroll
      for (int i = 0; i < TILES; ++i) w_next[i] = load_once(w_block + ((long long)next * TILES + i) * 32);
#pragma unroll
      for (int i = 0; i < TILES / 2; ++i) m_next[i] = load_once(m_block + (long long)next * 8 * (TILES / 2) + i);
      if (g < rows) {
        xa_next = load(x_row + next / PLANES * 8);
        xb_next = load(x_row + next / PLANES * 8 + 1);
      }
    }
    add_group(acc[0], w, m, xa, xb);
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = w_next[i];
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = m_next[i];
    xa = xa_next;
    xb = xb_next;
    group = next;
  }

  __shared__ Sums sums[WARPS];
  write_all_sums(sums, acc, out, rows, n, block, blockIdx.y);
}
