import ctypes
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.kernels import int4
from tests.helpers.host_cuda import compile_host


def codes(n, k, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scale = torch.rand(n, k // 64, generator=g) * 0.01 + 0.001
    zero = torch.rand(n, k // 64, generator=g) * 15
    return q.to(device), scale.to(device), zero.to(device)


def dense(q, scale, zero):
    scale, zero = scale.half().float(), zero.half().float()
    return (scale[..., None] * (q.float().unflatten(1, (-1, 64)) - zero[..., None])).flatten(1)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 100), groups=st.integers(1, 4), tiles=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99)
)
def test_packing_loses_nothing(n, groups, tiles, seed):
    parts = codes(n, groups * 64, seed)
    weight = int4.pack(*parts, tiles=tiles)
    assert torch.equal(int4.unpack(weight), dense(*parts))
    assert weight.padded % (tiles * 16) == 0


def test_a_word_holds_the_nibbles_its_thread_multiplies():
    """The fragment layout of mma.m16n8k16 (PTX ISA), with k permuted so that a thread's x values are neighbours."""
    q, scale, zero = codes(96, 192)
    weight = int4.pack(q, scale, zero, tiles=2)
    for block in range(3):
        for group in range(3):
            for tile in range(2):
                for lane in (0, 1, 6, 17, 31):
                    g, t = divmod(lane, 4)
                    for step in range(4):
                        word = int(weight.words[block, group, tile, lane, step]) & 0xFFFFFFFF
                        for register in range(4):
                            for element in range(2):
                                row = block * 32 + tile * 16 + g + 8 * (register % 2)
                                column = group * 64 + t * 16 + step * 4 + 2 * (register // 2) + element
                                nibble = (word >> (4 * register + 16 * element)) & 15
                                assert nibble == int(q[row, column])


def test_interleaving_alternates_sixteen_rows():
    gate, up = torch.arange(32)[:, None], torch.arange(100, 132)[:, None]
    rows = int4.interleave(gate, up)[:, 0].tolist()
    assert rows == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]


def test_the_swiglu_reference_undoes_the_interleaving():
    torch.manual_seed(0)
    gate, up, x = torch.randn(32, 64), torch.randn(32, 64), torch.randn(3, 64)
    q = torch.randint(0, 16, (64, 64))
    weight = int4.pack(q, torch.ones(64, 1), torch.zeros(64, 1), tiles=2, swiglu=True)
    y = x @ q.float().t()
    y = y.unflatten(-1, (-1, 2, 16))
    expected = (torch.nn.functional.silu(y[:, :, 0]) * y[:, :, 1]).flatten(1)
    torch.testing.assert_close(int4.reference(weight, x), expected)
    assert gate.shape == up.shape


def test_shapes_the_kernel_has_not_are_refused():
    with pytest.raises(ValueError, match="multiple of the group size 64"):
        int4.pack(torch.zeros(16, 96), torch.zeros(16, 2), torch.zeros(16, 2), tiles=2)
    with pytest.raises(ValueError, match="multiple of 32"):
        int4.pack(torch.zeros(48, 64), torch.zeros(48, 1), torch.zeros(48, 1), tiles=2, swiglu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 6, 8])
@pytest.mark.parametrize(
    ("n", "k", "tiles"), [(4608, 3584, 2), (37888, 3584, 4), (3584, 18944, 2), (960, 576, 2)]
)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("warps", [4, 8])
def test_the_kernel_computes_the_reference(rows, n, k, tiles, swiglu, warps):
    assert int4.unavailable() is None
    weight = int4.pack(*codes(n, k, device="cuda"), tiles=tiles, swiglu=swiglu)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    out = run(weight, x, 1 if swiglu else 3, warps)
    result = out.float() if swiglu else out.sum(0)
    expected = int4.reference(weight, x)
    result = result[:, : expected.shape[1]]
    error = (result - expected).norm() / expected.norm()
    assert error < (5e-3 if swiglu else 1e-3)


def run(weight, x, splits, warps):
    rows = x.shape[0]
    if weight.swiglu:
        out = torch.full((rows, weight.padded // 2), torch.nan, dtype=torch.bfloat16, device="cuda")
    else:
        out = torch.full((splits, rows, weight.padded), torch.nan, dtype=torch.float32, device="cuda")
    int4.linear(weight, x, out, splits=splits, warps=warps)
    return out


# ------------------------------------------------------------------------- the CUDA sources, emulated

EMULATED = r"""
#define HOST_TEST
#include "{emulation}"
#include "few_rows.cu"
#include "int4.cu"
static Word4 load_once(const Word4* p) {{ return *p; }}
static Word4 load(const Word4* p) {{ return *p; }}
extern "C" const char* go(const Word4* weight, const Word4* meta, const Word4* x, void* out, int rows, int n,
                          int groups, int split, int blocks, int slices, unsigned seed) {{
  gridDim = {{blocks, slices, 1}};
  emulated::body = [=] {{ int4_linear(weight, meta, x, out, rows, n, groups, split); }};
  for (int y = 0; y < slices; ++y)
    for (int b = 0; b < blocks; ++b) {{
      blockIdx = {{b, y, 0}};
      emulated::run_block(32 * WARPS, seed + 7 * b);
      if (emulated::problem) return emulated::problem;
    }}
  return nullptr;
}}
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA source as C++: a function of the kernel's settings."""
    folder = tmp_path_factory.mktemp("int4")

    @functools.cache
    def build(tiles, swiglu, warps):
        source = EMULATED.format(emulation=Path(__file__).parents[1] / "helpers" / "emulate_cuda.h")
        settings = {"TILES": tiles, "WARPS": warps, "SWIGLU": int(swiglu), "OVERLAP": 1}
        go = compile_host(folder, source, settings).go
        go.restype = ctypes.c_char_p
        return go

    return build


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def check(weight, x, out):
    expected = int4.reference(weight, x)
    got = out.float() if weight.swiglu else out.sum(0)
    assert not torch.isnan(out).any()
    error = (got[:, : expected.shape[1]] - expected).norm() / expected.norm()
    assert error < (5e-3 if weight.swiglu else 1e-5), error


def empty_output(weight, rows, slices):
    if weight.swiglu:
        return torch.full((rows, weight.padded // 2), torch.nan, dtype=torch.bfloat16)
    return torch.full((slices, rows, weight.padded), torch.nan)


@pytest.mark.parametrize(
    ("n", "groups", "tiles", "swiglu", "rows", "splits", "warps"),
    [
        (70, 11, 4, False, 3, 2, 8),
        (64, 9, 2, True, 8, 1, 4),
        (96, 9, 4, True, 5, 1, 4),
        (40, 3, 2, False, 6, 1, 8),
    ],
)
def test_the_source_computes_the_reference(emulated, n, groups, tiles, swiglu, rows, splits, warps):
    weight = int4.pack(*codes(n, groups * 64), tiles=tiles, swiglu=swiglu)
    x = torch.randn(rows, groups * 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = empty_output(weight, rows, splits)
    parts = [pointer(tensor) for tensor in (weight.words, weight.meta, x, out)]
    blocks, split = weight.words.shape[0], -(-groups // splits)
    problem = emulated(tiles, swiglu, warps)(*parts, rows, weight.padded, groups, split, blocks, splits, 0)
    assert problem is None, problem
    check(weight, x, out)
