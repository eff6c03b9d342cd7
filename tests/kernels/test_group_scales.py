"""Scales that contain their zero, and the integers that are chosen for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.config.quant_checks import HQQ_BITS
from subspec.kernels.group_scales import containing, nearest_zero, zero_step, zeros_in
from subspec.quant.integers import nearest_integers

BITS = st.sampled_from(HQQ_BITS)


@settings(max_examples=100, deadline=None)
@given(bits=BITS, scale=st.floats(2.0**-14, 1000.0, width=32), zero=st.floats(-300.0, 300.0, width=32))
def test_a_scale_keeps_the_zero_that_it_contains(bits, scale, zero):
    scale, zero = torch.tensor(scale), nearest_zero(torch.tensor(zero), bits)
    kept = containing(scale, zero, bits)
    assert torch.equal(zeros_in(kept, bits), zero)
    assert torch.equal(kept.half().float(), kept)
    assert torch.equal(containing(kept, zero, bits), kept)
    assert scale <= kept <= scale * (1 + 2**-4 + 2**-10)


@settings(max_examples=50, deadline=None)
@given(bits=BITS, zero=st.floats(0.0, 255.0, width=32))
def test_a_zero_moves_by_half_a_step_at_most(bits, zero):
    zero = torch.tensor(zero).clamp(max=63 * zero_step(bits))
    assert abs(nearest_zero(zero, bits) - zero) <= zero_step(bits) / 2


@pytest.mark.parametrize("extreme", [float("inf"), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("bits", HQQ_BITS)
def test_scales_stay_normal_numbers_that_sixteen_times_stay_finite(extreme, bits):
    kept = containing(torch.tensor(extreme), torch.tensor(3.0), bits).half()
    assert kept >= 2.0**-14
    assert (16 * kept).isfinite()


@settings(max_examples=50, deadline=None)
@given(bits=BITS, group=st.sampled_from([64, 128]), seed=st.integers(0, 99), shift=st.floats(-3.0, 3.0))
def test_no_weight_is_more_than_half_a_step_from_its_integer(bits, group, seed, shift):
    """Also in groups whose weights all have one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(6, 2 * group, generator=generator) + shift) * 0.02
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(2), parts.amax(2)
    found = nearest_integers(weight, -low * ((1 << bits) - 1) / (high - low), bits)
    assert int(found.q.max()) < 1 << bits
    scale = found.scale.repeat_interleave(group, 1)
    away = (found.dequantize() - weight).abs() / scale
    assert away.max() <= 0.5 + found.margin
    assert torch.equal(zeros_in(found.scale, bits), found.zero)
