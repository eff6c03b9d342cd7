// Rebuild exact bfloat16 weights from their code and the substitute that is on the device anyway; the format is
// described in offload/codec.py, and its torch decoder is what this file has to agree with, bit for bit.
//
// One thread decodes one chunk of 512 weights, which follow each other in the row-major matrix. All of its branches are
// selections (a code is cell, rest or 16 raw bits, all read from the same 64-bit window), so a warp does not diverge
// but for the refill of the window. Every arithmetic operation is one float32 operation with one rounding: contraction
// into fused multiply-adds would give other intervals than the encoder's.
//
// LAYOUT says how the substitute lies in memory:
//   1  the draft kernel's own 4-bit order (int4.cu): words, and half pairs of scale and zero; group 64. The rows of a
//      Linear start at row_offset of the fused weight; with interleave they alternate 16 by 16 with another's.
//   2  the Triton kernel's order (wq.py), for other bits and groups: word j of a row holds the inputs j, j + S, ... of
//      S words; outputs are neighbours. Reads are scattered, as neither order can suit both kernels.
//
// The file also compiles as plain C++ (HOST_TEST), so that its arithmetic is tested where there is no GPU.

#ifdef HOST_TEST
#include <cmath>
#include <cstring>
#define DEVICE static inline
static inline float mul(float a, float b) { volatile float r = a * b; return r; }
static inline float add(float a, float b) { volatile float r = a + b; return r; }
static inline int leading(unsigned v) { return v ? __builtin_clz(v) : 32; }
static inline float as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static inline unsigned as_bits(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
static inline float half_to_float(unsigned h) {
  const unsigned e = (h >> 10) & 31, m = h & 1023, s = (h & 0x8000u) << 16;
  if (e == 31) return as_float(s | 0x7f800000u | (m << 13));
  if (e == 0) { const float f = m * 0x1p-24f; return s ? -f : f; }
  return as_float(s | ((e + 112) << 23) | (m << 13));
}
struct Word4 { unsigned x, y, z, w; };
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
DEVICE int leading(unsigned v) { return __clz(v); }
DEVICE float as_float(unsigned v) { return __uint_as_float(v); }
DEVICE unsigned as_bits(float f) { return __float_as_uint(f); }
DEVICE float half_to_float(unsigned h) {
  float f;
  asm("{.reg .f16 v; mov.b16 v, %1; cvt.f32.f16 %0, v;}" : "=f"(f) : "h"((unsigned short)h));
  return f;
}
struct Word4 { unsigned x, y, z, w; };
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

#define CHUNK 512

struct Bits {  // a window on the stream, at least 32 bits of it valid before each weight
  const unsigned* next;
  unsigned long long window;
  int left;
};

DEVICE void open_at(Bits& bits, const unsigned* from) {
  bits.window = from[0] | ((unsigned long long)from[1] << 32);
  bits.next = from + 2;
  bits.left = 64;
}

// centred (known when compiling): symbols count from the middle cell to either side, not from the first on.
DEVICE unsigned decode_between(Bits& bits, float low, float high, bool centred) {
  const float larger = fmaxf(fabsf(low), fabsf(high));
  const int exponent = (int)(as_bits(larger) >> 23) - 127;
  // NaN: no comparison holds. fmaxf drops one NaN, but then low < high fails.
  const bool usable = low < high && exponent >= -110 && exponent <= 126;
  const float per_cell = as_float((unsigned)(7 + 127 - exponent) << 23);
  const int first = usable ? (int)floorf(mul(low, per_cell)) : 0;
  const int count = usable ? (int)floorf(mul(high, per_cell)) - first + 1 : 0;
  const unsigned symbols = (unsigned)count + 1u;
  const int k = 31 - leading(symbols);
  const unsigned shorter = (2u << k) - symbols;

  if (bits.left < 32) {
    bits.window |= (unsigned long long)*bits.next++ << bits.left;
    bits.left += 32;
  }
  unsigned low_bits = (unsigned)bits.window;
  unsigned symbol = low_bits & ((1u << k) - 1u);
  const bool longer = symbol >= shorter;
  symbol = longer ? 2u * symbol + ((low_bits >> k) & 1u) - shorter : symbol;
  const int used = k + (longer ? 1 : 0);
  low_bits = (unsigned)(bits.window >> used);

  const bool escape = symbol == (unsigned)count;
  const int number = centred ? first + (count >> 1) + ((int)(symbol >> 1) ^ -(int)(symbol & 1u)) : first + (int)symbol;
  const bool negative = number < 0;
  const unsigned magnitude = (unsigned)(negative ? -1 - number : number);
  const int top = 31 - leading(magnitude | (magnitude == 0u));
  const int rest = magnitude ? 7 - top : 0;
  const unsigned mantissa = ((magnitude << rest) | (low_bits & ((1u << rest) - 1u))) & 127u;
  unsigned value = magnitude ? ((unsigned)(top + exponent - 7 + 127) << 7) | mantissa : 0u;
  value |= negative ? 0x8000u : 0u;
  value = escape ? low_bits & 0xffffu : value;
  const int taken = used + (escape ? 16 : rest);
  bits.window >>= taken;
  bits.left -= taken;
  return value;
}

DEVICE unsigned decode_one(Bits& bits, int q, float scale, float zero, float half) {
  const float centre = add((float)q, -zero);
  return decode_between(bits, mul(add(centre, -half), scale), mul(add(centre, half), scale), false);
}

#if LAYOUT == 1

// words: [blocks][groups][tiles][32][4], meta: [blocks][groups][8][2 * tiles] pairs of half (int4.py).
DEVICE void decode_chunk(const unsigned* starts, const unsigned* stream, const unsigned* words, const unsigned* meta,
                         unsigned short* out, long long total, int groups, int tiles, int row_offset,
                         int interleave, float half, long long chunk) {
  Bits bits;
  open_at(bits, stream + starts[chunk]);
  const long long begin = chunk * CHUNK;
  int row = (int)(begin / (groups * 64)), group = (int)(begin / 64 - (long long)row * groups);
  const int steps = (int)(total - begin < CHUNK ? (total - begin) / 64 : CHUNK / 64);
  for (int step = 0; step < steps; ++step) {
    const int fused = row_offset + (interleave ? (row >> 4) * 32 + (row & 15) : row);
    const int tile = (fused >> 4) % tiles, block = (fused >> 4) / tiles, h = (fused >> 3) & 1, g = fused & 7;
    const long long cell = (long long)block * groups + group;
    const unsigned pair = meta[(cell * 8 + g) * 2 * tiles + 2 * tile + h];
    const float scale = half_to_float(pair & 0xffffu), zero = half_to_float(pair >> 16);
    const unsigned* lanes = words + ((cell * tiles + tile) * 32 + g * 4) * 4;
    unsigned short* to = out + begin + step * 64;
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
      const Word4 word = load4(lanes + 4 * t);
#pragma unroll
      for (int pack = 0; pack < 2; ++pack) {
        unsigned v[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned w = (pack ? (i ? word.w : word.z) : (i ? word.y : word.x)) >> (4 * h);
          v[4 * i] = decode_one(bits, w & 15, scale, zero, half);
          v[4 * i + 1] = decode_one(bits, (w >> 16) & 15, scale, zero, half);
          v[4 * i + 2] = decode_one(bits, (w >> 8) & 15, scale, zero, half);
          v[4 * i + 3] = decode_one(bits, (w >> 24) & 15, scale, zero, half);
        }
        store4(to + t * 16 + pack * 8, v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
      }
    }
    if (++group == groups) { group = 0; ++row; }
  }
}

#ifndef HOST_TEST  // the launcher passes integers as int and floats as double
extern "C" __global__ void __launch_bounds__(128) codec_decode(
    const unsigned* starts, const unsigned* stream, const unsigned* words, const unsigned* meta, unsigned short* out,
    int total, int groups, int tiles, int row_offset, int interleave, double half) {
  const long long chunk = (long long)blockIdx.x * 128 + threadIdx.x;
  if (chunk * CHUNK < total)
    decode_chunk(starts, stream, words, meta, out, total, groups, tiles, row_offset, interleave, (float)half, chunk);
}
#endif

#elif LAYOUT == 2

// words: [columns / per_word][rows], high: [columns / 16][rows] (3 bits), meta: [2][columns / group][rows] of half.
DEVICE void decode_chunk(const unsigned* starts, const unsigned* stream, const unsigned* words,
                         const unsigned short* high, const unsigned short* meta, unsigned short* out, long long total,
                         int columns, int rows, int width, int group, int row_offset, int interleave, float half,
                         long long chunk) {
  Bits bits;
  open_at(bits, stream + starts[chunk]);
  const long long begin = chunk * CHUNK;
  const long long end = begin + CHUNK < total ? begin + CHUNK : total;
  const int low = width == 3 ? 2 : width, per_word = 32 / low, run = columns / per_word;
  const long long zeros = (long long)(columns / group) * rows;
  int row = (int)(begin / columns), column = (int)(begin - (long long)row * columns);
  int slot = column / run, word = column - slot * run;
  for (long long at = begin; at < end; ++at) {
    const int fused = row_offset + (interleave ? (row >> 4) * 32 + (row & 15) : row);
    const long long place = (long long)word * rows + fused;
    int q = (int)((words[place] >> (slot * low)) & ((1u << low) - 1u));
    if (width == 3) q |= ((high[place] >> slot) & 1) << 2;
    const long long scale = (long long)(column / group) * rows + fused;
    out[at] = (unsigned short)decode_one(bits, q, half_to_float(meta[scale]), half_to_float(meta[zeros + scale]), half);
    ++column;
    if (++word == run) { word = 0; ++slot; }
    if (column == columns) { column = 0; slot = 0; ++row; }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(128) codec_decode(
    const unsigned* starts, const unsigned* stream, const unsigned* words, const unsigned short* high,
    const unsigned short* meta, unsigned short* out, int total, int columns, int rows, int width, int group,
    int row_offset, int interleave, double half) {
  const long long chunk = (long long)blockIdx.x * 128 + threadIdx.x;
  if (chunk * CHUNK < total)
    decode_chunk(starts, stream, words, high, meta, out, total, columns, rows, width, group, row_offset, interleave,
                 (float)half, chunk);
}
#endif

#elif LAYOUT == 3

// scale: half [blocks][groups][8][tiles][2] (lut_mma.py); a step is 64 inputs, block_steps of them are rotated together
// and group_steps have one scale. Intervals reach unit * (sum of the scales of the weight's block's steps) to each side.
DEVICE void decode_chunk(const unsigned* starts, const unsigned* stream, const unsigned short* scale,
                         unsigned short* out, long long total, int columns, int groups, int tiles, int group_steps,
                         int block_steps, int row_offset, int interleave, float unit, long long chunk) {
  Bits bits;
  open_at(bits, stream + starts[chunk]);
  const long long begin = chunk * CHUNK, end = begin + CHUNK < total ? begin + CHUNK : total;
  int row = (int)(begin / columns), column = (int)(begin - (long long)row * columns);
  const int block = block_steps * 64;  // a power of two
  const bool wide = columns % 8 == 0;  // 16 bytes at a time; chunks begin at multiples of 8
  float reach = 0.f;
  for (long long at = begin; at < end;) {
    if (at == begin || (column & (block - 1)) == 0) {
      const int fused = row_offset + (interleave ? (row >> 4) * 32 + (row & 15) : row);
      const int tile = (fused >> 4) % tiles, h = (fused >> 3) & 1, g = fused & 7, step = (column & -block) >> 6;
      const unsigned short* own =
          scale + ((((long long)((fused >> 4) / tiles) * groups * 8 + g) * tiles + tile) * 2 + h);
      reach = half_to_float(own[(long long)(step / group_steps) * 16 * tiles]);
      for (int next = step + 1; next < step + block_steps; ++next)
        reach = add(reach, half_to_float(own[(long long)(next / group_steps) * 16 * tiles]));
      reach = mul(reach, unit);
    }
    if (wide) {
      const Word4 word = read4(out + at);
      const unsigned pairs[4] = {word.x, word.y, word.z, word.w};
      unsigned v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = as_float(i & 1 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
        v[i] = decode_between(bits, add(weight, -reach), add(weight, reach), true);
      }
      store4(out + at, v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
    } else {
      const float weight = as_float((unsigned)out[at] << 16);
      out[at] = (unsigned short)decode_between(bits, add(weight, -reach), add(weight, reach), true);
    }
    const int taken = wide ? 8 : 1;
    at += taken;
    column += taken;
    if (column == columns) { column = 0; ++row; }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(128) codec_decode(
    const unsigned* starts, const unsigned* stream, const unsigned short* scale, unsigned short* out, int total,
    int columns, int groups, int tiles, int group_steps, int block_steps, int row_offset, int interleave, double unit) {
  const long long chunk = (long long)blockIdx.x * 128 + threadIdx.x;
  if (chunk * CHUNK < total)
    decode_chunk(starts, stream, scale, out, total, columns, groups, tiles, group_steps, block_steps, row_offset,
                 interleave, (float)unit, chunk);
}
#endif

#endif
