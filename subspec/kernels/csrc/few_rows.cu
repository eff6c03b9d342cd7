// Shared by the kernels for the few rows of a draft level (int4.cu, int4_wide.cu, codebook.cu) and compiled in front of either:
// launches that overlap, loads, the tensor-core instruction, words of 4-bit integers, and the sum over a block's warps. TILES,
// WARPS, EIGHTS, SWIGLU and OVERLAP are those of the kernel behind. OVERLAP: the launch may overlap with the kernel before
// (launch.py says why that is safe). With HOST_TEST an emulation takes the place of device code.

struct __align__(16) Word4 { unsigned x, y, z, w; };
struct __align__(8) Word2 { unsigned x, y; };

#ifndef HOST_TEST
__device__ __forceinline__ Word4 load(const Word4* p) {
  Word4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

#define MMA(name, type)                                                                                               \
  __device__ __forceinline__ void name(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,             \
                                       unsigned b0, unsigned b1) {                                                    \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                                \
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                       \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                              \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                      \
  }
MMA(mma, "bf16")
MMA(mma_half, "f16")

__device__ __forceinline__ unsigned short to_bf16(float v) {
  unsigned short r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}

__device__ __forceinline__ unsigned short to_half(float v) {  // no number becomes infinite
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v));
  return r;
}

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

__device__ __forceinline__ Word2 load_once(const Word2* p) {
  Word2 v;
  asm FIXED("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ Word4 load_once(const Word4* p) {  // weights are used once: keep them out of L1
  Word4 v;
  asm FIXED("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// value & MASK | BASE as the one instruction that it is. One of the constants has to lie in a register, and the compiler,
// left alone, spends a second instruction instead: 26 us of gate and up were 22 without those.
template <unsigned MASK, unsigned BASE>
__device__ __forceinline__ unsigned masked_on(unsigned value) {
  unsigned r, base;
  asm("mov.u32 %0, %1;" : "=r"(base) : "n"(BASE));
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(value), "n"(MASK), "r"(base));
  return r;
}

__device__ __forceinline__ float2 half_pair(unsigned v) {
  float2 f;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(f.x), "=f"(f.y) : "r"(v));
  return f;
}
#endif

// Of a word's eight nibbles those of register r, as a pair of half: 1024 + q for an even r, 1024 + 16 q for an odd one.
__device__ __forceinline__ unsigned nibbles_on_1024(unsigned word, int r) {
  const unsigned near = r < 2 ? word : word >> 8;
  return r & 1 ? masked_on<0x00F000F0u, 0x64006400u>(near) : masked_on<0x000F000Fu, 0x64006400u>(near);
}

// 256 + the zeros that a pair of half scales contains (group_scales.py).
__device__ __forceinline__ float2 zeros_on_256(unsigned scales) {
  return half_pair(masked_on<0x003F003Fu, 0x5C005C00u>(scales));
}

// The 16 bits that the kernel behind reads: half with HALF_OUT, else bfloat16.
__device__ __forceinline__ unsigned short to_reader(float v) {
#ifdef HALF_OUT
  return to_half(v);
#else
  return to_bf16(v);
#endif
}

typedef float Sums[TILES * 16][9];  // of a warp; 9: rows of 8 would collide in the banks

__device__ __forceinline__ void keep_sums(Sums& sums, const float (&acc)[TILES][4], int g, int t) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    sums[i * 16 + g][2 * t] = acc[i][0];
    sums[i * 16 + g][2 * t + 1] = acc[i][1];
    sums[i * 16 + g + 8][2 * t] = acc[i][2];
    sums[i * 16 + g + 8][2 * t + 1] = acc[i][3];
  }
}

// The sums of all warps over rows first .. first + 7 of x, for one block of rows of the weight: their activation, or one
// slice of the output.
__device__ __forceinline__ void write_sums(const Sums* sums, void* out, int first, int rows, int n, long long block,
                                           int slice) {
  const int count = min(8, rows - first);
#if SWIGLU
  // Tiles alternate gate, up: the activation needs no kernel of its own.
  for (int e = threadIdx.x; e < TILES * 8 * count; e += WARPS * 32) {
    const int r = e / (TILES * 8), c = e % (TILES * 8);
    const int gate_row = (c / 16) * 32 + c % 16;
    float gate = 0.f, up = 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) { gate += sums[k][gate_row][r]; up += sums[k][gate_row + 16][r]; }
    const float y = gate / (1.f + __expf(-gate)) * up;
    ((unsigned short*)out)[(long long)(first + r) * (n / 2) + block * TILES * 8 + c] = to_reader(y);
  }
#else
  for (int e = threadIdx.x; e < TILES * 16 * count; e += WARPS * 32) {
    const int r = e / (TILES * 16), c = e % (TILES * 16);
    float y = 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) y += sums[k][c][r];
    ((float*)out)[((long long)slice * rows + first + r) * n + block * TILES * 16 + c] = y;
  }
#endif
}

// The same for 8 * EIGHTS rows of x.
__device__ __forceinline__ void write_all_sums(Sums* sums, const float (&acc)[EIGHTS][TILES][4], void* out, int first,
                                               int rows, int n, long long block, int slice) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int e = 0; e < EIGHTS; ++e) {
    if (e) __syncthreads();  // the eight rows before are written
    keep_sums(sums[warp], acc[e], lane >> 2, lane & 3);
    __syncthreads();
    if (first + 8 * e < rows) write_sums(sums, out, first + 8 * e, rows, n, block, slice);
  }
}
