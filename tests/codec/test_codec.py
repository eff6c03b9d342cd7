"""Coded weights come back bit for bit, from torch and from the CUDA source."""

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.codebook_dequantize import ROWS, Rotated, dequantizing
from subspec.codec.format import CHUNK, encode, restore
from subspec.codec.restore import Restoration, Rows, Spans, blocks_of, describe, quantized_rows, restore_into
from subspec.errors import SubspecError
from subspec.kernels.group_scales import containing, nearest_zero
from subspec.quant.codebook_linear import HiggsFormat
from subspec.quant.hadamard import butterfly, walsh_hadamard
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import QuantizedIntegers
from subspec.quant.level_linear import Dense, Variant
from subspec.quant.pairs import QuantizedPairs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY_BFLOAT16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(a, b):
    """NaN is not NaN; bits are bits."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def gaussian(n, k, seed=0):
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def bits_of(coded):
    """Per weight, over the link."""
    return 8 * (coded.starts.nbytes + coded.stream.nbytes) / coded.shape.numel()


def spoiled(weight):
    """With everything in it that is no ordinary weight."""
    flat = weight.clone().view(-1)
    odd = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, 7.0]
    for number, value in enumerate(odd):
        flat[number :: 131 + 2 * number] = value
    return flat.view(weight.shape)


@pytest.mark.parametrize(
    ("format_", "n", "k"),
    [
        (HqqFormat(2, 128), 33, 256),
        (HqqFormat(3), 5, 192),
        (HqqFormat(4), 64, 256),
        (HqqFormat(8, 32), 1, 64),
        (HiggsFormat(2), 24, 512),
        (HiggsFormat(3, 1), 5, 384),
        (HiggsFormat(4, 1, 64, 64), 9, 100),
        (HiggsFormat(4, 2, 64, 1024), 1, 64),
    ],
)
def test_a_quantized_weight_comes_back(format_, n, k):
    weight = gaussian(n, k)
    quantized = format_.quantize(weight)
    for exact in (weight, spoiled(weight)):
        assert same(restore(encode(exact, quantized, quantized.margin), quantized), exact)


@pytest.mark.parametrize(
    ("format_", "least", "most"),
    [
        *((HqqFormat(bits), 0, most) for bits, most in {2: 9.5, 3: 8.2, 4: 7.05, 8: 3.65}.items()),
        *((HiggsFormat(*own), HiggsFormat(*own).coded_bits - 0.25, 99) for own in [(4, 1), (4, 2), (3, 2), (2, 1)]),
    ],
)
def test_a_gaussian_weight_takes_about_the_bits_that_the_planner_reserves(format_, least, most):
    weight = gaussian(256, 1024)
    quantized = format_.quantize(weight)
    assert least < bits_of(encode(weight, quantized, quantized.margin)) < min(most, format_.coded_bits)


@settings(max_examples=12)
@given(
    scale=st.one_of(st.floats(width=32), st.floats(2.0**-20, 1024.0, width=32)),
    zero=st.one_of(st.floats(width=32), st.floats(-20, 20, width=32)),
    seed=st.integers(0, 99),
    margin=st.sampled_from([0.0, 2.0**-8, 0.0625]),
)
def test_every_bit_pattern_survives_any_scale_and_zero(scale, zero, seed, margin):
    generator = torch.Generator().manual_seed(seed)
    weight = EVERY_BFLOAT16[torch.randint(0, 1 << 16, (CHUNK + 128,), generator=generator)].view(10, 64)
    q = torch.randint(0, 16, (10, 64), dtype=torch.uint8, generator=generator)
    quantized = QuantizedIntegers(q, torch.full((10, 1), scale), torch.full((10, 1), zero), 64)
    assert same(restore(encode(weight, quantized, margin), quantized), weight)


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([8, 32, 64]), st.integers(0, 9))
def test_ragged_shapes(n, groups, group, seed):
    weight = gaussian(n, groups * group, seed)
    q = torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    quantized = QuantizedIntegers(q, torch.full((n, groups), 0.006), torch.full((n, groups), 7.5), group)
    assert same(restore(encode(weight, quantized, 0.0), quantized), weight)


def test_weights_inside_their_interval_are_cheap_and_others_are_not_lost():
    weight = gaussian(32, 128)
    quantized = HqqFormat(4).quantize(weight)
    far = encode(weight + 1, quantized, 0.0)
    assert bits_of(encode(weight, quantized, 0.0)) < 8 < 16 < bits_of(far)
    assert same(restore(far, quantized), weight + 1)


@pytest.mark.parametrize("format_", [HqqFormat(4), HiggsFormat()], ids=str)
def test_constant_groups_and_zeros(format_):
    weight = torch.zeros(8, 192, dtype=torch.bfloat16)
    weight[3], weight[5] = 0.25, -1e-39
    quantized = format_.quantize(weight)
    assert same(restore(encode(weight, quantized, quantized.margin), quantized), weight)


def test_only_bfloat16():
    with pytest.raises(TypeError, match="bfloat16"):
        encode(torch.zeros(2, 64), HqqFormat(4).quantize(torch.zeros(2, 64)), 0.0)


def test_more_weights_than_the_kernel_can_number_are_refused():
    huge = torch.empty(1, dtype=torch.bfloat16).expand(1 << 16, 1 << 15)
    q, one = torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1)
    quantized = QuantizedIntegers(q, one, one, 64)
    with pytest.raises(SubspecError, match=r"set offload\.codec=none"):
        encode(huge, quantized, 0.0)


# ------------------------------------------------------------------------- from the kernel's own order


def rows_of(number, first, swiglu):
    return Rows(16 * number, True) if swiglu else Rows(first, False)


def fused(format_, parts, tiles, swiglu):
    """Several weights quantized and fused as a draft level has them.

    Returns:
        The Linear, and each weight, spoiled, with its quantized form and its rows of the fused Linear.
    """
    quantized = [format_.quantize(part) for part in parts]
    stacked = quantized[0].stacked(quantized[1:], swiglu=swiglu)
    linear = format_.linear(Variant(format_.kernels[0], tiles), stacked, swiglu=swiglu)
    first, members = 0, []
    for number, (part, own) in enumerate(zip(parts, quantized, strict=True)):
        members.append((spoiled(part), own, rows_of(number, first, swiglu)))
        first += part.shape[0]
    return linear, members


def slow(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def rotated_by(bits, block):
    return HiggsFormat(bits, 2, 256, block)


# Format, inputs, tiles, gate and up; chunks of 512 begin within rows and within blocks.
HIGGS = [
    (rotated_by(4, 512), 1536, 2, False),
    (rotated_by(3, 64), 576, 4, False),
    (rotated_by(2, 128), 128, 2, True),
    (rotated_by(4, 64), 37, 4, False),
]
SLOW_HIGGS = [
    (rotated_by(4, 1024), 1024, 4, True),
    (rotated_by(4, 128), 384, 2, True),
    (rotated_by(3, 256), 256, 2, False),
    (rotated_by(2, 64), 100, 2, False),
]
SLOW_INTEGERS = [
    (HqqFormat(4), 192, 4, True, (64, 64)),
    (HqqFormat(4), 1472, 2, False, (45,)),
    (HqqFormat(3), 192, 4, False, (65, 7)),
    (HqqFormat(2, 128), 3584, 2, False, (33, 5)),
    (HqqFormat(2), 64, 2, False, (1, 300)),
    (HqqFormat(8, 128), 1024, 8, False, (37, 70)),
]
CASES = pytest.mark.parametrize(
    ("format_", "k", "tiles", "swiglu", "rows"),
    [  # rows of each weight; None: some
        (HqqFormat(4), 576, 2, False, (96, 32, 48)),
        (HqqFormat(8, 192), 576, 4, True, (96, 96)),
        (HqqFormat(8), 192, 2, False, (37, 64, 5)),  # chunks go on in the next row, and the last one is short
        (HqqFormat(3, 128), 1024, 2, True, (64, 64)),
        (HqqFormat(2), 320, 4, False, (41, 1)),
        (HqqFormat(4), 320, 8, False, (96, 96, 75)),  # slices of a vocabulary that begin inside a block of rows
        (HqqFormat(8), 2048, 4, False, (35,)),  # several blocks of threads
        *slow(SLOW_INTEGERS),
        *((*case, None) for case in HIGGS),
        *slow((*case, None) for case in SLOW_HIGGS),
    ],
)


def parts_of(k, rows, swiglu, device="cpu"):
    rows = rows or ((64, 64) if swiglu else (37, 8, 19))
    return [gaussian(n, k, seed).to(device) for seed, n in enumerate(rows)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("device", DEVICES)
@CASES
def test_restoring_reads_the_kernels_own_order(format_, k, tiles, swiglu, rows, device):
    linear, members = fused(format_, parts_of(k, rows, swiglu, device), tiles, swiglu)
    for weight, quantized, own_rows in members:
        own = quantized_rows(linear, own_rows, weight.shape[0])
        assert torch.equal(own.row_tensors[0], quantized.row_tensors[0])
        assert torch.equal(own.dequantize(), quantized.dequantize())
        assert own.margin == quantized.margin
        ends = zip(*(one.interval(0, weight.numel(), one.margin) for one in (own, quantized)), strict=True)
        assert all(torch.equal(*both) for both in ends)
        coded = encode(weight, quantized, quantized.margin)
        out = torch.full_like(weight, 5.0)
        restore_into(out, coded, linear, own_rows)
        assert same(out, weight)


def run_on_host(compiled, restorations, flat):
    """The launch of a :class:`Restorer`, as C++; ``flat``: int32, 16-byte aligned as a device's memory is."""
    described = [describe(own) for own in restorations]
    (kernel,) = {kernel for kernel, _ in described}
    blocks = [blocks_of(own.out) for own in restorations]
    table = torch.tensor([[*fields, sum(blocks[:i])] for i, (_, fields) in enumerate(described)])
    assert flat.data_ptr() % 16 == 0
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, flat)]
    compiled(kernel).restore(*arguments, len(restorations), sum(blocks))


