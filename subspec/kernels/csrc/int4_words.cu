// Shared by the kernels on 4-bit words (int4.cu, int4_wide.cu) and compiled in front of either: launches that overlap, loads
// of weights, and their integers. OVERLAP: the launch may overlap with the kernel before (launch.py says why that is safe).
// With HOST_TEST an emulation takes the place of device code.

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

