"""Weights coded by HIGGS come back bit for bit, from weights that are dequantized to the same bits everywhere."""

import ctypes
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.codebook_dequantize import ROWS, Rotated, dequantizing
from subspec.codec.format import encode, restore
from subspec.codec.restore import Rows, quantized_rows, restore_into
from subspec.quant.codebook_linear import HiggsFormat, make_codebook_linear
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import LEAST_BLOCK, Rotation, butterfly, walsh_hadamard
from subspec.quant.level_linear import Dense, Variant
from subspec.quant.pairs import QuantizedPairs, group_of, quantize_pairs
from tests.codec.test_codec import (
    DEVICES,
    EVERY_BFLOAT16,
    gaussian,
    members_of,
    restorations_of,
    run_on_host,
    same,
    spoiled,
)
from tests.helpers.host_cuda import compile_host

HALVES = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def higgs(weight, bits=4, dim=2, group=256, block=512):
    return quantize_pairs(weight, bits=bits, dim=dim, group_size=group, hadamard_size=block)


def made_up(n, k, *, bits, group=256, block=512, seed=0, every_scale=True):
    """Codes that no weight has: random pairs, and scales that may be anything of 16 bits, NaN and infinite included."""
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation.of(k, block)
    group = group_of(rotation.padded, group)
    pairs = torch.randint(0, 4**bits, (n, rotation.padded // 2), dtype=torch.uint8, generator=generator)
    shape = (n, rotation.padded // group)
    usual = torch.rand(shape, generator=generator).half() * 0.01 + 0.01
    scale = HALVES[torch.randint(0, 1 << 16, shape, generator=generator)] if every_scale else usual
    return QuantizedPairs(pairs, scale, load_grid(bits, 2), group, rotation)


def alike(a, b):
    """The same bits, but for what kind of NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and same(a.nan_to_num(0.0), b.nan_to_num(0.0))


# ------------------------------------------------------------------------------------------- the code itself


@pytest.mark.parametrize(
    ("bits", "dim", "n", "k", "group", "block"),
    [(2, 2, 24, 512, 256, 512), (3, 1, 5, 384, 256, 512), (4, 1, 9, 100, 64, 64), (4, 2, 1, 64, 64, 1024)],
)
def test_a_quantized_weight_comes_back(bits, dim, n, k, group, block):
    weight = gaussian(n, k)
    codes = higgs(weight, bits, dim, group, block)
    for exact in (weight, spoiled(weight)):
        assert same(restore(encode(exact, codes, codes.margin), codes), exact)


@pytest.mark.parametrize(("bits", "dim"), [(4, 1), (4, 2), (3, 2), (2, 1)])
def test_a_gaussian_weight_takes_about_the_bits_that_the_planner_reserves(bits, dim):
    weight = gaussian(256, 1024)
    codes = higgs(weight, bits, dim)
    coded = encode(weight, codes, codes.margin)
    reserved = HiggsFormat(bits, dim).coded_bits
    assert reserved - 0.25 < coded.bits_per_weight < reserved


def test_shorter_codes_lie_in_the_middle_of_the_interval(monkeypatch):
    weight = gaussian(128, 1024)
    codes = higgs(weight)
    middle = encode(weight, codes, codes.margin).bits_per_weight
    monkeypatch.setattr(QuantizedPairs, "centred", False)
    aside = encode(weight, codes, codes.margin)
    assert same(restore(aside, codes), weight)
    assert middle < aside.bits_per_weight - 0.1


@settings(max_examples=8)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 700),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([64, 128, 256]),
    block=st.sampled_from([64, 128, 512, 1024]),
    margin=st.sampled_from([0.0, 0.25, 3.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_every_bit_pattern_survives_any_pairs_and_scales(n, k, bits, group, block, margin, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = EVERY_BFLOAT16[torch.randint(0, 1 << 16, (n, k), generator=generator)]
    for codes in (
        made_up(n, k, bits=bits, group=group, block=block, seed=seed),
        made_up(n, k, bits=bits, group=group, block=block, seed=seed, every_scale=False),
    ):
        assert same(restore(encode(weight, codes, margin), codes), weight)


def test_constant_rows_and_zeros():
    weight = torch.zeros(8, 192, dtype=torch.bfloat16)
    weight[3], weight[5] = 0.25, -1e-39
    codes = higgs(weight)
    assert same(restore(encode(weight, codes, codes.margin), codes), weight)


def test_intervals_do_not_depend_on_the_piece_they_are_asked_for():
    codes = made_up(7, 300, bits=3, every_scale=False)
    whole = codes.interval(0, 2100, codes.margin)
    for begin, end in [(0, 1), (299, 301), (512, 1024), (1999, 2100)]:
        for part, all_of_it in zip(codes.interval(begin, end, codes.margin), whole, strict=True):
            assert torch.equal(part, all_of_it[begin:end])


def test_residuals_have_the_deviation_that_the_reach_is_counted_in():
    weight = gaussian(256, 1024)
    codes = higgs(weight)
    low, high = codes.interval(0, weight.numel(), codes.grid.mse**0.5)
    deviations = (weight.float().flatten() - codes.rebuild().float().flatten()) / ((high - low) / 2)
    assert deviations.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_a_butterfly_is_the_transform_without_its_factor():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 64, 256):
        torch.testing.assert_close(butterfly(x, size) * size**-0.5, walsh_hadamard(x, size))


@pytest.mark.parametrize("k", [512, 576, 100])
def test_rebuilding_is_dequantizing(k):
    codes = higgs(gaussian(16, k))
    torch.testing.assert_close(codes.rebuild().float(), codes.dequantize(), atol=1e-4, rtol=2**-8)


# ------------------------------------------------------------------------- from the kernel's own order of codes

CASES = [  # bits, block, tiles, gate and up, inputs: chunks of 512 begin within rows and within blocks
    (4, 512, 2, False, 1536),
    (3, 64, 4, False, 576),
    (2, 128, 2, True, 128),
    (4, 64, 4, False, 37),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(4, 1024, 4, True, 1024), (4, 128, 2, True, 384), (3, 256, 2, False, 256), (2, 64, 2, False, 100)]
    ),
]


def fused(parts, bits, block, tiles, swiglu):
    """Several weights quantized and fused as a draft level has them: the Linear, and each weight's codes and rows."""
    codes = [higgs(part, bits, block=block) for part in parts]
    linear = make_codebook_linear(codes[0].stacked(codes[1:], swiglu=swiglu), Variant("lut_mma", tiles), swiglu=swiglu)
    return linear, members_of(parts, codes, swiglu)


def parts_of(swiglu, k):
    return [gaussian(n, k, n) for n in ((64, 64) if swiglu else (37, 8, 19))]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_restoring_reads_the_kernels_own_order(bits, block, tiles, swiglu, k, device):
    parts = [part.to(device) for part in parts_of(swiglu, k)]
    linear, members = fused(parts, bits, block, tiles, swiglu)
    for weight, codes, rows in members:
        own = quantized_rows(linear, rows, weight.shape[0])
        assert torch.equal(own.pairs, codes.pairs)
        assert torch.equal(own.scale, codes.scale)
        assert (own.group_size, own.rotation, own.grid) == (codes.group_size, codes.rotation, codes.grid)
        coded = encode(weight, codes, codes.margin)
        out = torch.full_like(weight, 5.0)
        restore_into(out, coded, linear, rows)
        assert same(out, weight)


def test_other_kernels_orders_are_not_guessed():
    with pytest.raises(TypeError, match="dense"):
        quantized_rows(Dense(gaussian(32, 128)), Rows(0, False), 32)


def made_up_linear(count, k, bits, block, tiles, swiglu, every_scale, device="cpu"):
    """A fused Linear of two weights of ``count`` rows; each one's codes and rows."""
    codes = [made_up(count, k, bits=bits, block=block, seed=seed, every_scale=every_scale) for seed in range(2)]
    stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
    there = replace(stacked, pairs=stacked.pairs.to(device), scale=stacked.scale.to(device))
    linear = make_codebook_linear(there, Variant("lut_mma", tiles), swiglu=swiglu)
    rows = [Rows(16 * number, True) if swiglu else Rows(count * number, False) for number in range(2)]
    return linear, list(zip(codes, rows, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("every_scale", [False, True])
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_device_rebuilds_what_a_cpu_rebuilds(bits, block, tiles, swiglu, k, every_scale):
    linear, members = made_up_linear(64, k, bits, block, tiles, swiglu, every_scale, "cuda")
    outs = [torch.full((64, k), 5.0, dtype=torch.bfloat16, device="cuda") for _ in members]
    both = zip(outs, members, strict=True)
    parts = [Rotated(out, linear, rows.first, rows.interleaved) for out, (_, rows) in both]
    for launch in dequantizing(parts):
        launch()
    for out, (codes, _) in zip(outs, members, strict=True):
        assert alike(out.cpu(), codes.rebuild())
        there = replace(codes, pairs=codes.pairs.cuda(), scale=codes.scale.cuda())
        assert alike(there.rebuild().cpu(), codes.rebuild())


# ------------------------------------------------------------------------------- the CUDA source, as plain C++

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


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The CUDA source of the dequantizing kernel as C++, by bits and block."""
    folder = tmp_path_factory.mktemp("dequantize")
    return functools.cache(
        lambda bits, block: compile_host(folder, DEQUANTIZE, {"BITS": bits, "STEPS": block // LEAST_BLOCK})
    )


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def dequantize_on_host(library, parts):
    """The launch of :func:`dequantizing`."""
    rows, blocks = [], 0
    for part in parts:
        rows.append([*part.describe(), blocks])
        blocks += part.blocks
    table = torch.tensor(rows)
    library.dequantize(pointer(table), len(parts), blocks)


@pytest.mark.parametrize("every_scale", [False, True])
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_cuda_source_rebuilds_what_torch_rebuilds(on_host, bits, block, tiles, swiglu, k, every_scale):
    """All weights of a fused Linear in one launch."""
    count = 64 if swiglu else 3 * ROWS + 5
    linear, members = made_up_linear(count, k, bits, block, tiles, swiglu, every_scale)
    outs = [torch.full((count, k), 5.0, dtype=torch.bfloat16) for _ in members]
    both = zip(outs, members, strict=True)
    parts = [Rotated(out, linear, rows.first, rows.interleaved) for out, (_, rows) in both]
    dequantize_on_host(on_host(bits, block), parts)
    for out, (codes, _) in zip(outs, members, strict=True):
        assert alike(out, codes.rebuild())


@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_cuda_source_restores_what_torch_encoded(compiled, on_host, bits, block, tiles, swiglu, k):
    """All weights of a fused Linear in one call, from one run of bytes, as a layer's are."""
    linear, members = fused(parts_of(swiglu, k), bits, block, tiles, swiglu)
    restorations, flat = restorations_of(linear, members)
    rotated = [Rotated(own.out, linear, own.rows.first, own.rows.interleaved) for own in restorations]
    dequantize_on_host(on_host(bits, block), rotated)
    run_on_host(compiled, restorations, flat)
    for own, (weight, _, _) in zip(restorations, members, strict=True):
        assert same(own.out, weight)
