"""Our integer kernel: its packing for every number of bits, its torch reference, and the CUDA source, emulated."""

import ctypes
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from subspec.config.quant_checks import HQQ_BITS
from subspec.kernels import few_rows, int4
from subspec.kernels.group_scales import containing, nearest_zero, zeros_in
from tests.helpers.host_cuda import compile_host

BITS = st.sampled_from(HQQ_BITS)


def integers(n, k, bits=4, group=64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=g) * 0.01 + 0.001
    zero = nearest_zero(torch.rand(n, k // group, generator=g) * ((1 << bits) - 1), bits)
    return [part.to(device) for part in (q, containing(scale, zero, bits), zero)]


def dense(q, scale, zero):
    """The dequantized weight, float64."""
    q, scale, zero = q.double(), scale.double(), zero.double()
    return (scale[..., None] * (q.unflatten(1, (scale.shape[1], -1)) - zero[..., None])).flatten(1)


def inputs(rows, k, device="cpu"):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).half().to(device)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 100),
    groups=st.integers(1, 4),
    wide=st.sampled_from([1, 2, 3]),
    bits=BITS,
    tiles=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_packing_loses_nothing(n, groups, wide, bits, tiles, seed):
    q, scale, zero = integers(n, groups * wide * 64, bits, wide * 64, seed)
    weight = int4.pack(q, scale, zero, tiles=tiles, bits=bits)
    for part, known in zip(weight.unpack_integers(), (q, scale, zero), strict=True):
        assert torch.equal(part, known if known is q else known.repeat_interleave(wide, 1))
    assert weight.padded % (tiles * 16) == 0
    assert weight.nbytes == int4.packed_bytes(weight.padded, q.shape[1], bits)


def test_packing_in_pieces_changes_nothing(monkeypatch):
    parts = integers(100, 192, 8)
    whole = int4.pack(*parts, tiles=2, bits=8)
    monkeypatch.setattr(int4, "PACKED_AT_ONCE", 32 * 192)
    assert torch.equal(int4.pack(*parts, tiles=2, bits=8).words, whole.words)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_word_holds_the_nibbles_its_thread_multiplies(bits):
    """The fragment layout of mma.m16n8k16 (PTX ISA), with k permuted so that a thread's x values are neighbours."""
    q, scale, zero = integers(96, 192, bits)
    weight, planes = int4.pack(q, scale, zero, tiles=2, bits=bits), int4.planes_of(bits)
    for block, group, tile, lane in [(0, 0, 0, 0), (1, 2, 1, 6), (2, 1, 0, 17), (2, 2, 1, 31)]:
        g, t = divmod(lane, 4)
        for plane in range(planes):
            row = block * 32 + tile * 16 + g
            for half, own in enumerate(weight.scales[block, group * planes + plane, g, tile]):
                assert own == scale[row + 8 * half, group] * 16**plane
                assert zeros_in(own, 4) == zero[row + 8 * half, group] / (17 if planes == 2 else 1)
            for step in range(4):
                word = int(weight.words[block, group * planes + plane, tile, lane, step]) & 0xFFFFFFFF
                for register, element in ((0, 0), (1, 0), (2, 1), (3, 1)):
                    column = group * 64 + t * 16 + step * 4 + 2 * (register // 2) + element
                    nibble = (word >> (4 * register + 16 * element)) & 15
                    assert nibble == int(q[row + 8 * (register % 2), column]) >> 4 * plane & 15


def test_interleaving_alternates_sixteen_rows():
    gate, up = torch.arange(32)[:, None], torch.arange(100, 132)[:, None]
    rows = few_rows.interleave(gate, up)[:, 0].tolist()
    assert rows == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]


@settings(max_examples=10, deadline=None)
@given(bits=BITS, swiglu=st.booleans(), seed=st.integers(0, 99))
def test_the_reference_is_the_product_with_the_dequantized_weight(bits, swiglu, seed):
    parts, x = integers(64, 512, bits, 128, seed), inputs(3, 512)
    weight = int4.pack(*parts, tiles=2, bits=bits, swiglu=swiglu)
    y = x.double() @ dense(*parts).t()
    if swiglu:
        gate, up = y.unflatten(-1, (-1, 2, 16)).unbind(-2)
        y = (functional.silu(gate) * up).flatten(1)
    assert (weight.reference(x) - y).norm() / y.norm() < 1e-6


def test_shapes_the_kernel_has_not_are_refused():
    assert int4.unfit(96, 32) == "96 inputs are not a multiple of 64"
    assert int4.unfit(128, 32) == "its groups are multiples of 64, not 32"
    assert int4.unfit(384, 192) is None
    with pytest.raises(ValueError, match="multiple of 64"):
        int4.pack(*integers(16, 96, 4, 48), tiles=2)
    q, scale, zero = integers(16, 64)
    with pytest.raises(ValueError, match="group_scales"):
        int4.pack(q, scale * 1.01, zero, tiles=2)
    with pytest.raises(ValueError, match="multiple of 32"):
        int4.pack(*integers(48, 64), tiles=2, swiglu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6, 8, 38, 70])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "tiles"), [(37888, 3584, 4), (3584, 18944, 2), (960, 576, 2)])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("warps", [4, 8])
