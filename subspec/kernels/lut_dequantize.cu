// Dequantized weights of HIGGS, rotated back: bfloat16 with the very bits of offload/intervals.py (rebuild), from the
// packed order of lut.cu, written where codec.cu then puts the exact weights.
//
// Compiled behind codec.cu with LAYOUT 0, which gives it the float32 operations of one rounding (and HOST_TEST, under
// which the same functions run as plain C++). One block of threads takes 8 rows of a Linear and one block of the
// rotation: a warp has 64 inputs, a thread 16 neighbouring inputs of one row, as they lie in a lane's words. The
// butterfly's passes over distances 1 to 8 stay in the thread, 16 and 32 go to its neighbours in the row, the others
// through shared memory, after which a thread has the same places of every warp.
//
// BITS (per weight) and STEPS (of 64 inputs, that are rotated together) are set by the host.

#define ENTRIES (1 << (2 * BITS))
#define PLACES (16 / STEPS)  // that a thread finishes, of every step
// 16 values take the room of 20, and rows are half of the banks apart: what a quarter of a warp stores together collides
// in no bank.
#define ROW (STEPS * 80 + (STEPS > 1 ? 16 : 0))

struct alignas(16) Float4 { float x, y, z, w; };

#ifdef HOST_TEST
static inline void store2(unsigned short* p, unsigned v) { memcpy(p, &v, 4); }
#else
DEVICE void store2(unsigned short* p, unsigned v) { *(unsigned*)p = v; }
#endif

DEVICE int shared_place(int row, int column) { return row * ROW + column + (column >> 4) * 4; }

DEVICE unsigned to_bfloat16(float f) {
  const unsigned bits = as_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;  // rounding could turn a NaN into something else
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Inputs 64 step + 16 t .. + 15 of a row of the fused weight, scaled.
// words: [blocks][steps][tiles][32 lanes][4], with BITS < 4 [..][BITS][32 lanes]; scale: half [blocks][groups][8][tiles][2].
DEVICE void look_up(float (&v)[16], const unsigned* words, const unsigned short* scale, const unsigned* table,
                    int fused, int step, int t, int steps, int tiles, int group_steps) {
  const int tile = (fused >> 4) % tiles, h = (fused >> 3) & 1, g = fused & 7, lane = g * 4 + t;
  const long long block = (fused >> 4) / tiles, groups = steps / group_steps;
  const float factor = half_to_float(scale[(((block * groups + step / group_steps) * 8 + g) * tiles + tile) * 2 + h]);
  const unsigned* own = words + ((block * steps + step) * tiles + tile) * (32 * BITS);
#if BITS == 4
  const Word4 word = load4(own + lane * 4);
  const unsigned w[4] = {word.x, word.y, word.z, word.w};
#else
  unsigned w[BITS];
#pragma unroll
  for (int i = 0; i < BITS; ++i) w[i] = own[i * 32 + lane];
#endif
#pragma unroll
  for (int q = 0; q < 8; ++q) {  // a lane has the pairs of rows g and g + 8 in turn
#if BITS == 4
    const unsigned pair = (w[q / 2] >> (16 * (q & 1) + 8 * h)) & 255u;
#else
    unsigned pair = (w[q / 4] >> (8 * (q & 3) + 4 * h)) & 15u;
#if BITS == 3
    pair |= ((w[2] >> (4 * q + 2 * h)) & 3u) << 4;
#endif
#endif
    const unsigned both = table[pair];
    v[2 * q] = mul(as_float(both << 16), factor);
    v[2 * q + 1] = mul(as_float(both & 0xffff0000u), factor);
  }
}

DEVICE void within(float (&v)[16]) {  // distances 1 to 8
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (!(i & distance)) {
        const float a = v[i], b = v[i + distance];
        v[i] = add(a, b);
        v[i + distance] = add(a, -b);
      }
}

DEVICE float across(float own, float other, bool second) {  // of a pair, one in each of two threads
  return second ? add(other, -own) : add(own, other);
}

DEVICE void put(float* shared, const float (&v)[16], int row, int step, int t) {
  Float4* to = (Float4*)(shared + shared_place(row, 64 * step + 16 * t));
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = Float4{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
}

// Distances from 64 on, the factor, the sign, the rounding. rows: of the Linear, whose inputs (columns) begin at origin.
DEVICE void finish(const float* shared, const float* signs, unsigned short* out, int thread, int first_row, int rows,
                   int origin, int columns, float factor) {
  const int row = thread * PLACES / 64, place = thread * PLACES % 64;
  if (first_row + row >= rows) return;
  float v[STEPS][PLACES];
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int i = 0; i < PLACES; ++i) v[s][i] = shared[shared_place(row, 64 * s + place + i)];
#pragma unroll
  for (int distance = 1; distance < STEPS; distance *= 2)
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      if (!(s & distance))
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
          const float a = v[s][i], b = v[s + distance][i];
          v[s][i] = add(a, b);
          v[s + distance][i] = add(a, -b);
        }
  unsigned short* own = out + (long long)(first_row + row) * columns;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = origin + 64 * s + place;
    unsigned w[PLACES];
#pragma unroll
    for (int i = 0; i < PLACES; ++i) w[i] = to_bfloat16(mul(mul(v[s][i], factor), signs[column + i]));
    if (PLACES > 1 && columns % 2 == 0) {
#pragma unroll
      for (int i = 0; i + 1 < PLACES; i += 2)
        if (column + i < columns) store2(own + column + i, w[i] | w[i + 1] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < PLACES; ++i)
        if (column + i < columns) own[column + i] = (unsigned short)w[i];
    }
  }
}

DEVICE int fused_row(int row, int row_offset, int interleave) {
  return row_offset + (interleave ? (row >> 4) * 32 + (row & 15) : row);
}

#ifndef HOST_TEST  // the launcher passes integers as int and floats as double
extern "C" __global__ void __launch_bounds__(32 * STEPS) lut_dequantize(
    const unsigned* words, const unsigned short* scale, const unsigned* table, const float* signs, unsigned short* out,
    int rows, int columns, int steps, int tiles, int group_steps, int row_offset, int interleave, double factor) {
  __shared__ __align__(16) float shared[8 * ROW];
  __shared__ unsigned entries[ENTRIES];
  for (int e = threadIdx.x; e < ENTRIES; e += 32 * STEPS) entries[e] = table[e];
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, first_row = blockIdx.x * 8;
  const int row = min(first_row + (lane >> 2), rows - 1);  // all of a warp stay for its exchanges
  const int origin = blockIdx.y * STEPS;
  float v[16];
  look_up(v, words, scale, entries, fused_row(row, row_offset, interleave), origin + warp, t, steps, tiles, group_steps);
  within(v);
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = across(v[i], __shfl_xor_sync(~0u, v[i], mask), t & mask);
  put(shared, v, lane >> 2, warp, t);
  __syncthreads();
  finish(shared, signs, out, threadIdx.x, first_row, rows, origin * 64, columns, (float)factor);
}
#endif
