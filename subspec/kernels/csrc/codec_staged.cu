// The decoders of codec.cu's LAYOUT 1 and 4, by way of shared memory; compiled behind it.
//
// A chunk's code and its weights are each a kilobyte or less, read and written from one end to the other by one thread,
// so that the threads of a device touch as many cache lines as there are threads, a few bytes at a time. The caches do
// not hold all of these lines until their ends are reached, and memory moves every byte several times: a thread that
// read and wrote for itself needed 1.9 to 2.1 ms for a layer where this takes 0.77 (experiments/codec). Here a thread
// takes its code in pieces of 16 bytes, which wait in shared memory, and a warp writes its weights together:
// stretches of 64 are whole lines of 128 bytes. Table, ring and line are a thread's own until the warp writes lines.
//
// The layouts differ in which chunks a warp has (chunk_of) and in how a stretch's substitute is read (decode_stretch).

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

// At least 13 words are on hand afterwards. Reads up to 16 words behind what is taken: codec.py's PADDING_WORDS.
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

struct Chunk {
  long long number;  // of a thread's own chunk, which may lie behind the part's last one
  int stride;        // to that of the warp's next thread
};

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

#if LAYOUT == 1

#define LEVELS 16

// thread: its number within the part.
DEVICE Chunk chunk_of(const Part&, long long thread) { return {thread, 1}; }

// words: [blocks][groups][tiles][32][4], meta: [blocks][groups][8][2 * tiles] pairs of half (int4.py).
struct Group {  // where 64 weights of a row are
  const unsigned* lanes;  // of four threads of the multiplication, 16 weights each
  int shift;              // of the row's nibbles in their words
  float scale, zero;
};

DEVICE Group locate(const Part& part, int row, int group) {
  const int groups = (int)part.columns / 64, tiles = (int)part.tiles;
  const int fused = fused_row(part, row);
  const int tile = (fused >> 4) % tiles, block = (fused >> 4) / tiles, h = (fused >> 3) & 1, g = fused & 7;
  const long long cell = (long long)block * groups + group;
  const unsigned pair = ((const unsigned*)part.meta)[(cell * 8 + g) * 2 * tiles + 2 * tile + h];
  const unsigned* lanes = (const unsigned*)part.words + ((cell * tiles + tile) * 32 + g * 4) * 4;
  return {lanes, 4 * h, half_to_float(pair & 0xffffu), half_to_float(pair >> 16)};
}

template <class Source>
DEVICE Word4 decode_eight(Source& bits, const unsigned* table, unsigned first, unsigned second) {
  unsigned v[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned w = i ? second : first;
    v[4 * i] = decode_one(bits, table[(w & 15) * STRIDE]);
    v[4 * i + 1] = decode_one(bits, table[((w >> 16) & 15) * STRIDE]);
    v[4 * i + 2] = decode_one(bits, table[((w >> 8) & 15) * STRIDE]);
    v[4 * i + 3] = decode_one(bits, table[((w >> 24) & 15) * STRIDE]);
  }
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

DEVICE void decode_stretch(Lane& lane, const Part& part, unsigned* table, unsigned* line) {
  const Group own = locate(part, lane.row, lane.stretch);
  fill(table, LEVELS, own.scale, own.zero, as_float((unsigned)part.half));
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    top_up(lane.bits);
    const Word4 word = load4(own.lanes + 4 * t);
    *(Word4*)(line + 8 * t) = decode_eight(lane.bits, table, word.x >> own.shift, word.y >> own.shift);
    *(Word4*)(line + 8 * t + 4) = decode_eight(lane.bits, table, word.z >> own.shift, word.w >> own.shift);
  }
}

#else  // 4

#define LEVELS (WIDTH <= 4 ? 1 << WIDTH : 1)  // of a table, which 8 bits do without: most would be computed in vain
#define LOW (WIDTH == 3 ? 2 : WIDTH)          // bits of a weight in its word; the third is in high
#define PER_WORD (32 / LOW)

// Neighbours in memory are the words of neighbouring rows, so a warp's threads have the same columns of 32 rows: chunks
// as far apart as are those that begin at the same column. Where rows are whole chunks, these rows are neighbours; else
// threads go on to their next row all at once. codec.py's blocks_of counts the same way.
DEVICE Chunk chunk_of(const Part& part, long long thread) {
  const int columns = (int)part.columns, power = columns & -columns;
  const int stride = columns / (power < CHUNK ? power : CHUNK);
  const long long warp = thread / 32;
  return {(warp / stride * 32 + thread % 32) * stride + warp % stride, stride};
}

// Four weights that follow each other in a row: one field of four neighbouring words holds them, and one group.
struct Quad {
  unsigned words[4], high[4];
};

// Where a row's next four weights are. words: [columns / PER_WORD][rows], high: [columns / 16][rows] (3 bits).
struct Place {
  unsigned at, rows;  // the next word's number, below 2**32; from one of the row's words to the next
  int field, left;    // that is read of the words; how many there are until the next field's turn
};

