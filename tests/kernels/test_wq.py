"""Our Triton kernel for 8, 4, 3 and 2 bits: its packing, and the kernel itself (interpreted without a GPU)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.kernels import wq
from subspec.kernels.int4 import interleave
from subspec.quant.bit_planes import pack_bits, packed_columns, unpack_bits
from subspec.quant.level_linear import TritonWq

BITS = (8, 4, 3, 2)


def codes(n, k, group, bits, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=g) * 0.01 + 0.001
    zero = torch.rand(n, k // group, generator=g) * ((1 << bits) - 1)
    return q.to(device), scale.to(device), zero.to(device)


def dense(q, scale, zero, group):
    scale, zero = scale.half().float(), zero.half().float()
    return (scale[..., None] * (q.float().unflatten(1, (-1, group)) - zero[..., None])).flatten(1)


@st.composite
def shapes(draw):
    """Bits, outputs, inputs and a group that divides them: groups that fit tiles, and some that do not."""
    bits = draw(st.sampled_from(BITS))
    group = draw(st.sampled_from([8, 16, 24, 32, 40, 64, 128]))
    per = wq.PER_WORD[bits]
    step = group * per // torch.gcd(torch.tensor(group), torch.tensor(per)).item()
    return bits, draw(st.integers(1, 40)), step * draw(st.integers(1, max(1, 640 // step))), group


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 99))
def test_packing_loses_nothing(shape, seed):
    bits, n, k, group = shape
    parts = codes(n, k, group, bits, seed)
    weight = wq.pack(*parts, bits=bits)
    assert torch.equal(wq.unpack(weight), dense(*parts, group))
    assert (weight.out_features, weight.in_features) == (n, k)
    assert weight.nbytes == wq.packed_bytes(n, k, bits, group) == n * k * bits // 8 + 4 * n * k // group


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_bit_planes_lose_nothing_and_leave_no_gaps(bits, n, k, seed):
    q = codes(n, 8 * k, 8, bits, seed)[0]
    packed = pack_bits(q, bits)
    assert packed.shape == (n, packed_columns(8 * k, bits)) == (n, k * bits)
    assert torch.equal(unpack_bits(packed, bits), q)


def test_rows_that_fill_no_byte_are_refused():
    with pytest.raises(ValueError, match="12 integers in a row are no multiple of 8"):
        pack_bits(torch.zeros(2, 12, dtype=torch.uint8), 4)


def run(weight, x, *, tiles=2, splits=1):
    """The kernel's result, in memory that was not clean."""
    rows, n = x.shape[0], weight.out_features
    if weight.swiglu:
        out = torch.full((rows, n // 2), torch.nan, dtype=torch.bfloat16, device=x.device)
    else:
        out = torch.full((splits, rows, n), torch.nan, dtype=torch.float32, device=x.device)
    wq.linear(weight, x, out, tiles=tiles, splits=splits)
    return out.float() if weight.swiglu else out.sum(0)


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(),
    rows=st.integers(1, 20),
    tiles=st.sampled_from([2, 4, 8]),
    splits=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_the_kernel_computes_the_reference(shape, rows, tiles, splits, seed):
    pytest.importorskip("triton")
    bits, n, k, group = shape
    weight = wq.pack(*codes(n, k, group, bits, seed), bits=bits)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert error(run(weight, x, tiles=tiles, splits=splits), wq.reference(weight, x)) < 1e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 6])
def test_the_activation_is_that_of_gate_and_up(bits, rows):
    pytest.importorskip("triton")
    gate, up = codes(48, 512, 64, bits, 1), codes(48, 512, 64, bits, 2)
    weight = wq.pack(*map(interleave, gate, up), bits=bits, swiglu=True)
    x = (torch.randn(rows, 512) * 0.5).bfloat16()
    y_gate, y_up = (x.float() @ dense(*parts, 64).t() for parts in (gate, up))
    expected = torch.nn.functional.silu(y_gate) * y_up
    torch.testing.assert_close(wq.reference(weight, x), expected, rtol=1e-4, atol=1e-3)
    assert error(run(weight, x), expected) < 5e-3


def test_both_ways_to_multiply_are_there():
    """Scales on the sums where a tile lies in one group, on the weights where it does not."""
    whole = wq.pack(*codes(32, 1024, 64, 4), bits=4)
    narrow = wq.pack(*codes(32, 576, 64, 8), bits=8)
    across = wq.pack(*codes(32, 576, 64, 4), bits=4)
    assert [(w.whole, w.tile) for w in (whole, narrow, across)] == [(True, 32), (True, 16), (False, 32)]


def test_a_level_linear_moves_to_memory_of_its_owners():
    for bits in BITS:
        linear = TritonWq(wq.pack(*codes(32, 128, 64, bits), bits=bits))
        x = torch.randn(3, 128).bfloat16()
        before = linear(x)
        linear.adopt([tensor.clone() for tensor in linear.tensors])
        assert torch.equal(linear(x), before)
        assert before.shape == (1, 3, 32)
        assert sum(tensor.nbytes for tensor in linear.tensors) == linear.nbytes


@pytest.mark.parametrize(
    ("bits", "group", "k", "message"),
    [
        (4, 64, 96, "groups of 64 do not divide 96 inputs"),
        (2, 8, 72, "72 inputs are not a multiple of 16"),
        (5, 8, 80, "5 bits are not 8, 4, 3, 2"),
    ],
)
def test_what_cannot_be_packed_is_told(bits, group, k, message):
    assert wq.unfit(bits, group, k) == message


def test_interleaved_rows_are_whole_tiles():
    with pytest.raises(ValueError, match="48 interleaved rows are not a multiple of 32"):
        wq.pack(*codes(48, 64, 64, 4), bits=4, swiglu=True)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 6, 17])
@pytest.mark.parametrize(
    ("n", "k", "group", "tiles", "splits"),
    [
        (4608, 3584, 64, 2, 4),
        (3584, 18944, 64, 4, 8),
        (37888, 3584, 128, 8, 1),
        (960, 576, 64, 2, 3),
        (960, 1536, 32, 4, 1),
        (100, 480, 24, 2, 2),
    ],
)
def test_on_a_card_too(bits, rows, n, k, group, tiles, splits):
    weight = wq.pack(*codes(n, k, group, bits, device="cuda"), bits=bits)
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    result = run(weight, x, tiles=tiles, splits=splits)
    # Where a tile crosses groups, weights are rounded to bfloat16.
    assert error(result, wq.reference(weight, x)) < (1e-3 if weight.whole else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_on_a_card_the_activation_is_inside(bits, rows):
    weight = wq.pack(*codes(2 * 4864, 896, 64, bits, device="cuda"), bits=bits, swiglu=True)
    x = torch.randn(rows, 896, device="cuda", dtype=torch.bfloat16) * 0.2
    linear = TritonWq(weight, tiles=4)
    assert error(linear(x).float(), wq.reference(weight, x)) < 1e-2
