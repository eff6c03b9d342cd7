// The product of int4.cu for 9 to 8 * EIGHTS rows of x: weights are read once for all of them.
//
// Every warp has a block of weight rows of its own (TILES * 16 of them) and runs through a slice of k. The rows of x, which
// all warps multiply with, are copied to shared memory STAGES - 1 groups of 64 inputs ahead of use. An A operand serves all
// rows: it is unpacked once, and multiplied with eight rows of x at a time. The sums of x are computed once per block.
//
// TILES, WARPS, EIGHTS, PLANES, SWIGLU and OVERLAP are set by the host.

#define ROWS (8 * EIGHTS)
#define STAGES 4

#ifndef HOST_TEST
// Copies 16 bytes to shared memory, or zeros.
__device__ __forceinline__ void copy_ahead(Word4* to, const Word4* from, bool exists) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(to);
  const int count = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(count) : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>  // all groups of copies but the last LEFT have arrived
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif

// Where word c of a row lies: eight threads that load a word each, of two rows, meet all banks.
__device__ __forceinline__ int place(int row, int c) { return row * 8 + (c ^ (row & 1)); }

// Copy a group of x.
__device__ __forceinline__ void fill(Word4* stage, const Word4* x, long long x_stride, int rows) {
  for (int u = threadIdx.x; u < ROWS * 8; u += WARPS * 32) {
    const int row = u / 8, c = u % 8;
    copy_ahead(stage + place(row, c), row < rows ? x + row * x_stride + c : x, row < rows);
  }
}

// Sums over a group of every row of x.
__device__ __forceinline__ void sum_rows(float* sums, const Word4* stage, int warp, int g, int t) {
  for (int e = warp; e < EIGHTS; e += WARPS) {
    const int row = 8 * e + g;
    float xs[4] = {0.f, 0.f, 0.f, 0.f};
    sum_x(xs, stage[place(row, 2 * t)], stage[place(row, 2 * t + 1)]);
    if (g == 0) {
      sums[8 * e + 2 * t] = xs[0];
      sums[8 * e + 2 * t + 1] = xs[1];
    }
  }
}

// One group of all tiles.
__device__ __forceinline__ void add_rows(float (&acc)[EIGHTS][TILES][4], const Word4 (&w)[TILES],
                                         const Word4 (&m)[TILES / 2], const Word4* stage, const float* sums, int g,
                                         int t) {
  Unpacked a[TILES][4];
  Scales scales[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    a[i][0] = unpacked(w[i].x);
    a[i][1] = unpacked(w[i].y);
    a[i][2] = unpacked(w[i].z);
    a[i][3] = unpacked(w[i].w);
    scales[i] = scales_of(m[i / 2], i);
  }
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    const int row = 8 * e + g;
    const Word4 xa = stage[place(row, 2 * t)], xb = stage[place(row, 2 * t + 1)];
    const float xs0 = sums[8 * e + 2 * t], xs1 = sums[8 * e + 2 * t + 1];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      mma_word(d, a[i][0], xa.x, xa.y);
      mma_word(d, a[i][1], xa.z, xa.w);
      mma_word(d, a[i][2], xb.x, xb.y);
      mma_word(d, a[i][3], xb.z, xb.w);
      add_scaled(acc[e][i], d, scales[i], xs0, xs1);
    }
  }
}

// The sums of a warp's block of weight rows: their activation, or one slice of the output.
__device__ __forceinline__ void write_rows(const float (&acc)[EIGHTS][TILES][4], void* out, int rows, int n,
                                           long long block, int slice, int g, int t) {
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = 8 * e + 2 * t + (j & 1), weight_row = g + (j >= 2 ? 8 : 0);
      if (row >= rows) continue;
#if SWIGLU
#pragma unroll
      for (int i = 0; i < TILES; i += 2) {
        const float gate = acc[e][i][j];
        ((unsigned short*)out)[(long long)row * (n / 2) + block * TILES * 8 + i * 8 + weight_row] =
            to_bf16(gate / (1.f + __expf(-gate)) * acc[e][i + 1][j]);
      }
#else
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        ((float*)out)[((long long)slice * rows + row) * n + block * TILES * 16 + i * 16 + weight_row] = acc[e][i][j];
#endif
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) int4_rows(
    const Word4* __restrict__ weight,  // as of int4_linear
    const Word4* __restrict__ meta,
    const Word4* __restrict__ x,
    void* __restrict__ out,
    int rows, int n, int groups, int groups_per_split, int blocks) {
  release_next();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const long long own = (long long)blockIdx.x * WARPS + warp;
  const long long block = own < blocks ? own : blocks - 1;  // warps without a block repeat the last one
  const int first = blockIdx.y * groups_per_split;
  const int count = min(groups_per_split, groups - first);
  const Word4* w_block = weight + (block * groups + first) * TILES * 32 + lane;
  const Word4* m_block = meta + ((block * groups + first) * 8 + g) * (TILES / 2);
  const long long x_stride = (long long)(groups / PLANES) * 8;  // of a row, in words

  __shared__ Word4 stages[STAGES][ROWS * 8];
  __shared__ float sums[2][ROWS];

  Word4 w[TILES], m[TILES / 2];
  if (count > 0) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = load_once(w_block + i * 32);
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = load_once(m_block + i);
  }
  float acc[EIGHTS][TILES][4];
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e)
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[e][i][j] = 0.f;

  wait_for_previous();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < count) fill(stages[s], x + (first + s) / PLANES * 8, x_stride, rows);
    end_of_copies();
  }
  wait_for_copies<STAGES - 2>();
  __syncthreads();
  sum_rows(sums[0], stages[0], warp, g, t);
  for (int step = 0; step < count; ++step) {
    wait_for_copies<STAGES - 3>();
    __syncthreads();  // the next group is there, and all sums of this one; the group before is done with
    const int ahead = step + STAGES - 1;
    if (ahead < count) fill(stages[ahead % STAGES], x + (first + ahead) / PLANES * 8, x_stride, rows);
    end_of_copies();
    Word4 w_next[TILES], m_next[TILES / 2];
    if (step + 1 < count) {  // the next group's loads fly while this one is computed
#pragma unroll
      for (int i = 0; i < TILES; ++i) w_next[i] = load_once(w_block + ((long long)(step + 1) * TILES + i) * 32);
#pragma unroll
      for (int i = 0; i < TILES / 2; ++i)
        m_next[i] = load_once(m_block + (long long)(step + 1) * 8 * (TILES / 2) + i);
      sum_rows(sums[(step + 1) & 1], stages[(step + 1) % STAGES], warp, g, t);
    }
    add_rows(acc, w, m, stages[step % STAGES], sums[step & 1], g, t);
#pragma unroll
    for (int i = 0; i < TILES; ++i) w[i] = w_next[i];
#pragma unroll
    for (int i = 0; i < TILES / 2; ++i) m[i] = m_next[i];
  }
  if (own < blocks) write_rows(acc, out, rows, n, block, blockIdx.y, g, t);
}
