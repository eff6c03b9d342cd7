// The product of int4.cu for up to 8 * EIGHTS rows of x per block of threads, by the instructions of a whole warp group
// (wgmma, compute capability 9.0 alone). With so many rows int4.cu is bound by x, which every block reads from the L2 cache
// for few weights, and by slower instructions of the tensor cores.
//
// A block has WARP_GROUPS groups of four warps and one more warp. A group multiplies four tiles of 16 weight rows, a tile
// per warp, with all rows of x: A comes from registers and has the layout of mma.m16n8k16, so that the words of int4.py
// are what a thread needs. B is x in shared memory, a stage of 64 inputs by 8 * EIGHTS rows in the layout "K-major, 128-byte
// swizzle" (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"). The kernel that wrote x has put it into this
// layout (int4_wide.py: `in_tiles`), so one thread of the last warp brings a stage with one bulk copy, STAGES of them
// ahead. Barriers in shared memory count what has come and what is free; warps do not wait for each other.
//
// While one half of a stage is multiplied, the other half's weights are unpacked.
//
// Weights become half, s (q - z): q and s are exact, s z is rounded, and so is the result. int4.cu's float32 scales would
// make every group of inputs wait for the sums of the one before.
//
// TILES: of the packed weight. EIGHTS: 3, 4, 6 or 8. BLOCKS: that a multiprocessor has registers for. DEPTH: groups of
// weights in registers. TILED: write the activation as tiles for a kernel like this one. WARPS: 4 * WARP_GROUPS. One plane of
// 4 bits only. SWIGLU, OVERLAP and splits as in int4.cu.

#define ROWS (8 * EIGHTS)
#define STAGE_BYTES (ROWS * 128)
#define STAGES (EIGHTS < 5 ? 8 : 40 / EIGHTS)

__device__ __forceinline__ unsigned scaled(unsigned pair, unsigned scale, unsigned offset) {  // pairs of half
  unsigned r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(pair), "r"(scale), "r"(offset));
  return r;
}

__device__ __forceinline__ unsigned both(float v) {  // the same half twice
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(r) : "f"(v));
  return r;
}

// A word's integers of register r, exactly: (1024 + q) - 1024, or (1024 + 16 q) / 16 - 64.
__device__ __forceinline__ unsigned integers(unsigned word, int r) {
  const unsigned pair = nibbles_on_1024(word, r);
  return r & 1 ? scaled(pair, 0x2C002C00u, 0xD400D400u) : scaled(pair, 0x3C003C00u, 0xE400E400u);
}

// The weights of one word: the A operand of 16 inputs, rows g and g + 8 in turn.
__device__ __forceinline__ void dequantize(unsigned (&a)[4], unsigned word, const unsigned (&scale)[2],
                                           const unsigned (&offset)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = scaled(integers(word, i), scale[i & 1], offset[i & 1]);
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int RUNNING>  // products that may still run
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(RUNNING) : "memory");
}

// A K-major operand with 128-byte swizzle: eight rows of 128 bytes after another.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define SUMS4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SUMS8(i) SUMS4(i), SUMS4(i + 4)
#define WGMMA(n, sums, operands) \
  "{.reg .pred p; setp.ne.b32 p, 1, 0;\n\twgmma.mma_async.sync.aligned.m64n" n "k16.f32.f16.f16 {" sums "}, " operands \
  ", p, 1, 1, 0;}"
#define NAMES12 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11"
#define NAMES16 NAMES12 ",%12,%13,%14,%15"
#define NAMES24 NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23"

