"""Coded weights come back bit for bit, whatever they are; coded targets stream as plain ones do."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.codec.format import CHUNK, decode, encode
from subspec.codec.restore import (
    FIELDS,
    THREADS,
    Layout,
    Piece,
    Rows,
    Spans,
    blocks_of,
    decode_into,
    describe,
    substitute_codes,
)
from subspec.errors import SubspecError
from subspec.kernels import int4, wq
from subspec.quant.intervals import margin_for
from subspec.quant.level_linear import MmaInt4, TritonWq
from subspec.quant.quantized_weight import Codes, HqqCodes
from tests.helpers.host_cuda import compile_host

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
    for number, value in enumerate(
        [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 3e38, 7.0]
    ):
        flat[number :: 131 + 2 * number] = value
    return flat.view(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(64, 256, 64), (5, 192, 64), (1, 64, 32), (33, 128, 128)])
def test_a_quantized_weight_comes_back(bits, n, k, group):
    weight = gaussian(n, k)
    codes = HqqCodes(bits, group).codes(weight)
    for exact in (weight, spoiled(weight)):
        assert same(decode(encode(exact, codes, margin_for(bits)), codes), exact)


@pytest.mark.parametrize(("bits", "most"), [(2, 9.5), (3, 8.2), (4, 7.05), (8, 3.65)])
def test_a_gaussian_weight_takes_as_many_bits_as_the_planner_reserves(bits, most):
    from subspec.codec.coding import BITS

    weight = gaussian(256, 1024)
    coded = encode(weight, HqqCodes(bits).codes(weight), margin_for(bits))
    assert coded.bits_per_weight < most
    assert most <= BITS[bits] + 0.2
    assert coded.bits_per_weight < BITS[bits]


@settings(max_examples=25, deadline=None)
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
    codes = Codes(q, torch.full((10, 1), scale), torch.full((10, 1), zero), 64)
    assert same(decode(encode(weight, codes, margin), codes), weight)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 40), groups=st.integers(1, 5), group=st.sampled_from([8, 32, 64]), seed=st.integers(0, 9)
)
def test_ragged_shapes(n, groups, group, seed):
    weight = gaussian(n, groups * group, seed)
    q = torch.randint(0, 16, weight.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes = Codes(q, torch.full((n, groups), 0.006), torch.full((n, groups), 7.5), group)
    assert same(decode(encode(weight, codes, 0.0), codes), weight)


def test_weights_inside_their_interval_are_cheap_and_others_are_not_lost():
    weight = gaussian(32, 128)
    codes = HqqCodes(4).codes(weight)
    far = encode(weight + 1, codes, 0.0)
    assert encode(weight, codes, 0.0).bits_per_weight < 8 < 16 < far.bits_per_weight
    assert same(decode(far, codes), weight + 1)


def test_constant_groups_and_zeros():
    weight = torch.zeros(8, 128, dtype=torch.bfloat16)
    weight[3] = 0.25
    codes = HqqCodes(4).codes(weight)
    assert same(decode(encode(weight, codes, margin_for(4)), codes), weight)


def test_only_bfloat16():
    with pytest.raises(TypeError, match="bfloat16"):
        encode(torch.zeros(2, 64), HqqCodes(4).codes(torch.zeros(2, 64)), 0.0)


def test_more_weights_than_the_decoder_can_number_are_refused():
    huge = torch.empty(1, dtype=torch.bfloat16).expand(1 << 16, 1 << 15)
    codes = Codes(torch.zeros(1, 64, dtype=torch.uint8), torch.ones(1, 1), torch.ones(1, 1), 64)
    with pytest.raises(SubspecError, match=r"set offload\.codec=none"):
        encode(huge, codes, 0.0)


# ------------------------------------------------------------------------- from the kernels' own order of codes


def fused(kind, parts, *, swiglu, bits=4, tiles=2, group=64):
    """Several weights quantized and fused as a draft level has them: the Linear, and each weight's codes and rows."""
    codes = [HqqCodes(bits, group).codes(part) for part in parts]
    stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
    if kind == "int4_mma":
        linear = MmaInt4(int4.pack(stacked.q, stacked.scale, stacked.zero, tiles=tiles, swiglu=swiglu))
    else:
        linear = TritonWq(wq.pack(stacked.q, stacked.scale, stacked.zero, bits=bits, swiglu=swiglu))
    first, rows = 0, []
    for number, part in enumerate(parts):
        rows.append(Rows(16 * number, True) if swiglu else Rows(first, False))
        first += part.shape[0]
    return linear, list(zip([spoiled(part) for part in parts], codes, rows, strict=True))


