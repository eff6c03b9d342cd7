"""Weights coded by HIGGS come back bit for bit, from weights that are dequantized to the same bits everywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.codebook_dequantize import ROWS, Rotated, dequantizing
from subspec.codec.format import encode, restore
from subspec.codec.restore import Rows, quantized_rows
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import Rotation, butterfly, walsh_hadamard
from subspec.quant.level_linear import Dense, Variant
from subspec.quant.pairs import QuantizedPairs, group_of, quantize_pairs
from tests.codec.test_codec import EVERY_BFLOAT16, HIGGS_CASES, gaussian, rows_of, same

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


def test_other_kernels_orders_are_not_guessed():
    with pytest.raises(TypeError, match="dense"):
        quantized_rows(Dense(gaussian(32, 128)), Rows(0, False), 32)


# --------------------------------------------------------------------------------------- from the kernel's own order

CASES = pytest.mark.parametrize(("format_", "k", "tiles", "swiglu"), HIGGS_CASES)


def made_up_linear(count, format_, k, tiles, swiglu, every_scale, device="cpu"):
    """A fused Linear of two weights of ``count`` rows; each one's codes, and what rebuilds it."""
    options = {"bits": format_.bits, "block": format_.hadamard_size, "every_scale": every_scale}
    codes = [made_up(count, k, seed=seed, **options) for seed in range(2)]
    stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
    there = replace(stacked, pairs=stacked.pairs.to(device), scale=stacked.scale.to(device))
    linear = format_.linear(Variant("lut_mma", tiles), there, swiglu=swiglu)
    outs = [torch.full((count, k), 5.0, dtype=torch.bfloat16, device=device) for _ in codes]
    rows = [rows_of(number, count * number, swiglu) for number in range(2)]
    return codes, [Rotated(out, linear, own.first, own.interleaved) for out, own in zip(outs, rows, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("every_scale", [False, True])
@CASES
def test_the_device_rebuilds_what_a_cpu_rebuilds(format_, k, tiles, swiglu, every_scale):
    every, parts = made_up_linear(64, format_, k, tiles, swiglu, every_scale, "cuda")
    for launch in dequantizing(parts):
        launch()
    for part, codes in zip(parts, every, strict=True):
        assert alike(part.out.cpu(), codes.rebuild())
        there = replace(codes, pairs=codes.pairs.cuda(), scale=codes.scale.cuda())
        assert alike(there.rebuild().cpu(), codes.rebuild())


@pytest.mark.parametrize("every_scale", [False, True])
@CASES
def test_the_cuda_source_rebuilds_what_torch_rebuilds(dequantize, format_, k, tiles, swiglu, every_scale):
    """All weights of a fused Linear in one launch."""
    count = 64 if swiglu else 3 * ROWS + 5
    every, parts = made_up_linear(count, format_, k, tiles, swiglu, every_scale)
    dequantize(parts)
    for part, codes in zip(parts, every, strict=True):
        assert alike(part.out, codes.rebuild())
