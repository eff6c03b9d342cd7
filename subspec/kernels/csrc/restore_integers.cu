// The kernel of restore.cu for integers with scales and zeros (QuantizedIntegers), by way of shared memory; compiled
// behind it. The quantized weight lies in the order of int4.cu: words of nibbles, and a half for every 64 inputs, scale
// and zero in one (group_scales.py). The rows of a Linear start at row_offset of the fused weight; with interleave they
// alternate 16 by 16 with another's. WIDTH: 2, 3 or 4 bits in nibbles, or 8 bits in two planes of nibbles.
//
// A chunk's code and its weights are each a kilobyte or less, read and written from one end to the other by one thread,
// so that the threads of a device touch as many cache lines as there are threads, a few bytes at a time. The caches do
// not hold all of these lines until their ends are reached, and memory moves every byte several times: a thread that
// read and wrote for itself needed 1.9 to 2.1 ms for a layer where this takes 0.65 (experiments/codec). Here a thread
// takes its code in pieces of 16 bytes, which wait in shared memory, and a warp writes its weights together, 64 bytes of
// a chunk at a time. Table, ring and line are a thread's own until the warp writes lines.

#define RING 16       // words of code on hand per thread: 8 weights take 7 at most, and begin within one
#define LINE 20       // words per thread and step: 16, and 4 that keep neighbours out of each other's banks
#define STEPS (CHUNK / 32)

struct Staged {  // as Bits
  const Word4* next;  // of the code
  Word4 ahead;        // loaded before it is needed
  unsigned* ring;     // [RING + 1][STRIDE]; the last row repeats the first
  unsigned filled;    // words, counted from the first piece's beginning
  unsigned at;        // bits, likewise
};

// At least 13 words are on hand afterwards. Reads up to 20 words ahead: PADDING_WORDS of codec/format.py.
DEVICE void top_up(Staged& bits) {
#pragma unroll 1
  while ((int)(bits.filled - bits.at / 32) <= RING - 4) {  // below 0 at first: chunks begin inside a piece
    unsigned* slot = bits.ring + (bits.filled & (RING - 1)) * STRIDE;
    slot[0] = bits.ahead.x;
    slot[STRIDE] = bits.ahead.y;
    slot[2 * STRIDE] = bits.ahead.z;
    slot[3 * STRIDE] = bits.ahead.w;
    if (slot == bits.ring) slot[RING * STRIDE] = bits.ahead.x;
    bits.filled += 4;
    bits.ahead = load4((const unsigned*)bits.next++);
  }
}

DEVICE void open_at(Staged& bits, const unsigned* from, unsigned* ring) {
  bits.ring = ring;
  bits.next = (const Word4*)((unsigned long long)from & ~15ull);  // pieces are aligned; chunks begin at any word
  bits.ahead = load4((const unsigned*)bits.next++);
  bits.filled = 0;
  bits.at = (unsigned)((unsigned long long)from & 15ull) * 8;
}

DEVICE unsigned peek(const Staged& bits) {
  const unsigned* slot = bits.ring + ((bits.at / 32) & (RING - 1)) * STRIDE;
  return funnel(slot[0], slot[STRIDE], bits.at);
}

DEVICE void skip(Staged& bits, unsigned count) { bits.at += count; }

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

struct Lane {  // one thread, one chunk, 32 weights a step
  Staged bits;
  Group now, next;
  Word4 low, high;          // of the next 16 weights
  int row, group;           // of next
  int steps;                // of the chunk
};

DEVICE void begin_chunk(Lane& lane, const Part& part, const unsigned char* flat, long long chunk, unsigned* ring) {
  const long long begin = chunk * CHUNK, left = part.total - begin;
  lane.steps = left <= 0 ? 0 : left < CHUNK ? (int)(left / 32) : STEPS;
  if (lane.steps == 0) return;
  open_at(lane.bits, code_of(part, flat, chunk), ring);
  lane.row = (int)(begin / part.columns);
  lane.group = (int)((begin - (long long)lane.row * part.columns) / 64);
  lane.next = locate(part, lane.row, lane.group);
}

DEVICE Entry entry_for(unsigned q, const Entry* table, const Group& group, float half) {
  if (WIDTH == 8) return entry_at(number_of(q), group.scale, group.zero, half);
  return *(const Entry*)((const char*)table + q * (STRIDE * sizeof(Entry)));  // one addition less than by an index
}