def test_the_kernel_computes_the_reference(rows, bits, n, k, tiles, swiglu, warps):
    assert int4.unavailable() is None
    weight = int4.pack(*integers(n, k, bits, device="cuda"), tiles=tiles, bits=bits, swiglu=swiglu)
    x, splits = inputs(rows, k, "cuda"), 1 if swiglu else 3
    for dtype in (torch.float16, torch.bfloat16):
        out = empty_output(weight, rows, splits, "cuda", dtype)
        weight.multiply(x, out, splits=splits, warps=warps)
        check(weight, x, out, 1e-3)


def empty_output(weight, rows, slices, device="cpu", dtype=torch.float16):
    if weight.swiglu:
        return torch.full((rows, weight.padded // 2), torch.nan, dtype=dtype, device=device)
    return torch.full((slices, rows, weight.padded), torch.nan, device=device)


def check(weight, x, out, most):
    most_of_type = torch.finfo(out.dtype).max  # float16 ends at 65504, which products of 8 bits and many inputs exceed
    expected = weight.reference(x).clamp(-most_of_type, most_of_type)
    got = out.float() if weight.swiglu else out.sum(0)
    assert not torch.isnan(out).any()
    error = (got[:, : expected.shape[1]] - expected).norm() / expected.norm()
    assert error < (max(most, 5e-3) if weight.swiglu else most), error


# ------------------------------------------------------------------------- the CUDA sources, emulated

EMULATED = r"""
#define HOST_TEST
#include "{emulation}"
#include "few_rows.cu"
#include "int4.cu"
static Word4 load_once(const Word4* p) {{ return *p; }}
static Word2 load_once(const Word2* p) {{ return *p; }}
static Word4 load(const Word4* p) {{ return *p; }}
extern "C" const char* go(const Word4* weight, const Scales* meta, const Word4* x, void* out, int rows, int n,
                          int groups, int split, int blocks, int slices, unsigned seed) {{
  const int pieces = (rows + 8 * EIGHTS - 1) / (8 * EIGHTS);
  gridDim = {{blocks, slices, pieces}};
  emulated::body = [=] {{ int4_linear(weight, meta, x, out, rows, n, groups, split); }};
  for (int z = 0; z < pieces; ++z)
    for (int y = 0; y < slices; ++y)
      for (int b = 0; b < blocks; ++b) {{
        blockIdx = {{b, y, z}};
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
    def build(tiles, planes, swiglu, warps, eights, half_out):
        source = EMULATED.format(emulation=Path(__file__).parents[1] / "helpers" / "emulate_cuda.h")
        settings = {"TILES": tiles, "WARPS": warps, "EIGHTS": eights, "PLANES": planes, "SWIGLU": int(swiglu)}
        go = compile_host(folder, source, settings | dict.fromkeys(["OVERLAP", *half_out], 1)).go
        go.restype = ctypes.c_char_p
        return go

    return build


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize(
    ("n", "k", "bits", "tiles", "swiglu", "rows", "splits", "warps"),
    [
        (70, 11 * 64, 4, 4, False, 3, 2, 8),
        (40, 7 * 64, 8, 2, False, 6, 3, 4),
        (64, 5 * 64, 8, 2, True, 8, 1, 4),
        (40, 6 * 64, 4, 2, False, 21, 2, 4),
        (64, 3 * 64, 4, 2, True, 38, 1, 4),
        pytest.param(64, 9 * 64, 2, 2, True, 8, 1, 4, marks=pytest.mark.slow),
        pytest.param(96, 9 * 64, 3, 4, True, 5, 1, 4, marks=pytest.mark.slow),
        pytest.param(40, 3 * 64, 8, 4, False, 6, 1, 8, marks=pytest.mark.slow),
    ],
)
def test_the_source_computes_the_reference(emulated, n, k, bits, tiles, swiglu, rows, splits, warps):
    weight, x = int4.pack(*integers(n, k, bits), tiles=tiles, bits=bits, swiglu=swiglu), inputs(rows, k)
    out = empty_output(weight, rows, splits, dtype=torch.bfloat16 if rows == 8 else torch.float16)
    parts = [pointer(tensor) for tensor in (weight.words, weight.scales, x, out)]
    blocks, groups = weight.words.shape[:2]
    go = emulated(tiles, weight.planes, swiglu, warps, few_rows.eights_of(rows)[0], tuple(few_rows.half_out(out)))
    problem = go(*parts, rows, weight.padded, groups, -(-groups // splits), blocks, splits, 0)
    assert problem is None, problem
    check(weight, x, out, 1e-5)
