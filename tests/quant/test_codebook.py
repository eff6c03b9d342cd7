"""The look-up kernels against their torch reference; without a GPU the rotation runs in Triton's interpreter."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

pytest.importorskip("triton")


from subspec.kernels import codebook
from subspec.kernels.few_rows import interleave
from subspec.quant.codebook_linear import (
    CODEBOOK_KERNELS,
    CodebookLinear,
    HiggsFormat,
    ReferenceCodebook,
    make_codebook_linear,
    pair_table,
)
from subspec.quant.flute import FluteLinear
from subspec.quant.hadamard import Rotation, library_problem, radices, rotate, rotate_library, rotate_triton
from subspec.quant.level_linear import Variant
from subspec.quant.pairs import quantize_pairs
from subspec.utils.capture import capturing
from tests.quant.test_higgs import GRIDS, relative

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def codes_of(n, k, bits=4, dim=2, group=256, device="cpu", seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    return quantize_pairs(weight.to(device), bits=bits, dim=dim, group_size=group, hadamard_size=512)


def inputs(rows, k, device="cpu"):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(5))
    return x.to(device, torch.bfloat16)


def packed_of(codes, tiles=2):
    return codebook.pack(codes.pairs, codes.scale, pair_table(codes), bits=codes.grid.bits, tiles=tiles)


def expected(codes, x, swiglu=False):
    """In float32 but for the rotated inputs, which every kernel rounds to bfloat16."""
    y = rotate(x, codes.rotation).float() @ codes.rotated().t()
    if not swiglu:
        return y
    gate, up = y.unflatten(-1, (-1, 2, 16)).unbind(-2)
    return (functional.silu(gate) * up).flatten(-2)


# -------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("count", "limit", "rows"), [(64, 64, 1), (1536, 512, 3), (2048, 1024, 1), (576, 512, 3), (100, 512, 1)]
)
def test_the_rotation_kernel_is_the_rotation(count, limit, rows, device):
    rotation = Rotation.of(count, limit)
    x = inputs(rows, count, device)
    exact = rotation(x.float())
    assert relative(rotate_triton(x, rotation), exact) < 5e-3  # one rounding to bfloat16
    assert rotate(x, rotation).dtype == torch.bfloat16


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024])
def test_three_stages_make_a_block(block):
    first, second, third = radices(block)
    assert first * second * third == block
    assert max(first, second, third) <= 16


def test_the_library_gets_signs_padding_and_scale(monkeypatch):
    """A stand-in with the library's documented meaning: hadamard_transform(x, scale) over the last dimension."""

    def transform(x, scale):
        size = x.shape[-1]
        matrix = Rotation(size, size, size, 0)
        return matrix(x * matrix.signs(x.device, x.dtype)) * size**0.5 * scale

    module = types.ModuleType("fast_hadamard_transform")
    module.hadamard_transform = transform
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", module)
    rotation = Rotation.of(100, 512)
    x = torch.randn(3, 100)
    torch.testing.assert_close(rotate_library(x, rotation), rotation(x))


def test_a_missing_library_is_named():
    if library_problem() is None:
        pytest.skip("fast_hadamard_transform is installed")
    assert "pip install fast-hadamard-transform" in library_problem()


# ---------------------------------------------------------------------------------------------- packing


@settings(max_examples=12)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 300),
    grid=st.sampled_from(GRIDS),
    tiles=st.sampled_from([2, 4]),
    seed=st.integers(0, 99),
)
def test_fragment_packing_loses_nothing(n, k, grid, tiles, seed):
    codes = codes_of(n, k, *grid, group=64, seed=seed)
    packed = packed_of(codes, tiles)
    assert torch.equal(packed.unpack(), codes.rotated())
    assert packed.padded % (tiles * 16) == 0
    assert packed.words.numel() * 32 == packed.padded * codes.rotation.padded * grid[0]