// Eight weights of two words; the nibbles of four neighbours lie in a word's bytes in the order 0, 2, 1, 3.
DEVICE Word4 restore_eight(Staged& bits, const Entry* table, const Group& group, float half, unsigned low0,
                           unsigned low1, unsigned high0, unsigned high1) {
  unsigned v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = (i & 1) * 16 + (i & 2) * 4;
    unsigned q = ((i < 4 ? low0 : low1) >> at) & 15u;
    if (WIDTH == 8) q |= (((i < 4 ? high0 : high1) >> at) & 15u) << 4;
    v[i] = restore_one(bits, entry_for(q, table, group, half));
  }
  return {upper_halves(v[0], v[1]), upper_halves(v[2], v[3]), upper_halves(v[4], v[5]), upper_halves(v[6], v[7])};
}

DEVICE void load_words(Lane& lane, int at) {
  lane.low = load4(lane.now.lanes + 4 * at);
  if (WIDTH == 8) lane.high = load4(lane.now.lanes + lane.now.plane + 4 * at);
}

// The first half of a group's 64 weights, behind their table. What is needed next is loaded ahead.
DEVICE void begin_group(Lane& lane, const Part& part, bool last, Entry* table) {
  const Group own = lane.now = lane.next;
  load_words(lane, 0);
  if (++lane.group == (int)part.columns / 64) { lane.group = 0; ++lane.row; }
  if (!last) lane.next = locate(part, lane.row, lane.group);
  const float half = as_float((unsigned)part.half);
  // Zeros are below 16, and a positive float16 is 2**-24 at least: then every interval is usable.
  if (WIDTH != 8 && own.scale > 0.0f && own.scale <= 65504.0f) fill(table, LEVELS, own.scale, own.zero, half, true);
  else if (WIDTH != 8) fill(table, LEVELS, own.scale, own.zero, half);
}

DEVICE void restore_step(Lane& lane, const Part& part, int step, Entry* table, unsigned* line) {
  if (step % 2 == 0) begin_group(lane, part, step + 2 >= lane.steps, table);
  const float half = as_float((unsigned)part.half);
#pragma unroll 1
  for (int t = 0; t < 2; ++t) {
    const int by = lane.now.shift, next = step % 2 * 2 + t + 1;
    const Word4 low = {lane.low.x >> by, lane.low.y >> by, lane.low.z >> by, lane.low.w >> by};
    const Word4 high = {lane.high.x >> by, lane.high.y >> by, lane.high.z >> by, lane.high.w >> by};
    if (next < 4) load_words(lane, next);
    top_up(lane.bits);
    *(Word4*)(line + 8 * t) = restore_eight(lane.bits, table, lane.now, half, low.x, low.y, high.x, high.y);
    top_up(lane.bits);
    *(Word4*)(line + 8 * t + 4) = restore_eight(lane.bits, table, lane.now, half, low.z, low.w, high.z, high.w);
  }
}

// A thread's share of writing a warp's steps, whose first chunk is `first`: four threads write 64 bytes.
DEVICE void write_lines(const Part& part, long long first, int step, int thread, const unsigned* lines) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int owner = 8 * i + thread / 4, piece = thread % 4;
    const long long at = (first + owner) * CHUNK + step * 32;
    if (at < part.total) {
      const Word4 v = *(const Word4*)(lines + owner * LINE + piece * 4);
      store4((unsigned short*)part.out + at + piece * 8, v.x, v.y, v.z, v.w);
    }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(THREADS) restore_integers(const Part* parts, const unsigned char* flat,
                                                                       int count) {
  __shared__ Entry table[LEVELS * THREADS];
  __shared__ unsigned ring[(RING + 1) * THREADS];
  __shared__ __align__(16) unsigned lines[LINE * THREADS];
  const Part& part = part_of(parts, count, blockIdx.x);
  const int thread = threadIdx.x & 31;
  const long long chunk = (blockIdx.x - part.first_block) * THREADS + threadIdx.x;
  Lane lane;
  begin_chunk(lane, part, flat, chunk, ring + threadIdx.x);
  for (int step = 0; step < STEPS; ++step) {
    if (step < lane.steps) restore_step(lane, part, step, table + threadIdx.x, lines + threadIdx.x * LINE);
    __syncwarp();
    write_lines(part, chunk - thread, step, thread, lines + (threadIdx.x - thread) * LINE);
    __syncwarp();
  }
}
#endif
