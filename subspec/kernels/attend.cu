// Attention of a draft level in one kernel: finish the q/k/v projection (add its slices and the bias, norm, rotate),
// write the level's keys and values into the cache, and attend over the tree and the committed prefix.
//
// One cluster of PARTS blocks per kv head; each block takes a slice of the keys for all query rows of that head (rows x
// heads per kv head, at most 64: four tiles of 16), and the slices are added up through distributed shared memory. Of
// a block's eight warps, warp w has the tile of queries w % 4 and, of every 64 keys, half w / 4: sixteen partial
// results in all per cluster.
//
// Everything but the queries is there before the kernel ahead has ended: keys and values of the prefix and of earlier
// levels, positions, the tree. With OVERLAP it is fetched before the wait (launch.py says why that is safe: these were
// written before the level's first kernel began). The level's own keys and values never come from memory: the block
// whose slice they lie in, the first one, puts them into its tile itself.
//
// D (head dimension, 64 or 128), GROUP (heads per kv head), SLICES (of the projection's sums), HAS_BIAS, HAS_NORM and
// OVERLAP are set by the host.

#define PARTS 8      // blocks per cluster
#define KEYS 64      // keys of a tile; two tiles are on their way at a time
#define QUERIES 64   // at most, per kv head
#define THREADS 256
#define MAX_ROWS 8
#define LINE (D + 8)       // bfloat16 values of a row in shared memory: eight more, against bank conflicts
#define SUMS (D + 4)       // floats of a row of partial results
#define CHUNKS (D / 8)     // pieces of 16 bytes in a row of keys
#define LANES (D / 8)      // threads that finish one head of one row: four values of each half
#define AT_ONCE (THREADS / LANES)        // heads of rows that the block finishes at once
#define TURNS (QUERIES / AT_ONCE + 1)    // the queries, and at last the level's own keys and values

typedef unsigned short bf16;

struct __align__(16) Float4 { float x, y, z, w; };