@CASES
def test_the_cuda_source_restores_what_torch_encoded(compiled, dequantize, format_, k, tiles, swiglu, rows):
    """All weights of a fused Linear in one call, from one run of bytes, as a layer's are."""
    linear, members = fused(format_, parts_of(k, rows, swiglu), tiles, swiglu)
    flat, restorations = torch.zeros(0, dtype=torch.int32), []
    for weight, quantized, own_rows in members:
        coded = encode(weight, quantized, quantized.margin)
        begin = flat.numel()
        flat = torch.cat([flat, coded.starts, coded.stream])
        behind = begin + coded.starts.numel()
        spans = Spans((4 * begin, coded.starts.numel()), (4 * behind, coded.stream.numel()))
        restorations.append(Restoration(torch.full_like(weight, 5.0), linear, own_rows, spans, coded.margin))
    if isinstance(format_, HiggsFormat):
        dequantize([Rotated(own.out, linear, own.rows.first, own.rows.interleaved) for own in restorations])
    run_on_host(compiled, restorations, flat)
    for own, (weight, _, _) in zip(restorations, members, strict=True):
        assert same(own.out, weight)


@settings(max_examples=12)
@given(
    bits=st.sampled_from([2, 4, 8]),
    scale=st.floats(2.0**-14, 1024.0, width=16),
    zero=st.floats(0, 255),
    seed=st.integers(0, 99),
    margin=st.sampled_from([0.0, 2.0**-8, 0.0625]),
)
def test_the_cuda_source_restores_every_bit_pattern(compiled, bits, scale, zero, seed, margin):
    generator = torch.Generator().manual_seed(seed)
    weight = EVERY_BFLOAT16[torch.randint(0, 1 << 16, (32 * 64,), generator=generator)].view(32, 64)
    q = torch.randint(0, 1 << bits, (32, 64), dtype=torch.uint8, generator=generator)
    zero = nearest_zero(torch.full((32, 1), zero), bits)
    quantized = QuantizedIntegers(q, containing(torch.full((32, 1), scale), zero, bits), zero, 64, bits)
    linear = HqqFormat(bits).linear(Variant("int4_mma", 2), quantized, swiglu=False)
    rows = Rows(0, False)
    coded = encode(weight, quantized_rows(linear, rows, 32), margin)
    count = coded.starts.numel()
    own = Restoration(torch.zeros_like(weight), linear, rows, Spans((0, count), (4 * count, 0)), margin)
    run_on_host(compiled, [own], torch.cat([coded.starts, coded.stream]))
    assert same(own.out, weight)