def test_fragment_packing_in_pieces_changes_nothing(monkeypatch):
    codes = codes_of(100, 256, bits=3)
    whole = packed_of(codes)
    monkeypatch.setattr(codebook, "PACK_BYTES", 4 * 32 * 128 * 2)
    parts = packed_of(codes)
    assert torch.equal(whole.words, parts.words)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_thread_finds_the_pairs_it_multiplies(bits):
    """The fragment layout of mma.m16n8k16 (PTX ISA), with k permuted so that a thread's x values are neighbours, read
    the way ``pair`` in codebook.cu reads it."""
    codes = codes_of(96, 192, bits=bits)
    packed = packed_of(codes)

    def pair(words, j):
        if bits == 4:
            return words[j // 4] >> 8 * (j % 4) & 255
        low = words[j // 8] >> 4 * (j % 8) & 15
        return low | (words[2] >> 2 * j & 3) << 4 if bits == 3 else low

    for block, step, tile, lane in [(0, 0, 0, 0), (1, 2, 1, 6), (2, 1, 0, 17), (2, 2, 1, 31)]:
        g, t = divmod(lane, 4)
        held = packed.words[block, step, tile]
        words = [int(word) & 0xFFFFFFFF for word in (held[lane] if bits == 4 else held[:, lane])]
        for instruction in range(4):
            for register in range(4):
                row = block * 32 + tile * 16 + g + 8 * (register % 2)
                column = step * 64 + t * 16 + instruction * 4 + 2 * (register // 2)
                assert pair(words, 4 * instruction + register) == int(codes.pairs[row, column // 2])
        group = step * 64 // codes.group_size
        rows = [block * 32 + tile * 16 + g + h for h in (0, 8)]
        assert torch.equal(packed.scales[block, group, g, tile], codes.scale[rows, group])


def test_the_table_holds_two_bfloat16_the_first_one_low():
    codes = codes_of(16, 64, bits=2)
    table = pair_table(codes)
    assert table.dtype == torch.int32
    low = (table << 16).view(torch.float32)
    high = (table & -65536).view(torch.float32)
    assert torch.equal(torch.stack([low, high], dim=-1), codes.grid.pairs())


# ---------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", CODEBOOK_KERNELS)
@pytest.mark.parametrize("rows", [1, 20])
def test_gate_and_up_come_out_activated(kernel, rows, device):
    gate, up = (torch.randn(48, 256, generator=torch.Generator().manual_seed(i)) for i in range(2))
    codes = quantize_pairs(interleave(gate, up).to(device), bits=4, dim=2, group_size=256, hadamard_size=512)
    x = inputs(rows, 256, device)
    y = make_codebook_linear(codes, Variant(kernel, 2, 2), swiglu=True)(x)
    assert y.shape[0] == rows
    assert y.dtype == torch.bfloat16
    assert relative(y[:, :48], expected(codes, x, swiglu=True)) < 1e-2  # two roundings to bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_more_rows_than_a_launch_takes(device):
    codes = codes_of(40, 128, device=device)
    linear = make_codebook_linear(codes, Variant("lut_mma", 2, 2))
    x = inputs(37, 128, device)
    y = linear(x)
    assert y.shape == (linear.splits, 37, linear.stride)
    assert relative(y.sum(0)[:, :40], expected(codes, x)) < 2e-3


def test_inputs_are_rotated_once_however_many_launches_they_take():
    calls = []

    def rotate(x, rotation):
        calls.append(len(x))
        return x

    linear = CodebookLinear(codes_of(64, 128), Variant("lut_mma", 2, 1), rotate=rotate)
    assert linear(torch.empty(20, 128, dtype=torch.bfloat16, device="meta")).shape == (1, 20, linear.stride)
    assert calls == [20]


@pytest.mark.parametrize("kernel", CODEBOOK_KERNELS)
def test_weights_can_be_moved(kernel):
    codes = codes_of(64, 128, bits=3)
    linear = make_codebook_linear(codes, Variant(kernel, 2, 1))
    x = inputs(2, 128)
    before = linear(x)
    assert sum(t.numel() * t.element_size() for t in linear.tensors) == linear.nbytes
    moved = [tensor.clone() for tensor in linear.tensors]
    for tensor in linear.tensors:
        tensor.zero_()
    linear.adopt(moved)
    assert torch.equal(linear(x), before)


def test_the_reference_keeps_its_codes_packed():
    codes = codes_of(20, 128, bits=3, dim=1)
    linear = ReferenceCodebook(codes)
    assert linear.nbytes == 20 * 128 * 3 // 8 + 2 * 20
    assert torch.equal(linear.quantized().pairs, codes.pairs)
    x = torch.randn(2, 128)
    torch.testing.assert_close(linear(x)[0], functional.linear(x, codes.dequantize()), rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_not_there_says_why():
    cpu = torch.device("cpu")
    assert HiggsFormat().unavailable("reference", cpu) is None
    assert HiggsFormat().unavailable("lut_mma", cpu) == "no CUDA device"
    with pytest.raises(ValueError, match="no look-up kernel 'other': use lut_mma, reference, flute"):
        make_codebook_linear(codes_of(16, 64), Variant("other"))
    with pytest.raises(ValueError, match="multiple of 32"):
        make_codebook_linear(codes_of(48, 64), Variant("reference"), swiglu=True)


@pytest.mark.parametrize("dim", [1, 2])
def test_flute_is_handed_what_it_expects(dim, monkeypatch):
    """A stand-in with FLUTE's documented meaning of its arguments, in torch."""

    def prepare(codes, scale, grid, *, num_bits, group_size, vector_size, dtype, device, check_correctness):
        assert codes.dtype == torch.uint8
        assert scale.dtype == grid.dtype == dtype == torch.bfloat16
        assert grid.shape == (2 ** (num_bits * vector_size), vector_size)
        values = grid.float()[codes.int()].flatten(1)
        dense = values * scale.float().repeat_interleave(group_size, dim=1)
        return dense, scale, grid, torch.zeros(4, 2, dtype=dtype), None

    def product(x, weight, scale, table, pairs, workspace, tuned):
        assert pairs.dtype == torch.float32
        return (x.float() @ weight.t()).to(x.dtype)

    modules = {name: types.ModuleType(name) for name in ("flute", "flute.integrations", "flute.utils", "flute.tune")}
    modules["flute.integrations.higgs"] = types.ModuleType("flute.integrations.higgs")
    modules["flute.integrations.higgs"].prepare_data_transposed = prepare
    modules["flute.tune"].qgemm_v2 = product
    modules["flute.utils"].make_workspace_streamk = lambda device: None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    codes = codes_of(32, 256, bits=3, dim=dim)
    x = inputs(3, 256)
    assert relative(FluteLinear(codes)(x).sum(0), expected(codes, x)) < 1e-2  # scales and sums in bfloat16
    with pytest.raises(ValueError, match="groups of 32, 64, 128, 256, not 192"):
        FluteLinear(codes_of(32, 192))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 6, 11])
@pytest.mark.parametrize(("bits", "dim"), GRIDS)
@pytest.mark.parametrize(
    ("n", "k", "tiles"), [(4608, 3584, 2), (18944, 3584, 4), (3584, 18944, 2), (960, 576, 2), (100, 1536, 4)]
)
def test_the_cuda_kernel_computes_the_reference(rows, bits, dim, n, k, tiles):
    assert codebook.unavailable() is None
    codes = codes_of(n, k, bits, dim, device="cuda")
    x = inputs(rows, k, "cuda")
    for splits in (1, 3):
        linear = CodebookLinear(codes, Variant("lut_mma", tiles, splits))
        assert relative(linear(x).sum(0)[:, :n], expected(codes, x)) < 2e-3


@pytest.mark.gpu
def test_a_captured_call_repeats_bit_for_bit():
    codes = codes_of(512, 1536, device="cuda")
    linear = make_codebook_linear(codes, Variant("lut_mma"))
    x = inputs(6, 1536, "cuda")
    eager = linear(x).clone()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        captured = linear(x)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, eager)
