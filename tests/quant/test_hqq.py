import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subspec.errors import ConfigError
from subspec.quant.bit_planes import pack_bits, packed_columns, unpack_bits
from subspec.quant.hqq import HqqFormat, HqqQuantizer

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


def test_a_group_size_that_does_not_divide_names_the_module_and_one_that_does(linear):
    with pytest.raises(
        ConfigError, match=r"quant\.group_size=96 does not divide the 256 inputs of a\.b.*instance 64"
    ):
        quantizer(group_size=96).quantize(linear, "a.b")


@settings(max_examples=15, deadline=None)
@given(bits=st.sampled_from([8, 4, 3, 2]), n=st.integers(1, 9), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_bit_planes_lose_nothing_and_leave_no_gaps(bits, n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (n, 8 * k), generator=generator, dtype=torch.uint8)
    packed = pack_bits(q, bits)
    assert packed.shape == (n, packed_columns(8 * k, bits)) == (n, k * bits)
    assert torch.equal(unpack_bits(packed, bits), q)


def test_rows_that_fill_no_byte_are_refused():
    with pytest.raises(ValueError, match="12 integers in a row are no multiple of 8"):
        pack_bits(torch.zeros(2, 12, dtype=torch.uint8), 4)


def test_weights_of_different_settings_do_not_stack():
    weights = [HqqFormat(bits).quantize(torch.randn(16, 64)) for bits in (4, 8)]
    with pytest.raises(ValueError, match="not one weight"):
        weights[0].stacked(weights[1:], swiglu=False)