CASES = [
    ("int4_mma", False, 4, 2),
    ("int4_mma", True, 4, 2),
    ("int4_mma", False, 4, 4),
    ("int4_mma", True, 4, 4),
    ("triton_wq", False, 2, 0),
    ("triton_wq", True, 3, 0),
    ("triton_wq", False, 4, 0),
    ("triton_wq", False, 8, 0),
]


def parts_of(swiglu):
    return [gaussian(64, 192, seed) for seed in (1, 2)] if swiglu else [
        gaussian(n, 576, n) for n in (96, 32, 48)
    ]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "swiglu", "bits", "tiles"), CASES)
def test_decoding_reads_the_kernels_own_order(kind, swiglu, bits, tiles, device):
    linear, members = fused(
        kind, [p.to(device) for p in parts_of(swiglu)], swiglu=swiglu, bits=bits, tiles=tiles
    )
    for weight, codes, rows in members:
        own = substitute_codes(linear, rows, weight.shape[0])
        assert torch.equal(own.q, codes.q)
        assert torch.equal(own.scale, codes.scale)
        assert torch.equal(own.zero, codes.zero)
        coded = encode(weight, codes, margin_for(bits))
        out = torch.full_like(weight, 5.0)
        decode_into(out, coded, linear, rows)
        assert same(out, weight)


HOST = r"""
#define HOST_TEST
#include "codec.cu"
#include <cstdlib>
static unsigned table[16 * THREADS];

#if LAYOUT == 1 || LAYOUT == 4
#include "codec_staged.cu"
// A block's threads one after the other, between the barriers of the kernel.
static void decode_block(const Part& part, const unsigned char* flat, long long block) {
  static unsigned ring[RING * THREADS];
  alignas(16) static unsigned lines[LINE * THREADS];
  for (unsigned& word : table) word = rand();
  for (unsigned& word : ring) word = rand();
  for (unsigned& word : lines) word = rand();
  static Lane lanes[THREADS];
  static Chunk chunks[THREADS];
  for (int t = 0; t < THREADS; ++t) {
    chunks[t] = chunk_of(part, (block - part.first_block) * THREADS + t);
    begin_chunk(lanes[t], part, flat, chunks[t].number, ring + t);
  }
  for (int step = 0; step < STEPS; ++step) {
    for (int t = 0; t < THREADS; ++t)
      if (step < lanes[t].steps) {
        decode_stretch(lanes[t], part, table + t, lines + t * LINE);
        pass_stretch(lanes[t], part);
      }
    for (int t = 0; t < THREADS; ++t)
      write_lines(part, chunks[t], step, t % 32, lines + t / 32 * 32 * LINE);
  }
}

extern "C" void number_chunks(long long columns, int threads, long long* numbers) {
  Part part = {};
  part.columns = columns;
  for (int t = 0; t < threads; ++t) numbers[t] = chunk_of(part, t).number;
}
#else
static void decode_block(const Part& part, const unsigned char* flat, long long block) {
  for (int t = 0; t < THREADS; ++t) {
    const long long chunk = (block - part.first_block) * THREADS + t;
    if (chunk * CHUNK < part.total) decode_chunk(part, flat, chunk, table + t);
  }
}
#endif

extern "C" void decode(const Part* parts, const unsigned char* flat, int count, int blocks) {
  for (int block = 0; block < blocks; ++block) decode_block(part_of(parts, count, block), flat, block);
}
"""

LAYOUTS = [Layout(1), Layout(2), *(Layout(4, bits) for bits in (2, 3, 4, 8))]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The CUDA source as C++, by layout."""
    folder = tmp_path_factory.mktemp("codec")
    return {layout: compile_host(folder, HOST, layout.macros) for layout in LAYOUTS}


def run_on_host(compiled, pieces, flat):
    """What :class:`PieceRestorer` launches, as C++; ``flat``: int32, 16-byte aligned as a device's memory is."""
    described = [describe(piece) for piece in pieces]
    (layout,) = {layout for layout, _ in described}
    blocks = [blocks_of(layout, piece.out) for piece in pieces]
    table = torch.tensor([[*fields, sum(blocks[:i])] for i, (_, fields) in enumerate(described)])
    assert table.shape == (len(pieces), FIELDS)
    assert flat.data_ptr() % 16 == 0
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, flat)]
    compiled[layout].decode(*arguments, len(pieces), sum(blocks))


