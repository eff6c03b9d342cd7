// Shared by the kernels for weights of integers (int4.cu, int4_rows.cu) and compiled between few_rows.cu and either:
// overlapping launches, loading and unpacking of the weights.
//
// A thread's share of an A operand is 8 weights: exactly one 32-bit word of nibbles. OR-ing a nibble into bfloat16 128.0
// gives 128 + q, exact, and the 128 joins the zero point. Scales are applied once per group to the sums, not to the weights:
//   sum_k s (q - z) x = s (sum_k (128 + q) x - (128 + z) sum_k x),
// where sum_k x comes from the same instruction with A = 1.
//
// OVERLAP: the launch may overlap with the kernel before (launch.py says why that is safe). Only weight and meta are
// touched before the wait: nothing writes them.

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

// The weights of one word: one A operand.
struct Unpacked {
  unsigned a[4];
};

__device__ __forceinline__ Unpacked unpacked(unsigned word) {
  return {{nibbles_on_128(word), nibbles_on_128(word >> 4), nibbles_on_128(word >> 8), nibbles_on_128(word >> 12)}};
}

__device__ __forceinline__ void mma_word(float (&d)[4], const Unpacked& w, unsigned b0, unsigned b1) {
  mma(d, w.a[0], w.a[1], w.a[2], w.a[3], b0, b1);
}

// Scales and zeros of weight rows g and g + 8 of a tile.
struct Scales {
  float low, low_zero, high, high_zero;
};

__device__ __forceinline__ Scales scales_of(const Word4& pairs, int tile) {
  const float2 low = half_pair(tile & 1 ? pairs.z : pairs.x), high = half_pair(tile & 1 ? pairs.w : pairs.y);
  return {low.x, low.y + 128.f, high.x, high.y + 128.f};
}

// acc += scale * (w - zero) x of one group of one tile, from d = (128 + w) x and the sums of x.
__device__ __forceinline__ void add_scaled(float (&acc)[4], const float (&d)[4], const Scales& s, float xs0, float xs1) {
  acc[0] += s.low * (d[0] - s.low_zero * xs0);
  acc[1] += s.low * (d[1] - s.low_zero * xs1);
  acc[2] += s.high * (d[2] - s.high_zero * xs0);
  acc[3] += s.high * (d[3] - s.high_zero * xs1);
}
