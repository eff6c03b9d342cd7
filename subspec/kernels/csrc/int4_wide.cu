// The product of int4.cu for up to 8 * EIGHTS rows of x per block of threads, by the instructions of a whole warp group
// (wgmma, compute capability 9.0 alone). With so many rows int4.cu is bound by x, which every block reads from the L2 cache
// for few weights, and by slower instructions of the tensor cores.
//
// A warp group multiplies four tiles of 16 weight rows, a tile per warp, with all rows of x: A comes from registers and
// has the layout of mma.m16n8k16, so that the words of int4.py are what a thread needs. B is x in shared memory, 64
// inputs by 8 * EIGHTS rows in the layout "K-major, 128-byte swizzle" (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared
// Memory Layout"). int4.py orders the inputs of a group so that a thread of mma holds 16 neighbours. Here x is put into that
// order on its way to shared memory, by way of registers.
//
// Weights become bfloat16, s (q - z): q is exact, s and s z are rounded, and so is the result. int4.cu's float32 scales would
// make every group of inputs wait for the sums of the one before. The product's error is 0.4 %; that of 4 bits is 7 %.
//
// TILES: of the packed weight. WARPS: of a block, four to a warp group. EIGHTS: 4, 6 or 8. BLOCKS: that a multiprocessor has
// registers for. DEPTH: groups of weights in registers. One plane of 4 bits only. SWIGLU, OVERLAP and splits as in int4.cu.

#define ROWS (8 * EIGHTS)
#define THREADS (32 * WARPS)
#define ROWS_AT_ONCE (THREADS / 8)
#define COPIES ((ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE)  // of 16 bytes by each thread, of a group of x
#define TILE_ROW 32                                        // pairs of bfloat16 in a row of a group

__device__ __forceinline__ unsigned minus_128(unsigned pair) {  // exact: (128 + q) - 128
  unsigned r;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(pair), "r"(0x43004300u));
  return r;
}

__device__ __forceinline__ unsigned scaled(unsigned pair, unsigned scale, unsigned offset) {
  unsigned r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(scale), "r"(offset));
  return r;
}

__device__ __forceinline__ unsigned both_bf16(float v) {  // the same bfloat16 in both halves
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(v));
  return r;
}

// The weights of one word: the A operand of 16 inputs, rows g and g + 8 in turn.
__device__ __forceinline__ void dequantize(unsigned (&a)[4], unsigned word, const unsigned (&scale)[2],
                                           const unsigned (&offset)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = scaled(minus_128(nibbles_on_128(word >> (4 * i))), scale[i & 1], offset[i & 1]);
}

// This thread's writes to shared memory can be seen by wgmma behind the next barrier.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// A K-major operand with 128-byte swizzle: eight rows of 128 bytes after another.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define SUMS8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), \
                 "+f"(acc[i + 4]), "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define WGMMA(n, sums, operands) \
  "{.reg .pred p; setp.ne.b32 p, 1, 0;\n\twgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" sums "}, " operands \
  ", p, 1, 1, 0;}"

