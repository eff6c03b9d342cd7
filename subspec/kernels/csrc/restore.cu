// Restore exact bfloat16 weights from their code and the quantized weight on the device: the common part of the kernels
// for the kinds of quantized weights. codec/format.py describes the code; this file has to agree with its torch
// reference bit for bit.
//
// Compiled in front of restore_integers.cu (QuantizedIntegers in the order of int4.cu), restore_codebook.cu
// (QuantizedPairs in the order of codebook.cu) or codebook_dequantize.cu.
//
// One thread restores one chunk of CHUNK weights (set by the host), which are neighbours in the row-major matrix; one
// launch restores all Linears of a layer, so that the small ones do not leave the device idle. Every arithmetic operation
// is one float32 operation with one rounding: contraction into fused multiply-adds would give other intervals than the
// encoder's.
//
// An interval determines how its code is read (Entry). Where the quantized weight has few levels, entries are computed
// once per level and group, and looked up in shared memory. Integer operations bound the rest: a device does half as many
// of them per cycle as of float32's. So cells are numbered in float32, exactly, and their numbers are scaled by one
// product. Escapes and zeros, one weight in a thousand, are treated apart.
//
// The file also compiles as plain C++ (HOST_TEST), so that its arithmetic is tested where there is no GPU.

#ifdef HOST_TEST
#include <cmath>
#include <cstring>
#define DEVICE static inline
static inline float mul(float a, float b) { volatile float r = a * b; return r; }
static inline float add(float a, float b) { volatile float r = a + b; return r; }
static inline float floor_of(float v) { return floorf(v); }
static inline unsigned ones(unsigned first, unsigned count) { return (unsigned)((1ull << (count & 31)) - 1) << first; }
static inline unsigned upper_halves(unsigned a, unsigned b) { return a >> 16 | (b & 0xffff0000u); }
static inline unsigned funnel(unsigned low, unsigned high, unsigned by) {
  return (unsigned)((low | (unsigned long long)high << 32) >> (by & 31));
}
static inline float as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static inline unsigned as_bits(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static inline float half_to_float(unsigned h) {
  const unsigned e = (h >> 10) & 31, m = h & 1023, s = (h & 0x8000u) << 16;
  if (e == 31) return as_float(s | 0x7f800000u | (m << 13));
  if (e == 0) { const float f = m * 0x1p-24f; return s ? -f : f; }
  return as_float(s | ((e + 112) << 23) | (m << 13));
}
struct alignas(16) Word4 { unsigned x, y, z, w; };
static inline void advance_if(unsigned full, unsigned* words, const unsigned*& next) {
  if (!full) return;
  words[0] = words[1];
  words[1] = words[2];
  words[2] = *next++;
}
static inline unsigned load1(const unsigned* p) { return *p; }
static inline unsigned load_half(const unsigned short* p) { return *p; }
static inline Word4 load4(const unsigned* p) { return {p[0], p[1], p[2], p[3]}; }
static inline Word4 read4(const unsigned short* p) {
  Word4 v;
  memcpy(&v, p, 16);
  return v;
}
static inline void store4(unsigned short* p, unsigned a, unsigned b, unsigned c, unsigned d) {
  const unsigned v[4] = {a, b, c, d};
  memcpy(p, v, 16);
}
#else
#define DEVICE __device__ __forceinline__
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
// Of numbers below 2**22.
DEVICE float floor_of(float v) { return __fadd_rn(__fadd_rd(v, 12582912.0f), -12582912.0f); }
DEVICE unsigned ones(unsigned first, unsigned count) {
  unsigned v;
  asm("bmsk.wrap.b32 %0, %1, %2;" : "=r"(v) : "r"(first), "r"(count));
  return v;
}
DEVICE unsigned upper_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }
DEVICE unsigned funnel(unsigned low, unsigned high, unsigned by) { return __funnelshift_r(low, high, by); }
DEVICE float as_float(unsigned v) { return __uint_as_float(v); }
DEVICE unsigned as_bits(float f) { return __float_as_uint(f); }
DEVICE float half_to_float(unsigned h) {
  float f;
  asm("{.reg .f16 v; mov.b16 v, %1; cvt.f32.f16 %0, v;}" : "=f"(f) : "h"((unsigned short)h));
  return f;
}
struct __align__(16) Word4 { unsigned x, y, z, w; };
// The loaded word straight into its register: by way of another one it would be waited for long before it is needed.
DEVICE void advance_if(unsigned full, unsigned* words, const unsigned*& next) {
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %4, 0; @p mov.b32 %0, %1; @p mov.b32 %1, %2; @p ld.global.nc.u32 %2, [%3]; "
      "mad.wide.u32 %3, %4, 4, %3;}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+l"(next)
      : "r"(full));
}
DEVICE unsigned load1(const unsigned* p) {
  unsigned v;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE unsigned load_half(const unsigned short* p) {
  unsigned short v;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
DEVICE Word4 load4(const unsigned* p) {
  Word4 v;
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE Word4 read4(const unsigned short* p) {  // of memory that this kernel writes, too
  Word4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE void store4(unsigned short* p, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#endif

#define THREADS 64
#define STRIDE THREADS  // each thread has a column of the table in shared memory: no two threads meet in a bank

struct Bits {  // the word at hand, the next one, and the one after it, which is on its way
  const unsigned* next;
  unsigned words[3];
  unsigned at;  // of the first word's bits, below 32
};

DEVICE void open_at(Bits& bits, const unsigned* from) {
  bits.words[0] = from[0];
  bits.words[1] = from[1];
  bits.words[2] = from[2];
  bits.next = from + 3;
  bits.at = 0;
}

// The next 32 bits.
DEVICE unsigned peek(const Bits& bits) { return funnel(bits.words[0], bits.words[1], bits.at); }

DEVICE void skip(Bits& bits, unsigned count) {
  bits.at += count;
  advance_if(bits.at >> 5, bits.words, bits.next);
  bits.at &= 31u;
}

// The float of an integer from 0 to 2**23 - 1, exactly.
DEVICE float number_of(unsigned v) { return add(as_float(0x4b000000u | v), -8388608.0f); }

#define CELL 0.0078125f  // 2**-7: a cell's size over 2**E

// How an interval's code is read. form, from the lowest bit: 5 bits k, the shorter code's length; 8 bits how many of the
// 2**k codes are prefixes of two longer ones; 10 bits 0; 8 bits the exponent field of 2**E. As a float, form is 2**E and
// less than a thousandth of it. base: the first cell's number and a half, times CELL, minus 512. Both 0: all raw.
struct alignas(8) Entry { unsigned form; float base; };

// usable, known when compiling: the interval is not empty, and 2**E and the numbers of its cells are normal floats.
DEVICE Entry entry_of(float low, float high, bool usable = false) {
  const float larger = fmaxf(fabsf(low), fabsf(high));
  const unsigned field = as_bits(larger) >> 23;
  // NaN: no comparison holds. fmaxf drops one NaN, but then low < high fails.
  if (!usable && !(low < high && field >= 127 - 110 && field <= 127 + 126)) return {0u, 0.0f};
  const float per_cell = as_float((7 + 127 + 127 - field) << 23);
  const float first = floor_of(mul(low, per_cell)), last = floor_of(mul(high, per_cell));
  const unsigned symbols = as_bits(add(add(last, -first), 2.0f)) - 0x3f800000u;  // k, and the fraction of 2**k behind it
  const unsigned k = symbols >> 23, extra = (symbols & 0x7fffffu) >> (23 - k);
  return {(field << 23) | extra << 5 | k, add(mul(first, CELL), CELL / 2 - 512.0f)};
}

DEVICE Entry entry_at(float level, float scale, float zero, float half, bool usable = false) {
  const float centre = add(level, -zero);
  return entry_of(mul(add(centre, -half), scale), mul(add(centre, half), scale), usable);
}

DEVICE void fill(Entry* table, int levels, float scale, float zero, float half, bool usable = false) {
#pragma unroll 4
  for (int q = 0; q < levels; ++q) table[q * STRIDE] = entry_at((float)q, scale, zero, half, usable);
}

// The weight's bits in the upper half, anything in the lower.
// centred, known when compiling: symbols count from the middle cell to either side in turn, not from the first one on.
template <class Source>
DEVICE unsigned restore_one(Source& bits, Entry entry, bool centred = false) {
  const unsigned seen = peek(bits);  // no code is longer than 26 bits
  const unsigned k = entry.form & 31u, mask = ones(0, entry.form), extra = (entry.form >> 5) & 255u;
  const unsigned shorter = seen & mask;
  const unsigned is_longer = funnel(shorter + extra, 0, entry.form);  // 1: one bit more tells two symbols apart
  const unsigned after = funnel(seen, 0, entry.form), behind = funnel(after, 0, is_longer);
  const unsigned symbol = shorter + (after & is_longer) * extra;
  const unsigned cells = mask + extra;  // of the interval
  const unsigned aside = centred ? (cells >> 1) + ((symbol >> 1) ^ (0u - (symbol & 1u))) : symbol;
  // The cell's number and a half over 2**7; cells -1 - j and j are equally far from zero.
  const float place = add(as_float(0x44000000u + aside * 128u), entry.base);
  const unsigned size = as_bits(mul(place, as_float(entry.form)));
  unsigned rest = ~(as_bits(place) >> 23) & 7u;  // 7 - floor(log2 j); 0 for j = 0
  const unsigned free = ones(16, rest);
  unsigned value = ((behind << 16) & free) | (size & ~free);
  if (symbol == cells) {  // an escape
    value = behind << 16;
    rest = 16;
  } else if (fabsf(place) < CELL) {
    value = size & 0x80000000u;
  }
  skip(bits, k + is_longer + rest);
  return value;
}

// One Linear's share of a launch; codec/restore.py fills these in. Addresses are the device's; starts and stream are
// bytes behind the layer's first. block: inputs that are rotated together; group: inputs that share a scale.
struct Part {
  long long starts, stream, words, meta, out;
  long long total, columns, tiles, block, group, row_offset, interleave, half, first_block;
};

// Where a chunk's code begins.
DEVICE const unsigned* code_of(const Part& part, const unsigned char* flat, long long chunk) {
  return (const unsigned*)(flat + part.stream) + ((const unsigned*)(flat + part.starts))[chunk];
}

// The row of the fused weight that a row of the part is.
template <class Described>
DEVICE int fused_row(const Described& part, int row) {
  return (int)part.row_offset + (part.interleave ? (row >> 4) * 32 + (row & 15) : row);
}

// The part that a block of the launch works on (grouped_launch.py).
template <class Described>
DEVICE const Described& part_of(const Described* parts, int count, unsigned block) {
  int own = 0;
  while (own + 1 < count && parts[own + 1].first_block <= block) ++own;
  return parts[own];
}