@pytest.mark.parametrize(("kind", "swiglu", "bits", "tiles"), CASES)
def test_the_cuda_source_decodes_what_torch_encoded(compiled, kind, swiglu, bits, tiles):
    linear, members = fused(kind, parts_of(swiglu), swiglu=swiglu, bits=bits, tiles=tiles)
    decode_members(compiled, linear, members, bits)


@pytest.mark.parametrize(
    ("kind", "bits", "tiles"), [("int4_mma", 4, 4), ("int4_mma", 4, 8), ("triton_wq", 8, 0)]
)
@pytest.mark.parametrize("last", [75, 1])
def test_the_cuda_source_decodes_slices_of_a_vocabulary_of_any_size(compiled, kind, bits, tiles, last):
    """As of an LM head: its slices begin inside a kernel's block of rows, and the last block is not full."""
    parts = [gaussian(n, 320, seed) for seed, n in enumerate((96, 96, last))]
    linear, members = fused(kind, parts, swiglu=False, bits=bits, tiles=tiles)
    decode_members(compiled, linear, members, bits)


def decode_members(compiled, linear, members, bits):
    """All weights of a fused Linear in one call, from one run of bytes, as a layer's are: the layout they have."""
    flat, pieces = torch.zeros(0, dtype=torch.int32), []
    for weight, _, rows in members:
        coded = encode(weight, substitute_codes(linear, rows, weight.shape[0]), margin_for(bits))
        begin = flat.numel()
        flat = torch.cat([flat, coded.starts, coded.stream])
        behind = begin + coded.starts.numel()
        spans = Spans((4 * begin, coded.starts.numel()), (4 * behind, coded.stream.numel()))
        pieces.append(Piece(torch.full_like(weight, 5.0), linear, rows, spans, coded.margin))
    run_on_host(compiled, pieces, flat)
    for piece, (weight, _, _) in zip(pieces, members, strict=True):
        assert same(piece.out, weight)
    return describe(pieces[0])[0]


# bits, inputs, group, rows of each weight, gate and up
TRITON_CASES = [
    (8, 512, 64, (96, 32, 48), False),  # a warp's rows are neighbours
    (8, 1024, 128, (37, 70), False),  # a warp lacks some of its rows
    (8, 512, 16, (64, 64), True),
    (4, 1024, 32, (45, 3), False),
    (4, 1536, 128, (64, 64), True),
    (3, 512, 128, (33, 31), False),
    (3, 1024, 32, (64, 64), True),
    (2, 1024, 16, (40,), False),
    (2, 3584, 64, (33, 5), False),
    (8, 192, 64, (37, 64, 5), False),  # chunks go on in the next row, and the last one is short
    (8, 576, 32, (96, 96), True),
    (8, 768, 96, (70,), False),  # groups end within 64 weights
    (4, 576, 192, (33, 50), False),
    (4, 320, 20, (64,), False),
    (3, 192, 16, (65, 7), False),
    (3, 896, 128, (64, 64), True),
    (2, 576, 24, (41,), False),
    (2, 64, 64, (1, 300), False),
    (8, 2048, 64, (530,), False),  # several blocks
    (2, 1088, 64, (300, 2), False),
]


@pytest.mark.parametrize(("bits", "k", "group", "rows", "swiglu"), TRITON_CASES)
def test_the_cuda_source_decodes_the_triton_order_by_way_of_shared_memory(
    compiled, bits, k, group, rows, swiglu
):
    parts = [gaussian(n, k, seed) for seed, n in enumerate(rows)]
    linear, members = fused("triton_wq", parts, swiglu=swiglu, bits=bits, group=group)
    assert decode_members(compiled, linear, members, bits) == Layout(4, bits)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "k", "group", "rows", "swiglu"), TRITON_CASES)
