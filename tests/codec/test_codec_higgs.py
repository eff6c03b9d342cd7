"""Weights coded by HIGGS come back bit for bit, and what they are decoded with has the same bits everywhere."""

import ctypes
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.codebook_dequantize import FIELDS, ROWS, Dequantizer, Rotated
from subspec.codec.coding import reserved_bits
from subspec.codec.format import decode, encode
from subspec.codec.restore import Layout, Piece, Rows, Spans, decode_into, substitute_codes
from subspec.quant.codebook_format import LutFormat
from subspec.quant.codebook_linear import MmaLut, ReferenceLut, make_lut_linear
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import LEAST_BLOCK, Rotation, butterfly, walsh_hadamard
from subspec.quant.higgs_weight import HiggsCodes, group_of
from subspec.quant.higgs_weight import encode as quantize
from subspec.quant.intervals import GaussianIntervals, margin_of, rebuild
from subspec.quant.level_linear import Variant
from tests.codec.test_codec import DEVICES, EVERY_BFLOAT16, HOST, gaussian, run_on_host, same, spoiled
from tests.helpers.host_cuda import compile_host

HALVES = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)


def higgs(weight, bits=4, dim=2, group=256, block=512):
    return quantize(weight, bits=bits, dim=dim, group_size=group, hadamard_size=block)


