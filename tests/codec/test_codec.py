"""Weights coded by integers come back bit for bit, from torch and from the CUDA source."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.format import CHUNK, encode, restore
from subspec.codec.restore import Restoration, Rows, Spans, blocks_of, describe, quantized_rows, restore_into
from subspec.errors import SubspecError
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import QuantizedIntegers
from subspec.quant.level_linear import Variant

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY_BFLOAT16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(a, b):
    """NaN is not NaN; bits are bits."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def gaussian(n, k, seed=0):
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def spoiled(weight):
    """With everything in it that is no ordinary weight."""
    flat = weight.clone().view(-1)
    odd = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, 7.0]
    for number, value in enumerate(odd):
        flat[number :: 131 + 2 * number] = value
    return flat.view(weight.shape)


@pytest.mark.parametrize(
    ("bits", "n", "k", "group"), [(2, 33, 256, 128), (3, 5, 192, 64), (4, 64, 256, 64), (8, 1, 64, 32)]
)
def test_a_quantized_weight_comes_back(bits, n, k, group):
    weight = gaussian(n, k)
    quantized = HqqFormat(bits, group).quantize(weight)
    for exact in (weight, spoiled(weight)):
        assert same(restore(encode(exact, quantized, quantized.margin), quantized), exact)


@pytest.mark.parametrize(("bits", "most"), [(2, 9.5), (3, 8.2), (4, 7.05), (8, 3.65)])
def test_a_gaussian_weight_takes_as_many_bits_as_the_planner_reserves(bits, most):
    weight = gaussian(256, 1024)
    quantized = HqqFormat(bits).quantize(weight)
    coded = encode(weight, quantized, quantized.margin)
    assert coded.bits_per_weight < most <= HqqFormat(bits).coded_bits + 0.2
    assert coded.bits_per_weight < HqqFormat(bits).coded_bits


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
    assert encode(weight, quantized, 0.0).bits_per_weight < 8 < 16 < far.bits_per_weight
    assert same(restore(far, quantized), weight + 1)


def test_constant_groups_and_zeros():
    weight = torch.zeros(8, 128, dtype=torch.bfloat16)
    weight[3] = 0.25
    quantized = HqqFormat(4).quantize(weight)
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


def members_of(parts, quantized, swiglu):
    """Each weight, spoiled, with its quantized form and its rows of the fused Linear."""
    first, rows = 0, []
    for number, part in enumerate(parts):
        rows.append(Rows(16 * number, True) if swiglu else Rows(first, False))
        first += part.shape[0]
    return list(zip([spoiled(part) for part in parts], quantized, rows, strict=True))


def fused(parts, *, bits=4, tiles=2, group=64, swiglu=False):
    """Several weights quantized and fused as a draft level has them: the Linear, and each weight's form and rows."""
    format_ = HqqFormat(bits, group)
    quantized = [format_.quantize(part) for part in parts]
    stacked = quantized[0].stacked(quantized[1:], swiglu=swiglu)
    linear = format_.linear(Variant("int4_mma", tiles), stacked, swiglu=swiglu)
    return linear, members_of(parts, quantized, swiglu)


CASES = [  # bits, inputs, group, rows of each weight, tiles, gate and up
    (4, 576, 64, (96, 32, 48), 2, False),
    (8, 576, 192, (96, 96), 4, True),
    (8, 192, 64, (37, 64, 5), 2, False),  # chunks go on in the next row, and the last one is short
    (3, 1024, 128, (64, 64), 2, True),
    (2, 320, 64, (41, 1), 4, False),
    (4, 320, 64, (96, 96, 75), 8, False),  # slices of a vocabulary that begin inside a block of rows
    (8, 2048, 64, (35,), 4, False),  # several blocks of threads
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (4, 192, 64, (64, 64), 4, True),
            (4, 1472, 64, (45,), 2, False),
            (3, 192, 64, (65, 7), 4, False),
            (2, 3584, 128, (33, 5), 2, False),
            (2, 64, 64, (1, 300), 2, False),
            (8, 1024, 128, (37, 70), 8, False),
        ]
    ),
]


def parts_of(k, rows, device="cpu"):
    return [gaussian(n, k, seed).to(device) for seed, n in enumerate(rows)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "k", "group", "rows", "tiles", "swiglu"), CASES)
def test_restoring_reads_the_kernels_own_order(bits, k, group, rows, tiles, swiglu, device):
    linear, members = fused(parts_of(k, rows, device), bits=bits, tiles=tiles, group=group, swiglu=swiglu)
    for weight, quantized, own_rows in members:
        own = quantized_rows(linear, own_rows, weight.shape[0])
        assert own.bits == bits
        assert torch.equal(own.q, quantized.q)
        assert torch.equal(own.scale, quantized.scale.repeat_interleave(group // 64, 1))
        assert torch.equal(own.dequantize(), quantized.dequantize())
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
    return kernel


def restorations_of(linear, members):
    """All weights of a fused Linear in one run of bytes, as a layer's are."""
    flat, found = torch.zeros(0, dtype=torch.int32), []
    for weight, quantized, rows in members:
        coded = encode(weight, quantized, quantized.margin)
        begin = flat.numel()
        flat = torch.cat([flat, coded.starts, coded.stream])
        behind = begin + coded.starts.numel()
        spans = Spans((4 * begin, coded.starts.numel()), (4 * behind, coded.stream.numel()))
        found.append(Restoration(torch.full_like(weight, 5.0), linear, rows, spans, coded.margin))
    return found, flat


@pytest.mark.parametrize(("bits", "k", "group", "rows", "tiles", "swiglu"), CASES)
def test_the_cuda_source_restores_what_torch_encoded(compiled, bits, k, group, rows, tiles, swiglu):
    linear, members = fused(parts_of(k, rows), bits=bits, tiles=tiles, group=group, swiglu=swiglu)
    restorations, flat = restorations_of(linear, members)
    assert run_on_host(compiled, restorations, flat) == ("restore_integers", bits)
    for own, (weight, _, _) in zip(restorations, members, strict=True):
        assert same(own.out, weight)


@settings(max_examples=12)
@given(
    bits=st.sampled_from([2, 4, 8]),
    scale=st.one_of(st.floats(width=16), st.floats(2.0**-14, 1024.0, width=16)),
    zero=st.one_of(st.floats(width=16), st.floats(-20, 20, width=16)),
    seed=st.integers(0, 99),
    margin=st.sampled_from([0.0, 2.0**-8, 0.0625]),
)
def test_the_cuda_source_restores_every_bit_pattern(compiled, bits, scale, zero, seed, margin):
    generator = torch.Generator().manual_seed(seed)
    weight = EVERY_BFLOAT16[torch.randint(0, 1 << 16, (32 * 64,), generator=generator)].view(32, 64)
    q = torch.randint(0, 1 << bits, (32, 64), dtype=torch.uint8, generator=generator)
    quantized = QuantizedIntegers(q, torch.full((32, 1), scale), torch.full((32, 1), zero), 64, bits)
    linear = HqqFormat(bits).linear(Variant("int4_mma", 2), quantized, swiglu=False)
    rows = Rows(0, False)
    coded = encode(weight, quantized_rows(linear, rows, 32), margin)
    count = coded.starts.numel()
    own = Restoration(torch.zeros_like(weight), linear, rows, Spans((0, count), (4 * count, 0)), margin)
    run_on_host(compiled, [own], torch.cat([coded.starts, coded.stream]))
    assert same(own.out, weight)