# ---------------------------------------------------------------------------- HIGGS: the same bits everywhere

HALVES = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def made_up(n, k, format_, seed=0, every_scale=True):
    """Codes that no weight has: random pairs, and scales that may be anything of 16 bits, NaN and infinite included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codes = format_.random_weight(n, k, torch.device("cpu"))
        scale = HALVES[torch.randint(0, 1 << 16, codes.scale.shape)]
    return replace(codes, scale=scale) if every_scale else codes


def alike(a, b):
    """The same bits, but for what kind of NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and same(a.nan_to_num(0.0), b.nan_to_num(0.0))


def test_shorter_codes_lie_in_the_middle_of_the_interval(monkeypatch):
    weight = gaussian(128, 1024)
    codes = HiggsFormat().quantize(weight)
    middle = bits_of(encode(weight, codes, codes.margin))
    monkeypatch.setattr(QuantizedPairs, "centred", False)
    aside = encode(weight, codes, codes.margin)
    assert same(restore(aside, codes), weight)
    assert middle < bits_of(aside) - 0.1


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
    for every_scale in (True, False):
        codes = made_up(n, k, HiggsFormat(bits, 2, group, block), seed, every_scale)
        assert same(restore(encode(weight, codes, margin), codes), weight)


def test_intervals_do_not_depend_on_the_piece_they_are_asked_for():
    codes = made_up(7, 300, HiggsFormat(3), every_scale=False)
    whole = codes.interval(0, 2100, codes.margin)
    for begin, end in [(0, 1), (299, 301), (512, 1024), (1999, 2100)]:
        for part, all_of_it in zip(codes.interval(begin, end, codes.margin), whole, strict=True):
            assert torch.equal(part, all_of_it[begin:end])