def test_the_device_decodes_the_triton_order(bits, k, group, rows, swiglu):
    parts = [gaussian(n, k, seed).cuda() for seed, n in enumerate(rows)]
    linear, members = fused("triton_wq", parts, swiglu=swiglu, bits=bits, group=group)
    for weight, codes, own in members:
        out = torch.full_like(weight, 5.0)
        decode_into(out, encode(weight, codes, margin_for(bits)), linear, own)
        assert same(out, weight)


@pytest.mark.parametrize(
    ("bits", "k", "group", "rows"),
    [
        (8, 100, 20, (33, 7)),
        (4, 1056, 32, (70,)),
        (3, 144, 16, (21, 40)),
        (2, 80, 16, (129,)),
        (8, 192, 6, (9,)),
    ],
)
def test_inputs_or_groups_that_no_quads_fill_are_decoded_without_it(compiled, bits, k, group, rows):
    parts = [gaussian(n, k, seed) for seed, n in enumerate(rows)]
    linear, members = fused("triton_wq", parts, swiglu=False, bits=bits, group=group)
    assert decode_members(compiled, linear, members, bits) == Layout(2)


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(1, 80).map(lambda n: 64 * n), rows=st.integers(1, 400))
def test_every_chunk_has_one_thread_and_a_warps_begin_at_one_column(compiled, columns, rows):
    layout = Layout(4, 8)
    threads = THREADS * blocks_of(layout, torch.empty(rows, columns, device="meta"))
    numbers = torch.empty(threads, dtype=torch.int64)
    compiled[layout].number_chunks(ctypes.c_longlong(columns), threads, ctypes.c_void_p(numbers.data_ptr()))
    chunks = -(-rows * columns // CHUNK)
    assert torch.equal(numbers[numbers < chunks].sort().values, torch.arange(chunks))
    begins = (numbers * CHUNK % columns).view(-1, 32)
    assert torch.equal(begins, begins[:, :1].expand_as(begins))


def test_several_blocks_are_decoded(compiled):
    """More chunks than a block has threads, and a last one that is short."""
    weight = spoiled(gaussian(45, 64 * 23))
    codes = HqqCodes().codes(weight)
    linear = MmaInt4(int4.pack(codes.q, codes.scale, codes.zero, tiles=2))
    rows = Rows(0, False)
    coded = encode(weight, codes, margin_for(4))
    count = coded.starts.numel()
    assert count > THREADS
    assert weight.numel() % CHUNK
    piece = Piece(torch.zeros_like(weight), linear, rows, Spans((0, count), (4 * count, 0)), coded.margin)
    run_on_host(compiled, [piece], torch.cat([coded.starts, coded.stream]))
    assert same(piece.out, weight)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([("int4_mma", 4), ("triton_wq", 2), ("triton_wq", 3), ("triton_wq", 8)]),
    scale=st.one_of(st.floats(width=16), st.floats(2.0**-14, 1024.0, width=16)),
    zero=st.one_of(st.floats(width=16), st.floats(-20, 20, width=16)),
    seed=st.integers(0, 99),
    margin=st.sampled_from([0.0, 2.0**-8, 0.0625]),
)
def test_the_cuda_source_decodes_every_bit_pattern(compiled, kind, scale, zero, seed, margin):
    (order, bits), generator = kind, torch.Generator().manual_seed(seed)
    weight = EVERY_BFLOAT16[torch.randint(0, 1 << 16, (32 * 64,), generator=generator)].view(32, 64)
    q = torch.randint(0, 1 << bits, (32, 64), dtype=torch.uint8, generator=generator)
    scales, zeros = torch.full((32, 1), scale), torch.full((32, 1), zero)
    if order == "int4_mma":
        linear = MmaInt4(int4.pack(q, scales, zeros, tiles=2))
    else:
        linear = TritonWq(wq.pack(q, scales, zeros, bits=bits))
    rows = Rows(0, False)
    coded = encode(weight, substitute_codes(linear, rows, 32), margin)
    flat = torch.cat([coded.starts, coded.stream])
    count = coded.starts.numel()
    piece = Piece(torch.zeros_like(weight), linear, rows, Spans((0, count), (4 * count, 0)), margin)
    run_on_host(compiled, [piece], flat)
    assert same(piece.out, weight)