DEVICE Place place_of(const Part& part, int row, int column) {
  const int run = (int)part.columns / PER_WORD, field = column / run, word = column - field * run;
  const unsigned rows = (unsigned)part.rows;
  return {(unsigned)fused_row(part, row) + (unsigned)word * rows, rows, field, run - word};
}

DEVICE Quad load_quad(const Part& part, const Place& place) {
  Quad quad;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = place.at + i * place.rows;
    quad.words[i] = load1((const unsigned*)part.words + at);
    if (WIDTH == 3) quad.high[i] = load_half((const unsigned short*)part.high + at);
  }
  return quad;
}

DEVICE void pass_quad(Place& place, const Part& part) {
  place.at += 4 * place.rows;
  place.left -= 4;
  if (place.left == 0) {
    place.left = (int)part.columns / PER_WORD;
    place.at -= (unsigned)place.left * place.rows;
    ++place.field;
  }
}

DEVICE unsigned code_at(const Quad& quad, int i, int field) {
  const unsigned low = (quad.words[i] >> (field * LOW)) & ((1u << LOW) - 1u);
  return WIDTH == 3 ? low | ((quad.high[i] >> field) & 1u) << 2 : low;
}

struct Levels {  // of a group
  float scale, zero, half;
};

// meta: [2][columns / group][rows] of half.
DEVICE Levels levels_of(const Part& part, int row, int group) {
  const unsigned at = (unsigned)group * (unsigned)part.rows + (unsigned)fused_row(part, row);
  const unsigned zeros = (unsigned)part.columns / (unsigned)part.group * (unsigned)part.rows;
  const unsigned short* scale = (const unsigned short*)part.meta + at;
  return {half_to_float(load_half(scale)), half_to_float(load_half(scale + zeros)), as_float((unsigned)part.half)};
}

DEVICE unsigned entry_for(unsigned code, const Levels& levels, const unsigned* table) {
  return WIDTH <= 4 ? table[code * STRIDE] : entry_at(number_of(code), levels.scale, levels.zero, levels.half);
}

DEVICE void decode_stretch(Lane& lane, const Part& part, unsigned* table, unsigned* line) {
  const int first = lane.stretch * 64;
  Place place = place_of(part, lane.row, first);
  Quad ahead = load_quad(part, place);
  Levels levels;
#pragma unroll 1
  for (int done = 0, border = 0; done < 64; done += 4) {  // border: where a group begins
    if (done % 16 == 0) top_up(lane.bits);
    if (done == border) {
      const int size = (int)part.group, group = (first + done) / size;
      levels = levels_of(part, lane.row, group);
      if (WIDTH <= 4) fill(table, LEVELS, levels.scale, levels.zero, levels.half);
      border = (group + 1) * size - first;
    }
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = code_at(ahead, i, place.field);
    pass_quad(place, part);
    if (done < 60) ahead = load_quad(part, place);  // on its way while these are decoded
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = decode_one(lane.bits, entry_for(v[i], levels, table));
    line[done / 2] = v[0] | v[1] << 16;
    line[done / 2 + 1] = v[2] | v[3] << 16;
  }
}

#endif

DEVICE void pass_stretch(Lane& lane, const Part& part) {
  if (++lane.stretch == (int)part.columns / 64) { lane.stretch = 0; ++lane.row; }
}

// A thread's share of writing a warp's stretches: eight threads write a line.
DEVICE void write_lines(const Part& part, const Chunk& own, int step, int thread, const unsigned* lines) {
  const long long first = own.number - thread * own.stride;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int owner = 4 * i + thread / 8, piece = thread % 8;
    const long long at = (first + owner * own.stride) * CHUNK + step * 64;
    if (at < part.total) {
      const Word4 v = *(const Word4*)(lines + owner * LINE + piece * 4);
      store4((unsigned short*)part.out + at + piece * 8, v.x, v.y, v.z, v.w);
    }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(THREADS) codec_decode(const Part* parts, const unsigned char* flat,
                                                                   int count) {
  __shared__ unsigned table[LEVELS * THREADS], ring[RING * THREADS];
  __shared__ __align__(16) unsigned lines[LINE * THREADS];
  const Part& part = part_of(parts, count, blockIdx.x);
  const int thread = threadIdx.x & 31;
  const Chunk own = chunk_of(part, (blockIdx.x - part.first_block) * THREADS + threadIdx.x);
  Lane lane;
  begin_chunk(lane, part, flat, own.number, ring + threadIdx.x);
  for (int step = 0; step < STEPS; ++step) {
    if (step < lane.steps) {
      decode_stretch(lane, part, table + threadIdx.x, lines + threadIdx.x * LINE);
      pass_stretch(lane, part);
    }
    __syncwarp();
    write_lines(part, own, step, thread, lines + (threadIdx.x - thread) * LINE);
    __syncwarp();
  }
}
#endif
