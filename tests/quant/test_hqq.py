import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subspec.errors import ConfigError, SubspecError
from subspec.quant.codebook_linear import higgs_quantizer
from subspec.quant.higgs import HiggsQuantizer
from subspec.quant.hqq import HqqFormat, HqqQuantizer, hqq_quantizer
from subspec.quant.integers import pack_bits, unpack_bits

CPU = torch.device("cpu")


def quantizer(**options):
    return HqqQuantizer(**{"compute_dtype": torch.float32, "device": CPU, "unpack": False, **options})


@pytest.fixture
def linear():
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(("bits", "axis"), [(8, 0), (4, 1), (3, 0), (3, 1), (2, 1)])
def test_unpacking_does_not_change_a_bit(linear, bits, axis):
    x = torch.randn(5, 256)
    packed = quantizer(bits=bits, axis=axis).quantize(linear, "q")
    plain = quantizer(bits=bits, axis=axis, unpack=True).quantize(linear, "q")
    assert torch.equal(packed.dequantize(), plain.weight)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)


def test_more_bits_mean_less_error(linear):
    errors = []
    for bits in (8, 4, 3, 2):
        weight = quantizer(bits=bits).quantize(linear, "q").dequantize()
        errors.append(float((weight - linear.weight).norm() / linear.weight.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.01
    assert 0.05 < errors[1] < 0.15


@pytest.mark.parametrize(("bits", "axis"), [(8, 0), (4, 1), (3, 0), (3, 1), (2, 1)])
def test_stored_bytes_are_those_of_the_packed_module(linear, bits, axis):
    chosen = quantizer(bits=bits, axis=axis)
    module = chosen.quantize(linear, "q")
    tensors = [module.W_q, module.meta["scale"], module.meta["zero"]]
    actual = sum(t.numel() * t.element_size() for t in tensors)
    assert chosen.stored_bytes(linear) == actual


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, r"quant\.bits=5: HQQ here has 8, 4, 3, 2 bits"),
        ({"group_size": 12}, r"quant\.group_size=12: use a multiple of 8"),
        ({"axis": 2}, r"quant\.axis=2"),
    ],
)
def test_settings_hqq_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        quantizer(**options)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((128, 256), {"group_size": 96}, r"quant\.group_size=96 .*256 inputs of a\.b.*instance 64"),
        ((131, 64), {"bits": 4}, r"quant\.group_size=64 .*131 groups of a\.b.*4 bits.*quant\.group_size=32"),
        ((131, 64), {"bits": 2}, r"quant\.group_size=64 .*2 bits.*multiple of 4.*quant\.group_size=16"),
        ((131, 8), {"bits": 4, "group_size": 8}, r"quant\.group_size=8 .*quant\.bits_by\.b=8"),
    ],
)
def test_groups_that_do_not_fit_are_refused_with_a_size_that_does(shape, options, message):
    layer = nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False)
    with pytest.raises(ConfigError, match=message):
        quantizer(**options).quantize(layer, "a.b")


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("n", "group_size", "axis"), [(131, 64, 1), (132, 64, 1), (131, 16, 1), (136, 8, 0)])
def test_accepted_groups_are_those_that_hqq_packs(bits, n, group_size, axis):
    layer = nn.Linear(64, n, bias=False).requires_grad_(False)
    chosen = quantizer(bits=bits, group_size=group_size, axis=axis)
    try:
        chosen.quantize(layer, "a.b").dequantize()
    except ConfigError:
        assert axis == 1
        assert n * 64 // group_size % (8 // bits)


BY_WEIGHT = {
    "hqq": lambda weight: hqq_quantizer().quantize(weight, "0.q_proj"),
    "higgs": lambda weight: higgs_quantizer().quantize(weight, "0.q_proj"),
}
BY_LINEAR = {"hqq": quantizer, "higgs": lambda: HiggsQuantizer(compute_dtype=torch.float32, device=CPU, unpack=True)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", BY_WEIGHT)
def test_weights_that_are_not_finite_are_refused_by_name(linear, method, value):
    linear.weight[2, 5] = value
    for quantize in (BY_WEIGHT[method], lambda _: BY_LINEAR[method]().quantize(linear, "0.q_proj")):
        with pytest.raises(SubspecError, match=r"0\.q_proj .*not finite"):
            quantize(linear.weight)


@settings(max_examples=15)
@given(bits=st.sampled_from([8, 4, 3, 2]), n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_bit_planes_lose_nothing_and_leave_no_gaps(bits, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, 8 * k), generator=generator, dtype=torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.shape == (n, k * bits)
    assert torch.equal(unpack_bits(packed, bits), q)


def test_rows_that_fill_no_byte_are_refused():
    with pytest.raises(ValueError, match="12 integers in a row are no multiple of 8"):
        pack_bits(torch.zeros(2, 12, dtype=torch.uint8), 4)


def test_weights_of_different_settings_do_not_stack():
    weights = [HqqFormat(bits).quantize(torch.randn(16, 64)) for bits in (4, 8)]
    with pytest.raises(ValueError, match="not one weight"):
        weights[0].stacked(weights[1:], swiglu=False)
