import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from subspec.config.enums import Hadamard, HiggsKernel
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.quant.codebook_linear import HiggsFormat
from subspec.quant.higgs import HiggsQuantizer
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.pairs import group_of, pack_pairs, quantize_pairs, unpack_pairs
from subspec.quant.quantize_model import quantize_model
from tests.helpers.tiny import FAMILIES, tiny_model

CPU = torch.device("cpu")
GRIDS = [(bits, dim) for bits in (2, 3, 4) for dim in (1, 2)]


def quantizer(**options):
    return HiggsQuantizer(**{"compute_dtype": torch.float32, "device": CPU, "unpack": False, **options})


def codes_of(weight, bits=4, dim=2):
    return HiggsFormat(bits, dim).quantize(weight)


def relative(approximate, exact):
    return float((approximate.float() - exact).norm() / exact.norm())


def linear_of(weight, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias
    return linear.requires_grad_(False)


@pytest.fixture
def weight():
    return torch.randn(96, 1024, generator=torch.Generator().manual_seed(0)) * 0.02


@given(rows=st.integers(1, 9), chunks=st.integers(1, 7), bits=st.sampled_from([2, 3, 4]), seed=st.integers(0, 99))
def test_packing_loses_nothing_and_takes_the_bits_it_should(rows, chunks, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, 4**bits, (rows, chunks * 32), generator=generator, dtype=torch.uint8)
    packed = pack_pairs(pairs, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == 2 * pairs.numel() * bits
    assert torch.equal(unpack_pairs(packed, bits), pairs)


def test_rows_that_are_no_whole_chunks_are_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        pack_pairs(torch.zeros(2, 31, dtype=torch.uint8), 4)


@settings(max_examples=10)
@given(n=st.integers(1, 40), k=st.integers(2, 500), grid=st.sampled_from(GRIDS), group=st.sampled_from([64, 256]))
def test_any_shape_is_quantized_within_the_grids_error(n, k, grid, group):
    bits, dim = grid
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k))
    codes = quantize_pairs(weight, bits=bits, dim=dim, group_size=group, hadamard_size=256)
    assert codes.shape == (n, k)
    assert codes.dequantize().shape == (n, k)
    # Few weights may be unluckier than the average; padding makes their rotation less Gaussian.
    assert relative(codes.dequantize(), weight) < 1.35 * codes.grid.mse**0.5


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize(("bits", "dim"), GRIDS)
def test_gaussian_weights_have_the_grids_error_and_outliers_do_not_matter(weight, bits, dim, outliers):
    """A few inputs with weights fifty times as large: what rotation is for."""
    if outliers:
        weight[:, ::128] *= 50
    codes = codes_of(weight, bits, dim)
    error = relative(codes.dequantize(), weight) / codes.grid.mse**0.5
    assert error < 1.1 if outliers else error == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(("bits", "dim"), GRIDS)
def test_the_fitted_scale_is_the_best_for_its_codes(weight, bits, dim):
    codes = codes_of(weight, bits, dim)
    rotated = codes.rotation(weight)
    best = (rotated - codes.rotated()).square().sum()
    for factor in (0.99, 1.01):
        assert (rotated - codes.rotated() * factor).square().sum() > best


def test_zeros_stay_zeros(weight):
    weight[3] = 0
    codes = codes_of(weight)
    assert torch.equal(codes.dequantize()[3], torch.zeros(1024))
    assert torch.isfinite(codes.dequantize()).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [False, True])
def test_the_error_is_below_hqqs_at_no_more_bits(weight, bits, outliers):
    if outliers:  # rows and inputs of different sizes, and some heavy tails, as real weights have
        generator = torch.Generator().manual_seed(1)
        weight *= torch.exp(0.5 * torch.randn(1, 1024, generator=generator))
    linear = linear_of(weight)
    ours = quantizer(bits=bits, group_size=64, unpack=True)
    theirs = HqqQuantizer(bits=bits, compute_dtype=torch.float32, device=CPU, unpack=True)
    half = HqqQuantizer(bits=bits, compute_dtype=torch.bfloat16, device=CPU, unpack=True)
    assert ours.stored_bytes(linear) < half.stored_bytes(linear)
    error = relative(ours.quantize(linear, "w").weight, weight)
    assert error < relative(theirs.quantize(linear, "w").weight, weight)


@pytest.mark.parametrize(
    ("padded", "size", "group"), [(3584, 256, 256), (576, 256, 192), (896, 256, 128), (64, 256, 64), (192, 64, 64)]
)
def test_groups_are_the_largest_that_divide(padded, size, group):
    assert group_of(padded, size) == group


