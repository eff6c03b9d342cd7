// The parts of CUDA that subspec/kernels/int4.cu uses, as C++ in one host thread: every thread of a block is a context
// that runs until it waits. Threads take turns in an order drawn from a seed.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

#define __expf expf

using std::min;

struct float2 { float x, y; };
struct Place { int x, y, z; };
struct Word4;
static Place gridDim, blockIdx, threadIdx;

namespace emulated {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int number;
  bool done = false;
  std::function<bool()> ready;
};

struct Rendezvous { int count = 0, generation = 0; };

static std::vector<std::unique_ptr<Thread>> threads;
static Thread* current;
static ucontext_t scheduler;
static std::map<int, Rendezvous> meetings;
static std::function<void()> body;
static unsigned lanes[64][32][6];

static const char* problem;  // the first one, which ends the block

static void fail(const char* why) {
  problem = why;
  if (current) swapcontext(&current->context, &scheduler);
}

static void pause_until(std::function<bool()> ready) {
  while (!ready()) {
    current->ready = ready;
    swapcontext(&current->context, &scheduler);
  }
  current->ready = nullptr;
  threadIdx.x = current->number;
}

static void meet(int which, int count) {
  Rendezvous& own = meetings[which];
  const int generation = own.generation;
  if (++own.count == count) {
    own.count = 0;
    ++own.generation;
    return;
  }
  pause_until([&own, generation] { return own.generation != generation; });
}

static void run_block(int count, unsigned seed) {
  std::mt19937 draw(seed);
  problem = nullptr;
  meetings.clear();
  threads.clear();
  for (int i = 0; i < count; ++i) {
    threads.push_back(std::make_unique<Thread>());
    Thread& own = *threads.back();
    own.number = i;
    getcontext(&own.context);
    own.context.uc_stack.ss_sp = own.stack.data();
    own.context.uc_stack.ss_size = own.stack.size();
    own.context.uc_link = &scheduler;
    makecontext(&own.context, (void (*)())+[] { body(); current->done = true; }, 0);
  }
  for (int left = count; left;) {
    bool moved = false;
    const int start = draw() % count, step = draw() % 2 ? 1 : count - 1;
    for (int i = 0, at = start; i < count; ++i, at = (at + step) % count) {
      Thread& own = *threads[at];
      if (own.done || (own.ready && !own.ready())) continue;
      current = &own;
      threadIdx.x = own.number;
      swapcontext(&scheduler, &own.context);
      current = nullptr;
      if (problem) return;
      moved = true;
      left -= own.done;
    }
    if (!moved) return fail("every thread waits");
  }
}

}  // namespace emulated

static void __syncthreads() { emulated::meet(-1, (int)emulated::threads.size()); }
static void __syncwarp() { emulated::meet(threadIdx.x / 32, 32); }
static void release_next() {}
static void wait_for_previous() {}

struct Word4;
struct Word2;
static Word4 load_once(const Word4* p);
static Word2 load_once(const Word2* p);
static Word4 load(const Word4* p);

static float half_value(unsigned half) {  // of a finite one
  const unsigned exponent = (half >> 10) & 31, fraction = half & 1023;
  const float size = exponent ? ldexpf(1024 + fraction, (int)exponent - 25) : ldexpf(fraction, -24);
  return half >> 15 & 1 ? -size : size;
}

static void mma_half(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned(*all)[6] = emulated::lanes[warp];
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(all[lane], own, sizeof own);
  __syncwarp();
  const auto half = [](unsigned word, int k) { return half_value(k & 1 ? word >> 16 : word & 0xffff); };
  for (int j = 0; j < 4; ++j) {  // PTX ISA, fragments of mma.m16n8k16
    const int row = lane / 4 + (j >= 2 ? 8 : 0), column = 2 * (lane % 4) + (j & 1);
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const int t = (k % 8) / 2;
      const unsigned a = all[(row % 8) * 4 + t][row / 8 + 2 * (k / 8)], b = all[column * 4 + t][4 + k / 8];
      sum += half(a, k) * half(b, k);
    }
    d[j] += sum;
  }
  __syncwarp();
}

template <unsigned MASK, unsigned BASE>
static unsigned masked_on(unsigned value) { return (value & MASK) | BASE; }

static float2 half_pair(unsigned v) { return {half_value(v & 0xffff), half_value(v >> 16)}; }

static unsigned short to_half(float v) {
  const float size = fminf(fabsf(v), 65504.f);
  int exponent = -14;
  if (size > 0.f) frexpf(size, &exponent), exponent = std::max(exponent - 1, -14);
  const unsigned steps = (unsigned)nearbyintf(ldexpf(size, 10 - exponent));  // a carry goes on to the exponent
  return (unsigned short)((v < 0.f ? 0x8000u : 0u) | (((unsigned)(exponent + 14) << 10) + steps));
}

static unsigned short to_bf16(float v) {
  unsigned bits;
  memcpy(&bits, &v, 4);
  return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