// acc += A x, 64 weight rows x 16 inputs x ROWS.
__device__ __forceinline__ void wgmma(float (&acc)[4 * EIGHTS], const unsigned (&a)[4], unsigned long long b) {
#if EIGHTS == 4
  asm volatile(WGMMA("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "{%16,%17,%18,%19}, %20")
      : SUMS8(0), SUMS8(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#elif EIGHTS == 6
  asm volatile(WGMMA("48", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23",
                     "{%24,%25,%26,%27}, %28")
      : SUMS8(0), SUMS8(8), SUMS8(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  asm volatile(WGMMA("64", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                     "%24,%25,%26,%27,%28,%29,%30,%31", "{%32,%33,%34,%35}, %36")
      : SUMS8(0), SUMS8(8), SUMS8(16), SUMS8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

struct __align__(8) Meta { unsigned low, high; };  // scale and zero, a pair of half, of weight rows g and g + 8

__device__ __forceinline__ Meta load_meta(const Meta* p) {
  Meta m;
  asm FIXED("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(m.low), "=r"(m.high) : "l"(p));
  return m;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) int4_wide_linear(
    const Word4* __restrict__ weight,  // as in int4.cu
    const Meta* __restrict__ meta,
    const Word4* __restrict__ x,       // bfloat16 [rows][groups * 64]
    void* __restrict__ out,
    int all_rows, int n, int groups, int groups_per_split) {
  release_next();
  __shared__ __align__(1024) unsigned staged[2][ROWS][TILE_ROW];
  const int first_row = blockIdx.z * ROWS, rows = min(all_rows - first_row, ROWS);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x * WARPS + warp;
  const int loaded = min(tile, n / 16 - 1);  // the last block may have tiles of no weight
  const int first = blockIdx.y * groups_per_split, count = min(groups - first, groups_per_split);
  const Word4* w_tile = weight + (((long long)(loaded / TILES) * groups + first) * TILES + loaded % TILES) * 32 + lane;
  const Meta* m_tile = meta + (((long long)(loaded / TILES) * groups + first) * 8 + g) * TILES + loaded % TILES;

  Word4 w[DEPTH];
  Meta m[DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    if (i < count) {
      w[i] = load_once(w_tile);
      m[i] = load_meta(m_tile);
    }
    w_tile += TILES * 32;
    m_tile += TILES * 8;
  }
  wait_for_previous();

  // A thread copies 16 bytes of a row: half of the 16 inputs of thread `at` of mma, a pair for each of four chunks.
  const int row = threadIdx.x >> 3, at = (threadIdx.x & 7) >> 1, chunk = (threadIdx.x & 1) * 4 ^ (row & 7);
  const long long stride = (long long)groups * 8;
  const Word4* from = x + (first_row + row) * stride + (long long)first * 8 + (threadIdx.x & 7);
  Word4 held[COPIES];
  auto fetch = [&](int k) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      held[i] = Word4{0u, 0u, 0u, 0u};
      if (k < count && row + i * ROWS_AT_ONCE < rows) held[i] = load(from + i * ROWS_AT_ONCE * stride);
    }
    from += 8;
  };
  auto put = [&](int k) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      if (row + i * ROWS_AT_ONCE >= ROWS) break;
      unsigned* to = &staged[k & 1][row + i * ROWS_AT_ONCE][at];
      to[chunk * 4] = held[i].x;
      to[(chunk ^ 1) * 4] = held[i].y;
      to[(chunk ^ 2) * 4] = held[i].z;
      to[(chunk ^ 3) * 4] = held[i].w;
    }
  };
  const unsigned base = (unsigned)__cvta_generic_to_shared(staged);
  fetch(0);
  put(0);
  fetch(1);

  float acc[4 * EIGHTS];
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; ++i) acc[i] = 0.f;
  for (int start = 0; start < count; start += DEPTH) {
#pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int k = start + u;
      if (k >= count) break;
      const float2 low = half_pair(m[u].low), high = half_pair(m[u].high);
      const unsigned scale[2] = {both_bf16(low.x), both_bf16(high.x)};
      const unsigned offset[2] = {both_bf16(-low.x * low.y), both_bf16(-high.x * high.y)};
      unsigned a[4][4];
      dequantize(a[0], w[u].x, scale, offset);
      dequantize(a[1], w[u].y, scale, offset);
      dequantize(a[2], w[u].z, scale, offset);
      dequantize(a[3], w[u].w, scale, offset);
      if (k + DEPTH < count) {
        w[u] = load_once(w_tile);
        m[u] = load_meta(m_tile);
      }
      w_tile += TILES * 32;
      m_tile += TILES * 8;
      publish();
      __syncthreads();  // x of group k is there, and nobody reads that of k - 1 any more
      const unsigned long long b = descriptor(base + (k & 1) * (ROWS * 128));
      wgmma_begin();
#pragma unroll
      for (int i = 0; i < 4; ++i) wgmma(acc, a[i], b + 2 * i);  // 32 bytes further
      wgmma_end();
      put(k + 1);
      fetch(k + 2);
      wgmma_wait();  // the tensor cores work for other warp groups while this one unpacks
    }
  }

#if SWIGLU
  // Tiles alternate gate, up: the activation needs no kernel of its own.
  typedef float Ups[ROWS][16];
  Ups* ups = (Ups*)staged;
  __syncthreads();  // nobody reads x any more
  if (warp & 1)
#pragma unroll
    for (int i = 0; i < 4 * EIGHTS; ++i) ups[warp / 2][i / 4 * 8 + 2 * t + (i & 1)][g + (i & 2) * 4] = acc[i];
  __syncthreads();
  if ((warp & 1) || tile != loaded) return;
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; ++i) {
    const int r = i / 4 * 8 + 2 * t + (i & 1), c = g + (i & 2) * 4;
    const float y = acc[i] / (1.f + __expf(-acc[i])) * ups[warp / 2][r][c];
    if (r < rows) ((unsigned short*)out)[(long long)(first_row + r) * (n / 2) + tile / 2 * 16 + c] = to_bf16(y);
  }
#else
  if (tile != loaded) return;
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; ++i) {
    const int r = i / 4 * 8 + 2 * t + (i & 1), c = g + (i & 2) * 4;
    if (r < rows) ((float*)out)[((long long)blockIdx.y * all_rows + first_row + r) * n + tile * 16 + c] = acc[i];
  }
#endif
}
