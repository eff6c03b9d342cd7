// The kernel of restore.cu for integers with scales and zeros (QuantizedIntegers), by way of shared memory; compiled
// behind it. The quantized weight lies in the order of int4.cu: words of nibbles, and a half for every 64 inputs, scale
// and zero in one (group_scales.py). The rows of a Linear start at row_offset of the fused weight; with interleave they
// alternate 16 by 16 with another's. WIDTH: 2, 3 or 4 bits in nibbles, or 8 bits in two planes of nibbles.
//
// A chunk's code and its weights are each a kilobyte or less, read and written from one end to the other by one thread,
// so that the threads of a device touch as many cache lines as there are threads, a few bytes at a time. The caches do
// not hold all of these lines until their ends are reached, and memory moves every byte several times: a thread that
// read and wrote for itself needed 1.9 to 2.1 ms for a layer where this takes 0.77 (experiments/codec). Here a thread
// takes its code in pieces of 16 bytes, which wait in shared memory, and a warp writes its weights together:
// stretches of 64 are whole lines of 128 bytes. Table, ring and line are a thread's own until the warp writes lines.

#define RING 16       // words of code on hand per thread: 16 weights take 13 at most, and 3 more are in registers
#define LINE 36       // words per thread and stretch: 32, and 4 that keep neighbours out of each other's banks
#define STEPS (CHUNK / 64)

struct Staged {  // as Bits
  const Word4* next;  // of the code
  unsigned* ring;     // [RING][STRIDE]
  unsigned filled, taken;  // words, counted from the first piece's beginning
  unsigned words[3];
  unsigned at;
};

// At least 13 words are on hand afterwards. Reads up to 16 words ahead: PADDING_WORDS of codec/format.py.
DEVICE void top_up(Staged& bits) {
  while ((int)(bits.filled - bits.taken) <= RING - 4) {  // below 0 at first: chunks begin inside a piece
    const Word4 piece = load4((const unsigned*)bits.next++);
    unsigned* slot = bits.ring + (bits.filled & (RING - 1)) * STRIDE;
    slot[0] = piece.x;
    slot[STRIDE] = piece.y;
    slot[2 * STRIDE] = piece.z;
    slot[3 * STRIDE] = piece.w;
    bits.filled += 4;
  }
}

DEVICE unsigned take(Staged& bits) { return bits.ring[(bits.taken++ & (RING - 1)) * STRIDE]; }

DEVICE void open_at(Staged& bits, const unsigned* from, unsigned* ring) {
  bits.ring = ring;
  bits.next = (const Word4*)((unsigned long long)from & ~15ull);  // pieces are aligned; chunks begin at any word
  bits.filled = 0;
  bits.taken = (unsigned)((unsigned long long)from & 15ull) / 4;
  top_up(bits);
  for (int i = 0; i < 3; ++i) bits.words[i] = take(bits);
  bits.at = 0;
}

DEVICE void advance(Staged& bits) {
  if (bits.at >= 32u) {
    bits.words[0] = bits.words[1];
    bits.words[1] = bits.words[2];
    bits.words[2] = take(bits);
  }
  bits.at &= 31u;
}

struct Lane {  // one thread, one chunk
  Staged bits;
  int row, stretch, steps;  // stretch: which 64 of the row's weights are next
};

DEVICE void begin_chunk(Lane& lane, const Part& part, const unsigned char* flat, long long chunk, unsigned* ring) {
  const long long begin = chunk * CHUNK, left = part.total - begin;
  lane.steps = left <= 0 ? 0 : left < CHUNK ? (int)(left / 64) : STEPS;
  if (lane.steps == 0) return;
  open_at(lane.bits, code_of(part, flat, chunk), ring);
  lane.row = (int)(begin / part.columns);
  lane.stretch = (int)((begin - (long long)lane.row * part.columns) / 64);
}

#define PLANES (WIDTH == 8 ? 2 : 1)
#define LEVELS (WIDTH == 8 ? 1 : 1 << WIDTH)  // of a table, which 8 bits do without: most would be computed in vain

// words: [blocks][groups][PLANES][tiles][32][4], meta: [blocks][groups][PLANES][8][tiles][2] half (int4.py).
struct Group {  // where 64 weights of a row are
  const unsigned* lanes;  // of four threads of the multiplication, 16 weights each
  int plane, shift;       // words to the high nibbles; of the row's nibbles in their words
  float scale, zero;
};