// acc += A x, 64 weight rows x 16 inputs x ROWS.
__device__ __forceinline__ void wgmma(float (&acc)[4 * EIGHTS], const unsigned (&a)[4], unsigned long long b) {
#if EIGHTS == 3
  asm volatile(WGMMA("24", NAMES12, "{%12,%13,%14,%15}, %16")
      : SUMS8(0), SUMS4(8)
#elif EIGHTS == 4
  asm volatile(WGMMA("32", NAMES16, "{%16,%17,%18,%19}, %20")
      : SUMS8(0), SUMS8(8)
#elif EIGHTS == 6
  asm volatile(WGMMA("48", NAMES24, "{%24,%25,%26,%27}, %28")
      : SUMS8(0), SUMS8(8), SUMS8(16)
#else
  asm volatile(WGMMA("64", NAMES24 ",%24,%25,%26,%27,%28,%29,%30,%31", "{%32,%33,%34,%35}, %36")
      : SUMS8(0), SUMS8(8), SUMS8(16), SUMS8(24)
#endif
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Barriers in shared memory. A phase ends when `count` threads have arrived and all expected bytes have come.
__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{.reg .pred p;\n\tAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@!p bra AGAIN;}"
      ::"r"(barrier), "r"(parity) : "memory");
}

// Arrives at `barrier`, whose phase ends when the stage has come.
__device__ __forceinline__ void copy_stage(unsigned to, const char* from, unsigned barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(STAGE_BYTES) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(to), "l"(from), "r"(STAGE_BYTES), "r"(barrier) : "memory");
}

__device__ __forceinline__ unsigned load_scales(const unsigned* p) {
  unsigned pair;
  asm FIXED("ld.global.nc.u32 %0, [%1];" : "=r"(pair) : "l"(p));
  return pair;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, BLOCKS) int4_wide_linear(
    const Word4* __restrict__ weight,  // as in int4.cu
    const unsigned* __restrict__ scales,
    const char* __restrict__ x,        // half [gridDim.z][groups][ROWS][64] in the order of int4_wide.py
    void* __restrict__ out,
    int all_rows, int n, int groups, int groups_per_split) {
  release_next();
  __shared__ __align__(1024) char staged[STAGES * STAGE_BYTES];
  __shared__ __align__(8) unsigned long long barriers[2 * STAGES];
  const unsigned base = (unsigned)__cvta_generic_to_shared(staged);
  const unsigned come = (unsigned)__cvta_generic_to_shared(barriers), free = come + 8 * STAGES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = blockIdx.y * groups_per_split, count = min(groups - first, groups_per_split);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(come + 8 * i, 1);
      barrier_init(free + 8 * i, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  if (warp == WARPS) {
    __syncthreads();
    wait_for_previous();
    if (lane) return;
    const char* from = x + ((long long)blockIdx.z * groups + first) * STAGE_BYTES;
    for (int k = 0; k < count; ++k, from += STAGE_BYTES) {
      const int stage = k % STAGES, round = k / STAGES;
      if (round) barrier_wait(free + 8 * stage, (round - 1) & 1);
      copy_stage(base + stage * STAGE_BYTES, from, come + 8 * stage);
    }
    return;
  }

  const int g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x * WARPS + warp;
  const int loaded = min(tile, n / 16 - 1);  // the last block may have tiles of no weight
  const Word4* w_tile = weight + (((long long)(loaded / TILES) * groups + first) * TILES + loaded % TILES) * 32 + lane;
  const unsigned* s_tile = scales + (((long long)(loaded / TILES) * groups + first) * 8 + g) * TILES + loaded % TILES;
  Word4 w[DEPTH];
  unsigned s[DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    if (i < count) {
      w[i] = load_once(w_tile);
      s[i] = load_scales(s_tile);
    }
    w_tile += TILES * 32;
    s_tile += TILES * 8;
  }
  __syncthreads();
  wait_for_previous();

  float acc[4 * EIGHTS];
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; ++i) acc[i] = 0.f;
  int stage = 0;
  unsigned parity = 0;
  for (int start = 0; start < count; start += DEPTH) {
#pragma unroll
    for (int u = 0; u < DEPTH; ++u) {
      const int k = start + u;
      if (k >= count) break;
      const float2 own = half_pair(s[u]), zero = zeros_on_256(s[u]);
      const unsigned scale[2] = {both(own.x), both(own.y)};
      const unsigned offset[2] = {both(own.x * (256.f - zero.x)), both(own.y * (256.f - zero.y))};
      unsigned a[4][4];
      dequantize(a[0], w[u].x, scale, offset);
      dequantize(a[1], w[u].y, scale, offset);
      const unsigned long long b = descriptor(base + stage * STAGE_BYTES);
      barrier_wait(come + 8 * stage, parity);
      wgmma_begin();
      wgmma(acc, a[0], b);
      wgmma(acc, a[1], b + 2);  // 32 bytes further
      wgmma_end();
      wgmma_wait<1>();  // the stage before has been multiplied
      if (k && lane == 0) barrier_arrive(free + 8 * (stage ? stage - 1 : STAGES - 1));
      dequantize(a[2], w[u].z, scale, offset);
      dequantize(a[3], w[u].w, scale, offset);
      if (k + DEPTH < count) {
        w[u] = load_once(w_tile);
        s[u] = load_scales(s_tile);
      }
      w_tile += TILES * 32;
      s_tile += TILES * 8;
      wgmma_begin();
      wgmma(acc, a[2], b + 4);
      wgmma(acc, a[3], b + 6);
      wgmma_end();
      wgmma_wait<1>();
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
  wgmma_wait<0>();

#if SWIGLU
  // Tiles alternate gate, up: the activation needs no kernel of its own.
  typedef float Ups[ROWS][16];
  Ups* ups = (Ups*)staged;
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");  // nobody reads x any more
  if (warp & 1)
#pragma unroll
    for (int i = 0; i < 4 * EIGHTS; ++i) ups[warp / 2][i / 4 * 8 + 2 * t + (i & 1)][g + (i & 2) * 4] = acc[i];
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
#endif
  if (tile != loaded) return;
  const int first_row = blockIdx.z * ROWS, rows = min(all_rows - first_row, ROWS);
#if SWIGLU
  if (warp & 1) return;
  unsigned short* to = (unsigned short*)out;
#if TILED  // column c of sixteen is input 16 (tile / 2) + c of the next kernel
  to += ((long long)blockIdx.z * (n / 128) + tile / 8) * ROWS * 64;
#else
  to += (long long)first_row * (n / 2) + tile / 2 * 16;
#endif
#endif
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; ++i) {
    const int r = i / 4 * 8 + 2 * t + (i & 1), c = g + (i & 2) * 4;
    if (r >= rows) continue;
#if SWIGLU
    const float y = acc[i] / (1.f + __expf(-acc[i])) * ups[warp / 2][r][c];
#if TILED
    to[r * 64 + ((c >> 1 ^ r & 7) * 4 + (tile / 2 & 3)) * 2 + (c & 1)] = to_reader(y);
#else
    to[(long long)r * (n / 2) + c] = to_reader(y);
#endif
#else
    ((float*)out)[((long long)blockIdx.y * all_rows + first_row + r) * n + tile * 16 + c] = acc[i];
#endif
  }
}