@pytest.mark.parametrize(("bits", "dim"), GRIDS)
@pytest.mark.parametrize("inputs", [512, 100])
def test_stored_bytes_are_those_of_the_packed_module(bits, dim, inputs):
    linear = linear_of(torch.randn(48, inputs))
    chosen = quantizer(bits=bits, vector_dim=dim)
    module = chosen.quantize(linear, "q")
    held = sum(tensor.numel() * tensor.element_size() for tensor in module.linear.tensors)
    assert chosen.stored_bytes(linear) == held == module.linear.nbytes
    if inputs == 512:
        assert 8 * held / linear.weight.numel() == bits + 16 / 256


@pytest.mark.parametrize(("bits", "dim", "inputs"), [(4, 2, 256), (3, 1, 100), (2, 2, 100)])
def test_unpacking_changes_nothing_but_rounding(bits, dim, inputs):
    torch.manual_seed(0)
    linear = linear_of(torch.randn(48, inputs), torch.randn(48))
    x = torch.randn(2, 5, inputs)
    packed = quantizer(bits=bits, vector_dim=dim).quantize(linear, "q")
    plain = quantizer(bits=bits, vector_dim=dim, unpack=True).quantize(linear, "q")
    assert isinstance(plain, nn.Linear)
    assert plain.bias is linear.bias
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-4)
    assert relative(plain(x), functional.linear(x, linear.weight, linear.bias)) < 0.5


def test_quantizing_in_pieces_changes_nothing(weight, monkeypatch):
    whole = codes_of(weight, 3)
    monkeypatch.setattr("subspec.quant.pairs.ROWS_BYTES", 4 * 1024 * 7)
    parts = codes_of(weight, 3)
    assert torch.equal(whole.pairs, parts.pairs)
    assert torch.equal(whole.scale, parts.scale)


def test_rows_stack_like_those_of_one_weight(weight):
    whole, first = codes_of(weight), codes_of(weight[:32])
    parts = first.stacked([codes_of(weight[32:80]), codes_of(weight[80:])], swiglu=False)
    assert torch.equal(parts.pairs, whole.pairs)
    both = first.stacked([codes_of(weight[32:64])], swiglu=True)
    expected = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]
    assert torch.equal(both.dequantize(), whole.dequantize()[expected])
    with pytest.raises(ValueError, match="not one weight"):
        whole.stacked([codes_of(weight, 3)], swiglu=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8}, r"quant\.bits=8: HIGGS here has 2, 3, 4 bits"),
        ({"vector_dim": 3}, r"quant\.vector_dim=3"),
        ({"group_size": 100}, r"quant\.group_size=100: use a multiple of 64"),
        ({"hadamard_size": 96}, r"quant\.hadamard_size=96: use a power of two from 64 to 1024"),
        ({"kernel": HiggsKernel.lut_mma}, r"quant\.kernel=lut_mma cannot run here: no CUDA device"),
        ({"kernel": HiggsKernel.flute}, r"quant\.kernel=flute cannot run here: "),
        ({"kernel": HiggsKernel.reference, "unpack": True}, r"quant\.kernel computes nothing.*draft\.unpack"),
        ({"hadamard": Hadamard.library}, r"quant\.hadamard=library cannot run here: no CUDA device"),
    ],
)
def test_settings_it_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        quantizer(**options)


@pytest.mark.parametrize(
    ("family", "unpack"),
    [
        (FAMILIES[0], False),
        (FAMILIES[1], True),
        *(pytest.param(f, False, marks=pytest.mark.slow) for f in FAMILIES[1:]),
    ],
)
def test_greedy_text_in_fp32_is_plain_decodings(family, unpack):
    model = tiny_model(family, layers=2)
    substitute = share_parameters(model)
    report = quantize_model(substitute, quantizer(unpack=unpack), modules=["attention", "mlp"], skip_layers=[])
    assert report.modules == 14
    assert 4 < report.bits_per_weight < 5
    prompt = [5, 17, 33, 99, 4, 8, 77]
    speculative = Engine(TargetModel(model), SubstituteDraft(substitute), Beam(6, 3), max_length=128)
    plain = Engine(TargetModel(model), None, None, max_length=128)
    with torch.inference_mode():
        ours = speculative.generate(prompt, max_new_tokens=40, ignore_eos=True)
        theirs = plain.generate(prompt, max_new_tokens=40, ignore_eos=True)
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.iterations < 40  # it does draft
