// The decoder of codec.cu's LAYOUT 1, by way of shared memory; compiled behind it.
//
// A chunk's code and its weights are each a kilobyte or less, read and written from one end to the other by one thread,
// so that the threads of a device touch as many cache lines as there are threads, a few bytes at a time. The caches do
// not hold all of these lines until their ends are reached, and memory moves every byte several times: a thread that
// read and wrote for itself needed 1.9 to 2.1 ms for a layer where this takes 0.77 (experiments/codec). Here a thread
// takes its code in pieces of 16 bytes, which wait in shared memory, and a warp writes its weights together: groups of
// 64 are whole lines of 128 bytes.

#define RING 16       // words of code on hand per thread: 16 weights take 13 at most, and 3 more are in registers
#define LINE 36       // words per thread and group: 32, and 4 that keep neighbours out of each other's banks
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

struct Lane {  // one thread, one chunk
  Staged bits;
  int row, group, steps;
};

DEVICE void begin_chunk(Lane& lane, const Part& part, const unsigned char* flat, long long chunk, unsigned* ring) {
  const long long begin = chunk * CHUNK, left = part.total - begin;
  lane.steps = left <= 0 ? 0 : left < CHUNK ? (int)(left / 64) : STEPS;
  if (lane.steps == 0) return;
  open_at(lane.bits, code_of(part, flat, chunk), ring);
  lane.row = (int)(begin / part.columns);
  lane.group = (int)((begin - (long long)lane.row * part.columns) / 64);
}

DEVICE void decode_group(Lane& lane, const Part& part, unsigned* table, unsigned* line) {
  const Group own = locate(part, lane.row, lane.group);
  fill(table, 16, own.scale, own.zero, as_float((unsigned)part.half));
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    top_up(lane.bits);
    const Word4 word = load4(own.lanes + 4 * t);
    *(Word4*)(line + 8 * t) = decode_eight(lane.bits, table, word.x >> own.shift, word.y >> own.shift);
    *(Word4*)(line + 8 * t + 4) = decode_eight(lane.bits, table, word.z >> own.shift, word.w >> own.shift);
  }
  if (++lane.group == (int)part.columns / 64) { lane.group = 0; ++lane.row; }
}

// A thread's share of writing a warp's groups: eight threads write a line.
DEVICE void write_lines(const Part& part, long long first_chunk, int step, int thread, const unsigned* lines) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int owner = 4 * i + thread / 8, piece = thread % 8;
    const long long at = (first_chunk + owner) * CHUNK + step * 64;
    if (at < part.total) {
      const Word4 v = *(const Word4*)(lines + owner * LINE + piece * 4);
      store4((unsigned short*)part.out + at + piece * 8, v.x, v.y, v.z, v.w);
    }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(THREADS) codec_decode(const Part* parts, const unsigned char* flat,
                                                                   int count) {
  __shared__ unsigned table[16 * THREADS], ring[RING * THREADS];
  __shared__ __align__(16) unsigned lines[LINE * THREADS];
  const Part& part = part_of(parts, count, blockIdx.x);
  const int thread = threadIdx.x & 31;
  const long long chunk = (blockIdx.x - part.first_block) * THREADS + threadIdx.x;
  Lane lane;
  begin_chunk(lane, part, flat, chunk, ring + threadIdx.x);
  for (int step = 0; step < STEPS; ++step) {
    if (step < lane.steps) decode_group(lane, part, table + threadIdx.x, lines + threadIdx.x * LINE);
    __syncwarp();
    write_lines(part, chunk - thread, step, thread, lines + (threadIdx.x - thread) * LINE);
    __syncwarp();
  }
}
#endif