def made_up(n, k, *, bits, group=256, block=512, seed=0, every_scale=True):
    """Codes that no weight has: random pairs, and scales that may be anything of 16 bits, NaN and infinite included."""
    generator = torch.Generator().manual_seed(seed)
    rotation = Rotation.of(k, block)
    group = group_of(rotation.padded, group)
    pairs = torch.randint(0, 4**bits, (n, rotation.padded // 2), dtype=torch.uint8, generator=generator)
    shape = (n, rotation.padded // group)
    usual = torch.rand(shape, generator=generator).half() * 0.01 + 0.01
    scale = HALVES[torch.randint(0, 1 << 16, shape, generator=generator)] if every_scale else usual
    return HiggsCodes(pairs, scale, load_grid(bits, 2), group, rotation)


def alike(a, b):
    """The same bits, but for what kind of NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and same(a.nan_to_num(0.0), b.nan_to_num(0.0))


# ------------------------------------------------------------------------------------------- the code itself


@pytest.mark.parametrize(("bits", "dim"), [(2, 2), (3, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize(
    ("n", "k", "group", "block"),
    [(24, 512, 256, 512), (5, 384, 256, 512), (9, 100, 64, 64), (1, 64, 64, 1024)],
)
def test_a_quantized_weight_comes_back(bits, dim, n, k, group, block):
    weight = gaussian(n, k)
    codes = higgs(weight, bits, dim, group, block)
    for exact in (weight, spoiled(weight)):
        assert same(decode(encode(exact, codes, margin_of(codes)), codes), exact)


@pytest.mark.parametrize(("bits", "dim"), [(bits, dim) for bits in (4, 3, 2) for dim in (1, 2)])
def test_a_gaussian_weight_takes_about_the_bits_that_the_planner_reserves(bits, dim):
    weight = gaussian(256, 1024)
    codes = higgs(weight, bits, dim)
    coded = encode(weight, codes, margin_of(codes))
    reserved = reserved_bits(LutFormat(bits, dim))
    assert reserved - 0.25 < coded.bits_per_weight < reserved


def test_shorter_codes_lie_in_the_middle_of_the_interval(monkeypatch):
    weight = gaussian(128, 1024)
    codes = higgs(weight)
    middle = encode(weight, codes, margin_of(codes)).bits_per_weight
    monkeypatch.setattr(GaussianIntervals, "centred", False)
    aside = encode(weight, codes, margin_of(codes))
    assert same(decode(aside, codes), weight)
    assert middle < aside.bits_per_weight - 0.1


@settings(max_examples=40, deadline=None)
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
        assert same(decode(encode(weight, codes, margin), codes), weight)


def test_constant_rows_and_zeros():
    weight = torch.zeros(8, 192, dtype=torch.bfloat16)
    weight[3], weight[5] = 0.25, -1e-39
    codes = higgs(weight)
    assert same(decode(encode(weight, codes, margin_of(codes)), codes), weight)


def test_codes_of_another_kind_name_no_intervals():
    with pytest.raises(TypeError, match="str names no intervals"):
        margin_of("codes")
    with pytest.raises(TypeError, match="str names no intervals"):
        encode(gaussian(1, 64), "codes", 0.5)


def test_intervals_do_not_depend_on_the_piece_they_are_asked_for():
    codes = made_up(7, 300, bits=3, every_scale=False)
    intervals = GaussianIntervals(codes, margin_of(codes))
    whole = intervals.between(0, 2100)
    for begin, end in [(0, 1), (299, 301), (512, 1024), (1999, 2100)]:
        for part, all_of_it in zip(intervals.between(begin, end), whole, strict=True):
            assert torch.equal(part, all_of_it[begin:end])


def test_residuals_have_the_deviation_that_the_reach_is_counted_in():
    weight = gaussian(256, 1024)
    codes = higgs(weight)
    low, high = GaussianIntervals(codes, codes.grid.mse**0.5).between(0, weight.numel())
    deviations = (weight.float().flatten() - rebuild(codes).float().flatten()) / ((high - low) / 2)
    assert deviations.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)


def test_a_butterfly_is_the_transform_without_its_factor():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 64, 256):
        torch.testing.assert_close(butterfly(x, size) * size**-0.5, walsh_hadamard(x, size))


@pytest.mark.parametrize("k", [512, 576, 100])
def test_rebuilding_is_dequantizing(k):
    codes = higgs(gaussian(16, k))
    torch.testing.assert_close(rebuild(codes).float(), codes.dequantize(), atol=1e-4, rtol=2**-8)


# ------------------------------------------------------------------------- from the kernel's own order of codes

CASES = [  # bits, block, tiles, gate and up, inputs: chunks of 512 begin within rows and within blocks
    (4, 512, 2, False, 1536),
    (4, 1024, 4, True, 1024),
    (4, 128, 2, True, 384),
    (3, 64, 4, False, 576),
    (3, 256, 2, False, 256),
    (2, 128, 2, True, 128),
    (2, 64, 2, False, 100),
    (4, 64, 4, False, 37),
]


def fused(parts, bits, block, tiles, swiglu):
    """Several weights quantized and fused as a draft level has them: the Linear, and each weight's codes and rows."""
    codes = [higgs(part, bits, block=block) for part in parts]
    linear = make_lut_linear(
        codes[0].stacked(codes[1:], swiglu=swiglu), Variant(MmaLut.kind, tiles), swiglu=swiglu
    )
    first, rows = 0, []
    for number, part in enumerate(parts):
        rows.append(Rows(16 * number, True) if swiglu else Rows(first, False))
        first += part.shape[0]
    return linear, list(zip([spoiled(part) for part in parts], codes, rows, strict=True))


def parts_of(swiglu, k):
    return [gaussian(n, k, n) for n in ((64, 64) if swiglu else (37, 8, 19))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_decoding_reads_the_kernels_own_order(bits, block, tiles, swiglu, k, device):
    parts = [part.to(device) for part in parts_of(swiglu, k)]
    linear, members = fused(parts, bits, block, tiles, swiglu)
    for weight, codes, rows in members:
        own = substitute_codes(linear, rows, weight.shape[0])
        assert torch.equal(own.pairs, codes.pairs)
        assert torch.equal(own.scale, codes.scale)
        assert (own.group_size, own.rotation, own.grid) == (codes.group_size, codes.rotation, codes.grid)
        coded = encode(weight, codes, margin_of(codes))
        out = torch.full_like(weight, 5.0)
        decode_into(out, coded, linear, rows)
        assert same(out, weight)


def test_other_kernels_orders_are_not_guessed():
    codes = higgs(gaussian(32, 128))
    linear = make_lut_linear(codes, Variant(ReferenceLut.kind))
    with pytest.raises(TypeError, match="reference"):
        substitute_codes(linear, Rows(0, False), 32)


def made_up_linear(count, k, bits, block, tiles, swiglu, every_scale, device="cpu"):
    """A fused Linear of two weights of ``count`` rows; each one's codes and rows."""
    codes = [
        made_up(count, k, bits=bits, block=block, seed=seed, every_scale=every_scale) for seed in range(2)
    ]
    stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
    there = replace(stacked, pairs=stacked.pairs.to(device), scale=stacked.scale.to(device))
    linear = make_lut_linear(there, Variant(MmaLut.kind, tiles), swiglu=swiglu)
    rows = [Rows(16 * number, True) if swiglu else Rows(count * number, False) for number in range(2)]
    return linear, list(zip(codes, rows, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("every_scale", [False, True])
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_device_rebuilds_what_a_cpu_rebuilds(bits, block, tiles, swiglu, k, every_scale):
    linear, members = made_up_linear(64, k, bits, block, tiles, swiglu, every_scale, "cuda")
    outs = [torch.full((64, k), 5.0, dtype=torch.bfloat16, device="cuda") for _ in members]
    Dequantizer(
        [
            Rotated(out, linear, rows.first, rows.interleaved)
            for out, (_, rows) in zip(outs, members, strict=True)
        ]
    )()
    for out, (codes, _) in zip(outs, members, strict=True):
        assert alike(out.cpu(), rebuild(codes))
        there = replace(codes, pairs=codes.pairs.cuda(), scale=codes.scale.cuda())
        assert alike(rebuild(there).cpu(), rebuild(codes))


# ------------------------------------------------------------------------------- the CUDA source, as plain C++

DEQUANTIZE = r"""
#define HOST_TEST
#include "codec.cu"
#include "lut_dequantize.cu"
extern "C" void dequantize(const Rotated* parts, int count, int blocks) {
  static float v[32 * STEPS][16], before[32 * STEPS][16];
  alignas(16) static float shared[ROWS * ROW_STRIDE];
  for (int block = 0; block < blocks; ++block) {
    const Rotated& part = part_of(parts, count, block);
    const Site site = site_of(part, block - (int)part.first_block);
    for (int i = 0; i < 32 * STEPS; ++i) {
      look_up(v[i], part, (const unsigned*)part.table, site, i);
      within(v[i]);
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      memcpy(before, v, sizeof v);
      for (int i = 0; i < 32 * STEPS; ++i)
        for (int j = 0; j < 16; ++j) v[i][j] = across(before[i][j], before[i ^ mask][j], i & mask);
    }
    for (int i = 0; i < 32 * STEPS; ++i) put(shared, v[i], i);
    for (int i = 0; i < 32 * STEPS; ++i) finish(shared, part, site, i);
  }
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The CUDA sources as C++: the decoder by layout, and what dequantizes by bits and block."""
    folder = tmp_path_factory.mktemp("higgs")
    libraries = {
        (bits, block): compile_host(
            folder, DEQUANTIZE, {"LAYOUT": 0, "BITS": bits, "STEPS": block // LEAST_BLOCK}
        )
        for bits, block, *_ in CASES
    }
    return libraries | {Layout(3): compile_host(folder, HOST, Layout(3).macros)}


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def dequantize_on_host(library, parts):
    """A ``Dequantizer``'s launch."""
    rows, blocks = [], 0
    for part in parts:
        rows.append([*part.describe(), blocks])
        blocks += part.blocks
    table = torch.tensor(rows)
    assert table.shape == (len(parts), FIELDS)
    library.dequantize(pointer(table), len(parts), blocks)


@pytest.mark.parametrize("every_scale", [False, True])
@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_cuda_source_rebuilds_what_torch_rebuilds(compiled, bits, block, tiles, swiglu, k, every_scale):
    """All weights of a fused Linear in one launch."""
    count = 64 if swiglu else 3 * ROWS + 5
    linear, members = made_up_linear(count, k, bits, block, tiles, swiglu, every_scale)
    outs = [torch.full((count, k), 5.0, dtype=torch.bfloat16) for _ in members]
    parts = [
        Rotated(out, linear, rows.first, rows.interleaved)
        for out, (_, rows) in zip(outs, members, strict=True)
    ]
    dequantize_on_host(compiled[bits, block], parts)
    for out, (codes, _) in zip(outs, members, strict=True):
        assert alike(out, rebuild(codes))


@pytest.mark.parametrize(("bits", "block", "tiles", "swiglu", "k"), CASES)
def test_the_cuda_source_decodes_what_torch_encoded(compiled, bits, block, tiles, swiglu, k):
    """All weights of a fused Linear in one call, from one run of bytes, as a layer's are."""
    linear, members = fused(parts_of(swiglu, k), bits, block, tiles, swiglu)
    flat, pieces = torch.zeros(0, dtype=torch.int32), []
    for weight, codes, rows in members:
        coded = encode(weight, codes, margin_of(codes))
        begin = flat.numel()
        flat = torch.cat([flat, coded.starts, coded.stream])
        behind = begin + coded.starts.numel()
        spans = Spans((4 * begin, coded.starts.numel()), (4 * behind, coded.stream.numel()))
        pieces.append(Piece(torch.full_like(weight, 5.0), linear, rows, spans, coded.margin))
    rotated = [Rotated(piece.out, linear, piece.rows.first, piece.rows.interleaved) for piece in pieces]
    dequantize_on_host(compiled[bits, block], rotated)
    run_on_host(compiled, pieces, flat)
    for piece, (weight, _, _) in zip(pieces, members, strict=True):
        assert same(piece.out, weight)
