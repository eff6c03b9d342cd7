// Dequantized weights of HIGGS, rotated back: bfloat16 with the very bits of QuantizedPairs.rebuild, from the
// packed order of codebook.cu, written where restore_codebook.cu then puts the exact weights.
//
// Compiled behind restore.cu, which gives it the float32 operations of one rounding (and HOST_TEST, under which the
// same functions run as plain C++). One launch serves several Linears; a block of threads takes 8 rows and one block of
// the rotation: a warp has 64 inputs, a thread 16 neighbouring ones of a row, as they lie in a lane's words. The
// butterfly's passes over distances 1 to 8 stay in the thread, 16 and 32 go to its neighbours in the row, the others
// through shared memory, after which a thread has the same places of every warp.
//
// BITS (per weight) and STEPS (of 64 inputs, that are rotated together) are set by the host.

#define ENTRIES (1 << (2 * BITS))
#define INPUTS (64 * STEPS)
#define ROWS 8
#define PLACES (16 / STEPS)  // that a thread finishes, of every step
// 16 values take the room of 20, and rows are half of the banks apart: a quarter of a warp stores without conflicts.
#define ROW_STRIDE (STEPS * 80 + (STEPS > 1 ? 16 : 0))

struct alignas(16) Float4 { float x, y, z, w; };

#ifdef HOST_TEST
static inline void store2(unsigned short* p, unsigned v) { memcpy(p, &v, 4); }
#else
DEVICE void store2(unsigned short* p, unsigned v) { *(unsigned*)p = v; }
#endif

DEVICE int shared_place(int row, int column) { return row * ROW_STRIDE + column + (column >> 4) * 4; }

DEVICE unsigned to_bfloat16(float f) {
  const unsigned bits = as_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;  // rounding could turn a NaN into something else
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// One Linear's share of a launch; codec/codebook_dequantize.py fills these in. Addresses are the device's.
struct Rotated {
  long long words, scale, table, signs, out;
  long long rows, columns, tiles, group_steps, row_offset, interleave, factor, first_block;
};

// Where a block of threads works: rows from first_row on, steps from origin on.
struct Site { int first_row, origin; };

DEVICE Site site_of(const Rotated& part, int block) {
  const int blocks = (int)(part.columns + INPUTS - 1) / INPUTS;  // of a row
  return {block / blocks * ROWS, block % blocks * STEPS};
}

// A thread's 16 scaled grid values; table: the pairs, in shared memory. Behind the last row that one is repeated, because
// all threads of a warp take part in its exchanges.
// words: [blocks][steps][tiles][32 lanes][4], with BITS < 4 [..][BITS][32 lanes];
// scale: half [blocks][groups][8][tiles][2].
DEVICE void look_up(float (&v)[16], const Rotated& part, const unsigned* table, Site site, int thread) {
  const int row = site.first_row + ((thread & 31) >> 2), last = (int)part.rows - 1, own_row = row < last ? row : last;
  const int fused = fused_row(part, own_row);
  const int step = site.origin + (thread >> 5), steps = (int)(part.columns + 63) / 64;
  const int tiles = (int)part.tiles, group_steps = (int)part.group_steps;
  const int tile = (fused >> 4) % tiles, h = (fused >> 3) & 1, g = fused & 7, lane = g * 4 + (thread & 3);
  const long long block = (fused >> 4) / tiles, groups = steps / group_steps;
  const unsigned short* scale = (const unsigned short*)part.scale;
  const float factor = half_to_float(scale[(((block * groups + step / group_steps) * 8 + g) * tiles + tile) * 2 + h]);
  const unsigned* own = (const unsigned*)part.words + ((block * steps + step) * tiles + tile) * (32 * BITS);
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

DEVICE void put(float* shared, const float (&v)[16], int thread) {
  Float4* to = (Float4*)(shared + shared_place((thread & 31) >> 2, 64 * (thread >> 5) + 16 * (thread & 3)));
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = Float4{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
}

// Distances from 64 on, the factor, the sign, the rounding.
DEVICE void finish(const float* shared, const Rotated& part, Site site, int thread) {
  const int row = thread * PLACES / 64, place = thread * PLACES % 64, columns = (int)part.columns;
  const float factor = as_float((unsigned)part.factor), *signs = (const float*)part.signs;
  if (site.first_row + row >= part.rows) return;
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
  unsigned short* own = (unsigned short*)part.out + (long long)(site.first_row + row) * columns;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = 64 * (site.origin + s) + place;
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

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(32 * STEPS) codebook_dequantize(const Rotated* parts, int count) {
  __shared__ __align__(16) float shared[ROWS * ROW_STRIDE];
  __shared__ unsigned entries[ENTRIES];
  const Rotated& part = part_of(parts, count, blockIdx.x);
  for (int e = threadIdx.x; e < ENTRIES; e += 32 * STEPS) entries[e] = ((const unsigned*)part.table)[e];
  __syncthreads();
  const Site site = site_of(part, (int)(blockIdx.x - part.first_block));
  float v[16];
  look_up(v, part, entries, site, threadIdx.x);
  within(v);
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
    for (int i = 0; i < 16; ++i)
      v[i] = across(v[i], __shfl_xor_sync(~0u, v[i], mask), (threadIdx.x & mask) != 0);
  put(shared, v, threadIdx.x);
  __syncthreads();
  finish(shared, part, site, threadIdx.x);
}
#endif