DEVICE Group locate(const Part& part, int row, int group) {
  const int groups = (int)part.columns / 64, tiles = (int)part.tiles;
  const int fused = fused_row(part, row);
  const int tile = (fused >> 4) % tiles, block = (fused >> 4) / tiles, h = (fused >> 3) & 1, g = fused & 7;
  const long long cell = ((long long)block * groups + group) * PLANES;
  const unsigned scale = load_half((const unsigned short*)part.meta + (cell * 8 + g) * 2 * tiles + 2 * tile + h);
  const float zero = mul(number_of(scale & 63u), WIDTH == 8 ? 4.25f : 0.25f);
  const unsigned* lanes = (const unsigned*)part.words + ((cell * tiles + tile) * 32 + g * 4) * 4;
  return {lanes, tiles * 128, 4 * h, half_to_float(scale), zero};
}

DEVICE unsigned entry_for(unsigned q, const unsigned* table, const Group& group, float half) {
  return WIDTH == 8 ? entry_at(number_of(q), group.scale, group.zero, half) : table[q * STRIDE];
}

// Eight weights of two words; the nibbles of four neighbours lie in a word's bytes in the order 0, 2, 1, 3.
template <class Source>
DEVICE Word4 restore_eight(Source& bits, const unsigned* table, const Group& group, float half, unsigned low0,
                           unsigned low1, unsigned high0, unsigned high1) {
  unsigned v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = group.shift + (i & 1) * 16 + (i & 2) * 4;
    unsigned q = ((i < 4 ? low0 : low1) >> at) & 15u;
    if (WIDTH == 8) q |= (((i < 4 ? high0 : high1) >> at) & 15u) << 4;
    v[i] = restore_one(bits, entry_for(q, table, group, half));
  }
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

DEVICE void restore_stretch(Lane& lane, const Part& part, unsigned* table, unsigned* line) {
  const Group own = locate(part, lane.row, lane.stretch);
  const float half = as_float((unsigned)part.half);
  if (WIDTH != 8) fill(table, LEVELS, own.scale, own.zero, half);
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    top_up(lane.bits);
    const Word4 low = load4(own.lanes + 4 * t);
    Word4 high = low;
    if (WIDTH == 8) high = load4(own.lanes + own.plane + 4 * t);
    *(Word4*)(line + 8 * t) = restore_eight(lane.bits, table, own, half, low.x, low.y, high.x, high.y);
    *(Word4*)(line + 8 * t + 4) = restore_eight(lane.bits, table, own, half, low.z, low.w, high.z, high.w);
  }
}

DEVICE void pass_stretch(Lane& lane, const Part& part) {
  if (++lane.stretch == (int)part.columns / 64) { lane.stretch = 0; ++lane.row; }
}

// A thread's share of writing a warp's stretches, whose first chunk is `first`: eight threads write a line.
DEVICE void write_lines(const Part& part, long long first, int step, int thread, const unsigned* lines) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int owner = 4 * i + thread / 8, piece = thread % 8;
    const long long at = (first + owner) * CHUNK + step * 64;
    if (at < part.total) {
      const Word4 v = *(const Word4*)(lines + owner * LINE + piece * 4);
      store4((unsigned short*)part.out + at + piece * 8, v.x, v.y, v.z, v.w);
    }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(THREADS) restore_integers(const Part* parts, const unsigned char* flat,
                                                                       int count) {
  __shared__ unsigned table[LEVELS * THREADS], ring[RING * THREADS];
  __shared__ __align__(16) unsigned lines[LINE * THREADS];
  const Part& part = part_of(parts, count, blockIdx.x);
  const int thread = threadIdx.x & 31;
  const long long chunk = (blockIdx.x - part.first_block) * THREADS + threadIdx.x;
  Lane lane;
  begin_chunk(lane, part, flat, chunk, ring + threadIdx.x);
  for (int step = 0; step < STEPS; ++step) {
    if (step < lane.steps) {
      restore_stretch(lane, part, table + threadIdx.x, lines + threadIdx.x * LINE);
      pass_stretch(lane, part);
    }
    __syncwarp();
    write_lines(part, chunk - thread, step, thread, lines + (threadIdx.x - thread) * LINE);
    __syncwarp();
  }
}
#endif