def test_residuals_have_the_deviation_that_the_reach_is_counted_in():
    weight = gaussian(256, 1024)
    codes = HiggsFormat().quantize(weight)
    low, high = codes.interval(0, weight.numel(), codes.grid.mse**0.5)
    deviations = (weight.float().flatten() - codes.rebuild().float().flatten()) / ((high - low) / 2)
    assert deviations.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_a_butterfly_is_the_transform_without_its_factor():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 64, 256):
        torch.testing.assert_close(butterfly(x, size) * size**-0.5, walsh_hadamard(x, size))


@pytest.mark.parametrize("k", [512, 576, 100])
def test_rebuilding_is_dequantizing(k):
    codes = HiggsFormat().quantize(gaussian(16, k))
    torch.testing.assert_close(codes.rebuild().float(), codes.dequantize(), atol=1e-4, rtol=2**-8)


def test_other_kernels_orders_are_not_guessed():
    with pytest.raises(TypeError, match="dense"):
        quantized_rows(Dense(gaussian(32, 128)), Rows(0, False), 32)


# --------------------------------------------------------------------------------------- from the kernel's own order

HIGGS_ONLY = pytest.mark.parametrize(("format_", "k", "tiles", "swiglu"), [*HIGGS, *slow(SLOW_HIGGS)])


def made_up_linear(count, format_, k, tiles, swiglu, every_scale, device="cpu"):
    """A fused Linear of two weights of ``count`` rows; each one's codes, and what rebuilds it."""
    codes = [made_up(count, k, format_, seed, every_scale) for seed in range(2)]
    stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
    there = replace(stacked, pairs=stacked.pairs.to(device), scale=stacked.scale.to(device))
    linear = format_.linear(Variant("lut_mma", tiles), there, swiglu=swiglu)
    outs = [torch.full((count, k), 5.0, dtype=torch.bfloat16, device=device) for _ in codes]
    rows = [rows_of(number, count * number, swiglu) for number in range(2)]
    return codes, [Rotated(out, linear, own.first, own.interleaved) for out, own in zip(outs, rows, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("every_scale", [False, True])
@HIGGS_ONLY
def test_the_device_rebuilds_what_a_cpu_rebuilds(format_, k, tiles, swiglu, every_scale):
    every, parts = made_up_linear(64, format_, k, tiles, swiglu, every_scale, "cuda")
    for launch in dequantizing(parts):
        launch()
    for part, codes in zip(parts, every, strict=True):
        assert alike(part.out.cpu(), codes.rebuild())
        there = replace(codes, pairs=codes.pairs.cuda(), scale=codes.scale.cuda())
        assert alike(there.rebuild().cpu(), codes.rebuild())


@pytest.mark.parametrize("every_scale", [False, True])
@HIGGS_ONLY
def test_the_cuda_source_rebuilds_what_torch_rebuilds(dequantize, format_, k, tiles, swiglu, every_scale):
    """All weights of a fused Linear in one launch."""
    count = 64 if swiglu else 3 * ROWS + 5
    every, parts = made_up_linear(count, format_, k, tiles, swiglu, every_scale)
    dequantize(parts)
    for part, codes in zip(parts, every, strict=True):
        assert alike(part.out, codes.rebuild())
