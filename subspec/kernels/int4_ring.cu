// int4.cu's arithmetic in blocks that live as long as the kernel. Compiled behind it, with RING.
//
// A block of int4_linear loads nothing in its first and last microsecond, and lives for a few. Here every
// multiprocessor has as many blocks as it holds, and a block walks over an equal share of the weight, taken as one run
// of units, [block of rows][group]: as the words lie in memory. Eight or sixteen warps take the units in turn. One
// warp more copies them ahead, a unit for each warp with two instructions, into a ring in shared memory; it does not
// stop where a block of rows ends, so while sums are added up and written, the weights behind are on their way.
//
// Shares begin anywhere inside a block of rows, which thus may be cut into pieces. The first piece's sums are slice 0 of
// the output, the next one's slice 1 (its reader adds up); what a block of rows has not, is written as zero. With
// SWIGLU, which needs whole sums, shares are whole blocks of rows.
//
// Hand-over (PTX ISA, "mbarrier"): a slot is full when the bytes that were announced have come, and empty when the
// warps that had a unit in it have read it. The copying warp waits for no other kernel: nothing writes weights.
//
// With X_SHARED all of x is copied into shared memory first, its rows 16 bytes further apart than in memory, which
// spreads them over the banks. Else its values come through L1, one unit ahead: for long rows, or short shares.

#ifndef HOST_TEST
typedef unsigned long long Barrier;

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void start_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void publish_barriers() {  // to the copies' part of the hardware
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}"
      :: "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void announce(Barrier* barrier, unsigned bytes) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}"
      :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(Barrier* barrier, unsigned parity) {  // until that phase has ended
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void sync_readers() {  // of all warps but the one that copies
  asm volatile("bar.sync 1, %0;" :: "n"(WARPS * 32) : "memory");
}

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

struct Slot {
  Word4 words[WARPS][TILES][32];
  Word4 meta[WARPS][8][TILES / 2];
};

// Shared memory: slots, x, the sums of all warps, barriers (int4.py: Ring.stages).
extern "C" __global__ void __launch_bounds__(WARPS * 32 + 32, BLOCKS) int4_ring(
    const Word4* __restrict__ weight,  // [blocks of rows][groups][TILES][32 lanes] of 4 words
    const Word4* __restrict__ meta,    // [blocks of rows][groups][8][TILES * 2] pairs of half: scale, zero
    const Word4* __restrict__ x,       // bfloat16 [rows][groups * 64]
    void* __restrict__ out,            // float [slices][rows][n], or bfloat16 [rows][n / 2] with SWIGLU
    int rows, int n, int groups, int slices, int stages) {
  release_next();
  DYNAMIC_SHARED(shared);
  Slot* ring = (Slot*)shared;
  unsigned char* x_copy = (unsigned char*)(ring + stages);
  const int x_stride = groups * 128 + 16;
  Sums* sums = (Sums*)(x_copy + (X_SHARED ? rows * x_stride : 0));
  Barrier* full = (Barrier*)(sums + WARPS);
  Barrier* empty = full + stages;
  Barrier* x_there = empty + stages;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  const long long grain = SWIGLU ? groups : 1;
  const long long grains = (long long)(n / (TILES * 16)) * (SWIGLU ? 1 : groups);
  const int begin = (int)(grains * blockIdx.x / gridDim.x * grain);
  const int end = (int)(grains * (blockIdx.x + 1) / gridDim.x * grain);

  if (threadIdx.x == WARPS * 32) {
    for (int i = 0; i < stages; ++i) {
      start_barrier(full + i, 1);
      start_barrier(empty + i, WARPS);
    }
    start_barrier(x_there, 1);
    publish_barriers();
  }
  __syncthreads();

  if (warp == WARPS) {
    if (lane) return;
    int stage = 0;
    unsigned parity = 1;  // the phase before the first one counts as ended: slots start empty
    for (int unit = begin; unit < end; unit += WARPS) {
      const int count = min(WARPS, end - unit);
      Slot& slot = ring[stage];
      wait(empty + stage, parity);
      announce(full + stage, count * (int)(sizeof(slot.words[0]) + sizeof(slot.meta[0])));
      copy(slot.words, weight + (long long)unit * TILES * 32, count * (int)sizeof(slot.words[0]), full + stage);
      copy(slot.meta, meta + (long long)unit * 8 * (TILES / 2), count * (int)sizeof(slot.meta[0]), full + stage);
      if (++stage == stages) { stage = 0; parity ^= 1; }
    }
    return;
  }

  const int g = lane >> 2, t = lane & 3;
  const Word4 nothing = {0u, 0u, 0u, 0u};
  Word4 xa = nothing, xb = nothing;
  int unit = begin + warp, block = begin / groups, stage = 0;
  int group = unit - block * groups;  // of `unit`, counted from the block of rows that is worked on
  unsigned parity = 0;
  wait_for_previous();
#if X_SHARED
  const Word4* x_row = (const Word4*)(x_copy + g * x_stride) + t * 2;
  if (threadIdx.x == 0) {
    announce(x_there, rows * groups * 128);
    for (int r = 0; r < rows; ++r) copy(x_copy + r * x_stride, x + (long long)r * groups * 8, groups * 128, x_there);
  }
  wait(x_there, 0);
#else
  const Word4* x_row = x + (long long)g * groups * 8 + t * 2;
  if (unit < end && g < rows) {
    xa = load(x_row + group % groups * 8);
    xb = load(x_row + group % groups * 8 + 1);
  }
#endif
  for (; block * groups < end; ++block, group -= groups) {
    float acc[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
    const int stop = min((block + 1) * groups, end);
    while (unit < stop) {
#if X_SHARED
      if (g < rows) { xa = x_row[group * 8]; xb = x_row[group * 8 + 1]; }
#else
      Word4 xa_next = nothing, xb_next = nothing;
      int next = group + WARPS;
      while (next >= groups) next -= groups;
      if (unit + WARPS < end && g < rows) {  // x flies while this unit is computed
        xa_next = load(x_row + next * 8);
        xb_next = load(x_row + next * 8 + 1);
      }
#endif
      const Slot& slot = ring[stage];
      wait(full + stage, parity);
      Word4 w[TILES], m[TILES / 2];
#pragma unroll
      for (int i = 0; i < TILES; ++i) w[i] = slot.words[warp][i][lane];
#pragma unroll
      for (int i = 0; i < TILES / 2; ++i) m[i] = slot.meta[warp][g][i];
      add_group(acc, w, m, xa, xb);
      __syncwarp();
      if (lane == 0) arrive(empty + stage);
      if (++stage == stages) { stage = 0; parity ^= 1; }
#if !X_SHARED
      xa = xa_next;
      xb = xb_next;
#endif
      unit += WARPS;
      group += WARPS;
    }
    // This block's number among those that have a piece of these rows: the first one holds unit block * groups.
    const int first = SWIGLU ? blockIdx.x : (int)((((long long)block * groups + 1) * gridDim.x - 1) / grains);
    int slice = blockIdx.x - first;
    sync_readers();  // the sums before have been read
    keep_sums(sums[warp], acc, g, t);
    sync_readers();
    write_sums(sums, out, rows, n, block, slice);
#if !SWIGLU
    if (stop == (block + 1) * groups)
      while (++slice < slices)
        for (int e = threadIdx.x; e < TILES * 16 * rows; e += WARPS * 32)
          ((float*)out)[((long long)slice * rows + e / (TILES * 16)) * n + block * TILES * 16 + e % (TILES * 16)] = 0.f;
#endif
  }
}