__device__ __forceinline__ void release_next() {
#if OVERLAP
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if OVERLAP
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {  // zeros where nothing exists
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
      :: "r"(shared_address(to)), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_for_all_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// What earlier levels wrote, read ahead of the wait: from the second-level cache, past any older copy in the first.
__device__ __forceinline__ long long fresh(const long long* p) {
  long long v;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ unsigned fresh_byte(const unsigned char* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ Float4 load_sums(const float* p) {  // written by the kernel ahead: not through L1
  Float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const bf16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                    unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned pack2(float low, float high) {  // two floats to bfloat16, rounded to nearest
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float from_bf16(bf16 v) { return __uint_as_float((unsigned)v << 16); }
__device__ __forceinline__ float round_bf16(float v) { return __uint_as_float(pack2(v, 0.f) << 16); }

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

__device__ __forceinline__ void cluster_sync() {  // what others wrote to their shared memory can be read
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_meet() {  // orders no writes
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ unsigned other_block(unsigned address, unsigned rank) {  // the same place in its memory
  unsigned r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}

__device__ __forceinline__ float load_other(unsigned address) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ Float4 load_other4(unsigned address) {
  Float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}
// ---- end of what is the machine's own

struct Tile {
  bf16 keys[KEYS][LINE];
  bf16 values[KEYS][LINE];
};

struct Shared {
  Tile tiles[2];  // when all keys are done: the partial results, float [2][QUERIES][SUMS]
  bf16 queries[QUERIES][LINE];
  float cosine[MAX_ROWS][D / 2], sine[MAX_ROWS][D / 2];
  float highest[2][QUERIES], denominator[2][QUERIES];
  unsigned char visible[2][KEYS];  // bit r: query row r sees the key
};
static_assert(2 * QUERIES * SUMS * 4 <= 2 * sizeof(Tile), "the partial results take the tiles' place");

// Four values of each half of one head of one row: its bias.
__device__ __forceinline__ void begin_with_bias(float (&value)[8], const bf16* bias, int column) {
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] = 0.f;
#if HAS_BIAS
  const uint2 a = *(const uint2*)(bias + column), b = *(const uint2*)(bias + column + D / 2);
  const unsigned pairs[4] = {a.x, a.y, b.x, b.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = from_bf16((bf16)(pairs[i] & 0xFFFFu));
    value[2 * i + 1] = from_bf16((bf16)(pairs[i] >> 16));
  }
#endif
}

// Adds up the slices.
__device__ __forceinline__ void gather(float (&value)[8], const float* partial, int rows, int stride, int row,
                                       int column) {
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) {
    const float* at = partial + (long long)(slice * rows + row) * stride + column;
    const Float4 a = load_sums(at), b = load_sums(at + D / 2);
    value[0] += a.x; value[1] += a.y; value[2] += a.z; value[3] += a.w;
    value[4] += b.x; value[5] += b.y; value[6] += b.z; value[7] += b.w;
  }
}

// Norm and rotation; all LANES threads of a head take part.
__device__ __forceinline__ void finish(float (&value)[8], const bf16* norm, bool rotates, float eps, int row, int lane,
                                       const Shared& shared) {
#if HAS_NORM
  if (norm != nullptr) {
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) square += value[i] * value[i];
    const unsigned members = ((1u << LANES) - 1u) << (threadIdx.x & 31 & ~(LANES - 1));
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) square += __shfl_xor_sync(members, square, distance);
    const float scale = rsqrtf(square / D + eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] *= scale * from_bf16(norm[lane * 4 + i]);
      value[4 + i] *= scale * from_bf16(norm[D / 2 + lane * 4 + i]);
    }
  }
#endif
  if (rotates) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float c = shared.cosine[row][lane * 4 + i], s = shared.sine[row][lane * 4 + i];
      const float rotated = value[i] * c - value[4 + i] * s;
      value[4 + i] = value[4 + i] * c + value[i] * s;
      value[i] = rotated;
    }
  }
}

__device__ __forceinline__ void store_halves(bf16* line, int lane, const float (&value)[8]) {
  unsigned* first = (unsigned*)(line + lane * 4);
  unsigned* second = (unsigned*)(line + D / 2 + lane * 4);
  first[0] = pack2(value[0], value[1]); first[1] = pack2(value[2], value[3]);
  second[0] = pack2(value[4], value[5]); second[1] = pack2(value[6], value[7]);
}

extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS) attend(
    const float* partial,                         // [SLICES][rows][stride]: the q/k/v projection
    const bf16* __restrict__ bias,                // [(heads + 2 kv_heads) * D]
    const bf16* __restrict__ q_norm, const bf16* __restrict__ k_norm,  // [D]
    const float* __restrict__ inverse_frequency,  // [D / 2]
    const long long* depths,                      // [rows] of the nodes
    const long long* length,                      // of the committed prefix
    bf16* k_rows, bf16* v_rows,                   // this layer's cache: [kv_heads][rows of the cache][D]
    const unsigned char* ancestors,               // [capacity][capacity]
    const long long* nodes,                       // [rows]
    const long long* node_of_row,                 // [draft rows]
    bf16* out,                                    // [rows][heads * D]
    int rows, int stride, int start_row, int drafted, int capacity, int row_stride, int head_stride,
    double attention_scaling, double eps, double scale) {
  release_next();
  extern __shared__ __align__(16) unsigned char dynamic[];
  Shared& shared = *(Shared*)dynamic;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int part = (int)cluster_rank(), kv_head = blockIdx.y, heads = gridDim.y * GROUP;
  bf16* k_head = k_rows + (long long)kv_head * head_stride;
  bf16* v_head = v_rows + (long long)kv_head * head_stride;

  // The keys are rows start_row .. of the cache: `drafted` rows of the tree, this level's first, then the prefix.
  const long long prefix = fresh(length);
  const int total = drafted + (int)prefix;
  const int slice = (total + PARTS * KEYS - 1) / (PARTS * KEYS) * KEYS;
  const int begin = min(part * slice, total), end = min(begin + slice, total);
  const int count = (end - begin + KEYS - 1) / KEYS;

  auto fetch = [&](int index) {  // tile `index` of this block; also of nothing: the number of groups stays right
    if (index < count) {
      Tile& tile = shared.tiles[index & 1];
      const int from = begin + index * KEYS;
      for (int e = thread; e < KEYS * CHUNKS; e += THREADS) {
        const int key = e / CHUNKS, chunk = e % CHUNKS, column = from + key;
        if (column >= rows) {  // this level's own are put there by the block itself
          const bool exists = column < end;
          const long long at = (long long)(start_row + (exists ? column : 0)) * row_stride + chunk * 8;
          copy_async(&tile.keys[key][chunk * 8], k_head + at, exists);
          copy_async(&tile.values[key][chunk * 8], v_head + at, exists);
        }
      }
      if (thread < KEYS) {
        const int column = from + thread;
        unsigned seen = 0;
        if (column < end) {
          if (column >= drafted) {
            seen = 0xFF;
          } else {
            const long long key_node = fresh(node_of_row + start_row + column);
            for (int row = 0; row < rows; ++row)
              seen |= (fresh_byte(ancestors + fresh(nodes + row) * capacity + key_node) != 0 ? 1u : 0u) << row;
          }
        }
        shared.visible[index & 1][thread] = (unsigned char)seen;
      }
    }
    commit_copies();
  };
  fetch(0);
  fetch(1);
  for (int e = thread; e < rows * (D / 2); e += THREADS) {
    const int row = e / (D / 2), i = e % (D / 2);
    const float angle = (float)(prefix + fresh(depths + row)) * inverse_frequency[i];
    // The model's own tables are bfloat16; so are these.
    shared.cosine[row][i] = round_bf16(cosf(angle) * (float)attention_scaling);
    shared.sine[row][i] = round_bf16(sinf(angle) * (float)attention_scaling);
  }
  // What this thread finishes: four values of each half of a head of a row, by turns; in the last turn of the level's own
  // keys and values, which the first block writes. Where there is nothing to finish, it does so with the first row.
  const int member = thread % LANES, place = thread / LANES;
  const bool writes = part == 0 && place < 2 * rows, is_key = (place & 1) == 0;
  float value[TURNS][8];
  int row_of[TURNS], column_of[TURNS];
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const int query = min(turn * AT_ONCE + place, rows * GROUP - 1);
    const bool own = turn == TURNS - 1;
    const int head = own ? heads + (is_key ? 0 : (int)gridDim.y) + kv_head : kv_head * GROUP + query % GROUP;
    row_of[turn] = own ? (writes ? place >> 1 : 0) : query / GROUP;
    column_of[turn] = head * D + member * 4;
    begin_with_bias(value[turn], bias, column_of[turn]);
  }
  __syncthreads();
  wait_for_previous();
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) gather(value[turn], partial, rows, stride, row_of[turn], column_of[turn]);
#pragma unroll
  for (int turn = 0; turn < TURNS - 1; ++turn) {
    finish(value[turn], q_norm, true, (float)eps, row_of[turn], member, shared);
    const int query = turn * AT_ONCE + place;
    if (query < rows * GROUP) store_halves(shared.queries[query], member, value[turn]);
  }
  finish(value[TURNS - 1], is_key ? k_norm : nullptr, is_key, (float)eps, row_of[TURNS - 1], member, shared);
  if (writes) {
    const int row = place >> 1;
    store_halves(is_key ? shared.tiles[0].keys[row] : shared.tiles[0].values[row], member, value[TURNS - 1]);
    store_halves((is_key ? k_head : v_head) + (long long)(start_row + row) * row_stride, member, value[TURNS - 1]);
  }
  for (int e = thread; e < (QUERIES - rows * GROUP) * (LINE / 2); e += THREADS)
    ((unsigned*)shared.queries[rows * GROUP])[e] = 0u;  // queries there are none of

  const int tile_of_queries = warp & 3, half = warp >> 2;
  const int query_low = tile_of_queries * 16 + g, query_high = query_low + 8;
  const bool works = tile_of_queries * 16 < rows * GROUP;
  const int row_low = min(query_low / GROUP, MAX_ROWS - 1), row_high = min(query_high / GROUP, MAX_ROWS - 1);
  float output[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) output[i][j] = 0.f;
  float highest_low = -1e30f, highest_high = -1e30f, sum_low = 0.f, sum_high = 0.f;

  for (int index = 0; index < count; ++index) {
    wait_for_all_but_one();
    __syncthreads();
    const Tile& tile = shared.tiles[index & 1];
    if (works) {
      const int r = lane & 7, matrix = lane >> 3;
      float score[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) score[i][j] = 0.f;
#pragma unroll
      for (int k = 0; k < D; k += 16) {
        unsigned a[4];
        load_matrices(a, &shared.queries[tile_of_queries * 16 + (matrix & 1) * 8 + r][k + (matrix >> 1) * 8]);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          unsigned b[4];
          load_matrices(b, &tile.keys[half * 32 + i * 8 + (matrix >> 1) * 8 + r][k + (matrix & 1) * 8]);
          mma(score[i], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma(score[i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
      float top_low = highest_low, top_high = highest_high;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const unsigned seen = shared.visible[index & 1][half * 32 + i * 8 + 2 * t + (j & 1)];
          const bool is_seen = (seen >> (j < 2 ? row_low : row_high)) & 1u;
          score[i][j] = is_seen ? score[i][j] * (float)scale : __uint_as_float(0xFF800000u);  // -infinity
          if (j < 2) top_low = fmaxf(top_low, score[i][j]); else top_high = fmaxf(top_high, score[i][j]);
        }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        top_low = fmaxf(top_low, __shfl_xor_sync(0xFFFFFFFFu, top_low, distance));
        top_high = fmaxf(top_high, __shfl_xor_sync(0xFFFFFFFFu, top_high, distance));
      }
      const float correct_low = __expf(highest_low - top_low), correct_high = __expf(highest_high - top_high);
      highest_low = top_low;
      highest_high = top_high;
      float add_low = 0.f, add_high = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          score[i][j] = __expf(score[i][j] - (j < 2 ? top_low : top_high));  // of -infinity: 0
          if (j < 2) add_low += score[i][j]; else add_high += score[i][j];
        }
      sum_low = sum_low * correct_low + add_low;  // of this lane's keys; added up over lanes at the end
      sum_high = sum_high * correct_high + add_high;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        output[i][0] *= correct_low; output[i][1] *= correct_low;
        output[i][2] *= correct_high; output[i][3] *= correct_high;
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const unsigned a0 = pack2(score[i][0], score[i][1]), a1 = pack2(score[i][2], score[i][3]);
        const unsigned a2 = pack2(score[i + 1][0], score[i + 1][1]), a3 = pack2(score[i + 1][2], score[i + 1][3]);
#pragma unroll
        for (int n = 0; n < D; n += 16) {
          unsigned b[4];
          load_transposed(b, &tile.values[half * 32 + i * 8 + (matrix & 1) * 8 + r][n + (matrix >> 1) * 8]);
          mma(output[n / 8], a0, a1, a2, a3, b[0], b[1]);
          mma(output[n / 8 + 1], a0, a1, a2, a3, b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the tile may be filled again
    fetch(index + 2);
  }

  // The partial results of this block's halves, then those of all blocks together.
  float (*results)[QUERIES][SUMS] = (float (*)[QUERIES][SUMS])dynamic;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    sum_low += __shfl_xor_sync(0xFFFFFFFFu, sum_low, distance);
    sum_high += __shfl_xor_sync(0xFFFFFFFFu, sum_high, distance);
  }
  __syncthreads();  // every warp is done with the tiles, also where this block has none
  if (works) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      results[half][query_low][i * 8 + 2 * t] = output[i][0];
      results[half][query_low][i * 8 + 2 * t + 1] = output[i][1];
      results[half][query_high][i * 8 + 2 * t] = output[i][2];
      results[half][query_high][i * 8 + 2 * t + 1] = output[i][3];
    }
    if (t == 0) {
      shared.highest[half][query_low] = highest_low;
      shared.highest[half][query_high] = highest_high;
      shared.denominator[half][query_low] = sum_low;
      shared.denominator[half][query_high] = sum_high;
    }
  }
  __syncwarp();
  cluster_sync();
  // A warp per query; lane p < 16 knows partial result p: of block p / 2, half p % 2.
  for (int query = part + PARTS * warp; query < rows * GROUP; query += PARTS * (THREADS / 32)) {
    const unsigned own = lane & 15;
    const float top = load_other(other_block(shared_address(&shared.highest[own & 1][query]), own >> 1));
    float all = top;
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) all = fmaxf(all, __shfl_xor_sync(0xFFFFFFFFu, all, distance));
    const float factor = __expf(top - all);
    float denominator = factor * load_other(other_block(shared_address(&shared.denominator[own & 1][query]), own >> 1));
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2)
      denominator += __shfl_xor_sync(0xFFFFFFFFu, denominator, distance);
    Float4 total_of = {0.f, 0.f, 0.f, 0.f};
    const int column = lane % (D / 4) * 4;
#pragma unroll
    for (int p = 0; p < 2 * PARTS; ++p) {
      const Float4 v = load_other4(other_block(shared_address(&results[p & 1][query][column]), p >> 1));
      const float weight = __shfl_sync(0xFFFFFFFFu, factor, p);
      total_of.x += weight * v.x; total_of.y += weight * v.y; total_of.z += weight * v.z; total_of.w += weight * v.w;
    }
    if (lane < D / 4) {
      unsigned* to = (unsigned*)(out + ((long long)(query / GROUP) * heads + kv_head * GROUP + query % GROUP) * D + column);
      to[0] = pack2(total_of.x / denominator, total_of.y / denominator);
      to[1] = pack2(total_of.z / denominator, total_of.w / denominator);
    }
  }
  __syncwarp();
  cluster_meet();  // no block ends while another reads from it
}
