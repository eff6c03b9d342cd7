"""Linears of a CPU's draft levels against the dequantized values, and the choice of their kernels."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from subspec.kernels.cpu import cpu_kernels
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.cpu_linear import INT4_GROUPS, CpuFormat, CpuHeadFormat, Int4CpuLinear
from subspec.quant.kernel_times import CpuBench
from subspec.quant.level_linear import Variant
from subspec.quant.quantized_weight import stack_rows

ERRORS = {"own_cpu": 0.02, "int4_cpu": 0.02, "int8_cpu": 0.03, "bfloat16": 0.02, "float32": 1e-5}
CPU = torch.device("cpu")

if isinstance(cpu_kernels(), str):
    del ERRORS["own_cpu"]


def quantized(n, k, group=64, bits=4, seed=0):
    torch.manual_seed(seed)
    return CpuFormat(bits, group).quantize(torch.randn(n, k) * 0.05)


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@given(
    kernel=st.sampled_from(sorted(ERRORS)),
    tiles=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from(INT4_GROUPS),
    rows=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_a_kernel_multiplies_with_hqqs_values(kernel, tiles, groups, group, rows, seed):
    n, k = 16 * tiles, group * groups
    assume(not CpuFormat(4, group).unfit(kernel, n, k))
    weight = quantized(n, k, group, seed=seed)
    x = torch.randn(rows, k) * torch.logspace(-2, 2, rows)[:, None]  # rows of very different sizes
    got = CpuFormat(4, group).linear(Variant(kernel), weight, swiglu=False)(x)
    expected = x @ weight.dequantize().T
    assert got.shape == (1, rows, n)
    for own, exact in zip(got[0].float(), expected, strict=True):
        assert error(own, exact) < ERRORS[kernel]


@pytest.mark.parametrize("kernel", sorted(ERRORS))
def test_gate_and_up_are_activated(kernel):
    gate, up = quantized(32, 64, seed=1), quantized(32, 64, seed=2)
    x = torch.randn(3, 64)
    linear = CpuFormat().linear(Variant(kernel), gate.stacked([up], swiglu=True), swiglu=True)
    expected = torch.nn.functional.silu(x @ gate.dequantize().T) * (x @ up.dequantize().T)
    assert error(linear(x).float(), expected) < 2 * ERRORS[kernel]
    assert stack_rows([gate.q, up.q], swiglu=True).shape[0] == linear.stride


@pytest.mark.parametrize("kernel", [kernel for kernel in CpuHeadFormat().kernels if kernel in ERRORS])
def test_rows_of_zeros_give_zeros(kernel):
    linear = CpuHeadFormat().linear(Variant(kernel), torch.randn(16, 64), swiglu=False)
    assert not linear(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("format_", [CpuFormat(3), CpuFormat(8), CpuFormat(4, 16)], ids=str)
def test_other_bits_and_groups_are_not_for_the_4_bit_kernel(format_):
    assert "4 bits" in format_.unfit("int4_cpu", 32, 64)
    weight = quantized(32, 64, format_.group, format_.bits)
    x = torch.randn(2, 64)
    expected = x @ weight.dequantize().T
    for kernel in ["int8_cpu", *(["own_cpu"] if "own_cpu" in ERRORS and not format_.unfit("own_cpu", 32, 64) else [])]:
        assert error(format_.linear(Variant(kernel), weight, swiglu=False)(x)[0], expected) < 0.02


def test_the_fastest_kernel_is_measured_once_and_a_missing_one_is_named(tmp_path, monkeypatch):
    def missing(*_):
        raise RuntimeError("no such operator")

    options = {"formats": {"out": CpuFormat()}, "bench": CpuBench(), "folder": tmp_path, "note": lambda text: None}
    first = choose_kernels({"out": (32, 64)}, 2, CPU, **options)
    again = choose_kernels({"out": (32, 64)}, 2, CPU, **options)
    assert first.measured == 1
    assert again.measured == 0
    assert first.variants == again.variants
    assert first.picked["out"].others.keys() == set(CpuFormat().kernels)
    monkeypatch.setattr(Int4CpuLinear, "__init__", missing)
    without = choose_kernels({"out": (32, 64)}, 3, CPU, **options)
    assert without.unavailable == {"int4_cpu": "no such operator"}
    assert "int4_cpu: no such operator" in without.summary()
    assert "int4_cpu" not in without.picked["out"].others


def test_values_are_those_of_modules():
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(128, 32, bias=False)
    module = HQQLinear(
        linear, BaseQuantizeConfig(4, 64, axis=1), del_orig=False, compute_dtype=torch.float32, device="cpu"
    )
    # Scales and zeros of a level are rounded to float16.
    torch.testing.assert_close(
        CpuFormat().quantize(linear.weight.data).dequantize(), module.dequantize(), rtol=0, atol=1e-3
    )
