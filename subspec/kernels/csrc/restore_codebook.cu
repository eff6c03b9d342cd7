// The kernel of restore.cu for grid points of rotated weights (QuantizedPairs), compiled behind it.
//
// codebook_dequantize.cu has already written the dequantized weights, rotated back and rounded to bfloat16, where the
// exact ones are to be; of the quantized weight only the scales are read here. Every weight has an interval of its own.

// meta: scales, half [blocks][groups][8][tiles][2] (kernels/codebook.py); block: a power of two.
// An interval reaches half * (sum of the scales of every 64 inputs of the weight's block) to either side.
DEVICE void restore_chunk(const Part& part, const unsigned char* flat, long long chunk) {
  unsigned short* out = (unsigned short*)part.out;
  const int columns = (int)part.columns, block = (int)part.block, tiles = (int)part.tiles, group = (int)part.group;
  const int groups = (columns + 63) / 64 * 64 / group;
  const float half = as_float((unsigned)part.half);
  Bits bits;
  open_at(bits, code_of(part, flat, chunk));
  const long long begin = chunk * CHUNK;
  const long long end = begin + CHUNK < part.total ? begin + CHUNK : part.total;
  int row = (int)(begin / columns), column = (int)(begin - (long long)row * columns);
  const bool wide = columns % 8 == 0;  // then chunks and rows begin at multiples of 16 bytes
  const int taken = wide ? 8 : 1;
  float reach = 0.0f;
  for (long long at = begin; at < end; at += taken) {
    if (at == begin || (column & (block - 1)) == 0) {
      const int fused = fused_row(part, row);
      const int tile = (fused >> 4) % tiles, h = (fused >> 3) & 1, g = fused & 7, first = column & -block;
      const unsigned short* scales = (const unsigned short*)part.meta +
                                     (((long long)((fused >> 4) / tiles) * groups * 8 + g) * tiles + tile) * 2 + h;
      reach = half_to_float(scales[(long long)(first / group) * 16 * tiles]);
      for (int next = first + 64; next < first + block; next += 64)
        reach = add(reach, half_to_float(scales[(long long)(next / group) * 16 * tiles]));
      reach = mul(reach, half);
    }
    if (wide) {
      const Word4 word = read4(out + at);
      const unsigned pairs[4] = {word.x, word.y, word.z, word.w};
      unsigned v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float weight = as_float(i & 1 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
        v[i] = restore_one(bits, entry_of(add(weight, -reach), add(weight, reach)), true);
      }
      store4(out + at, upper_halves(v[0], v[1]), upper_halves(v[2], v[3]), upper_halves(v[4], v[5]),
             upper_halves(v[6], v[7]));
    } else {
      const float weight = as_float((unsigned)out[at] << 16);
      out[at] = (unsigned short)(restore_one(bits, entry_of(add(weight, -reach), add(weight, reach)), true) >> 16);
    }
    column += taken;
    if (column == columns) { column = 0; ++row; }
  }
}

#ifndef HOST_TEST
extern "C" __global__ void __launch_bounds__(THREADS) restore_codebook(const Part* parts, const unsigned char* flat,
                                                                       int count) {
  const Part& part = part_of(parts, count, blockIdx.x);
  const long long chunk = (blockIdx.x - part.first_block) * THREADS + threadIdx.x;
  if (chunk * CHUNK < part.total) restore_chunk(part, flat, chunk);
}
#endif
