import ctypes
import functools

import pytest
import torch

from subspec.codec import format
from subspec.codec.restore import macros_of
from subspec.quant.hadamard import LEAST_BLOCK
from tests.helpers.host_cuda import compile_host


@pytest.fixture
def quick(request, monkeypatch):
    """A tiny model gains nothing from threads; the torch reference takes a step per weight of a chunk.

    Chunks of real length stay in tests on a GPU, in slow tests, and in tests of the format.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    real = any(request.node.get_closest_marker(name) for name in ("gpu", "slow"))
    if not real and "format" not in request.node.name:
        monkeypatch.setattr(format, "CHUNK", 16)
    yield
    torch.set_num_threads(threads)


HOST = r"""
#define HOST_TEST
#include "restore.cu"
#include <cstdlib>

#ifdef WIDTH
#include "restore_integers.cu"
// A block's threads one after the other, between the barriers of the kernel.
static void restore_block(const Part& part, const unsigned char* flat, long long block) {
  static Entry table[LEVELS * THREADS];
  static unsigned ring[(RING + 1) * THREADS];
  alignas(16) static unsigned lines[LINE * THREADS];
  for (Entry& entry : table) entry = {(unsigned)rand(), (float)rand()};
  for (unsigned& word : ring) word = rand();
  for (unsigned& word : lines) word = rand();
  static Lane lanes[THREADS];
  const long long first = (block - part.first_block) * THREADS;
  for (int t = 0; t < THREADS; ++t) begin_chunk(lanes[t], part, flat, first + t, ring + t);
  for (int step = 0; step < STEPS; ++step) {
    for (int t = 0; t < THREADS; ++t)
      if (step < lanes[t].steps) restore_step(lanes[t], part, step, table + t, lines + t * LINE);
    for (int t = 0; t < THREADS; ++t)
      write_lines(part, first + t / 32 * 32, step, t % 32, lines + t / 32 * 32 * LINE);
  }
}
#else
#include "restore_codebook.cu"
static void restore_block(const Part& part, const unsigned char* flat, long long block) {
  for (int t = 0; t < THREADS; ++t) {
    const long long chunk = (block - part.first_block) * THREADS + t;
    if (chunk * CHUNK < part.total) restore_chunk(part, flat, chunk);
  }
}
#endif

extern "C" void restore(const Part* parts, const unsigned char* flat, int count, int blocks) {
  for (int block = 0; block < blocks; ++block) restore_block(part_of(parts, count, block), flat, block);
}
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The CUDA source as C++, by kernel."""
    folder = tmp_path_factory.mktemp("codec")
    return functools.cache(lambda kernel: compile_host(folder, HOST, macros_of(kernel[1])))


DEQUANTIZE = r"""
#define HOST_TEST
#include "restore.cu"
#include "codebook_dequantize.cu"
extern "C" void dequantize(const Rotated* parts, int count, int blocks) {
  static float v[32 * STEPS][16], before[32 * STEPS][16];
  alignas(16) static float shared[ROWS * ROW_STRIDE];
  for (int block = 0; block < blocks; ++block) {
    const Rotated& part = part_of(parts, count, block);
    const Site site = site_of(part, block - (int)part.first_block);
    for (int i = 0; i < 32 * STEPS; ++i) {
      look_up(v[i], part, (const unsigned*)part.table, site, i);
      within(v[i]);
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      memcpy(before, v, sizeof v);
      for (int i = 0; i < 32 * STEPS; ++i)
        for (int j = 0; j < 16; ++j) v[i][j] = across(before[i][j], before[i ^ mask][j], i & mask);
    }
    for (int i = 0; i < 32 * STEPS; ++i) put(shared, v[i], i);
    for (int i = 0; i < 32 * STEPS; ++i) finish(shared, part, site, i);
  }
}
"""


@pytest.fixture(scope="session")
def dequantize(tmp_path_factory):
    """The launch of :func:`~subspec.codec.codebook_dequantize.dequantizing` over alike parts, as C++."""
    folder = tmp_path_factory.mktemp("dequantize")
    library = functools.cache(lambda bits, steps: compile_host(folder, DEQUANTIZE, {"BITS": bits, "STEPS": steps}))

    def run(parts):
        rows, blocks = [], 0
        for part in parts:
            rows.append([*part.describe(), blocks])
            blocks += part.blocks
        table, linear = torch.tensor(rows), parts[0].linear
        run_all = library(linear.weight.bits, linear.rotation.block // LEAST_BLOCK).dequantize
        run_all(ctypes.c_void_p(table.data_ptr()), len(parts), blocks)

    return run
