"""Levels of many rows: the order of x, who writes it, grids, and on a GPU the product and whole levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.decoding.tree_policy import Beam
from subspec.kernels import int4, int4_wide
from subspec.kernels.int4_wide import WideGrid, empty_rows, in_tiles, tiles_of, wide_grid
from subspec.quant.level_linear import Dense
from tests.helpers.levels import apart, fused_draft, grown_alike, model_of, module_draft
from tests.kernels.test_int4 import check, empty_output, inputs, integers

CPU = torch.device("cpu")
TILES = st.sampled_from([8 * eights for eights in int4_wide.EIGHTS])


def whole(x, tile):
    """All of the memory of an x in tiles: [tiles, groups, tile, 64]."""
    count = -(-x.shape[0] // tile)
    return x.as_strided((count, x.shape[1] // 64, tile, 64), (x.shape[1] * tile, tile * 64, 64, 1))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 140), groups=st.integers(1, 3), tile=TILES, seed=st.integers(0, 99))
def test_a_tile_holds_what_threads_multiply(rows, groups, tile, seed):
    """Element ``2 t + e`` of chunk ``c`` is B's row ``8 c + 2 t + e`` of the group: A's, in the order of int4.py."""
    x = torch.randn(rows, groups * 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tiles = whole(in_tiles(x, tile), tile)
    for row in {0, rows // 2, rows - 1}:
        at = tiles[row // tile, :, row % tile]
        for c in range(8):
            chunk = at[:, 8 * (c ^ row % 8) :][:, :8]
            step, half = divmod(c, 2)  # instruction, and register of its A operand
            for t in range(4):
                first = 16 * t + 4 * step + 2 * half
                expected = x[row].view(groups, 64)[:, first : first + 2]
                assert torch.equal(chunk[:, 2 * t : 2 * t + 2], expected)
    assert in_tiles(x, 0) is x


@pytest.mark.parametrize("rows", [17, 40, 70])
def test_memory_has_whole_tiles(rows):
    tile, count = tiles_of(rows)
    x = empty_rows(rows, 128, CPU, torch.float16)
    assert x.shape == (rows, 128)
    assert x.untyped_storage().nbytes() == tile * count * 256
    assert in_tiles(x.zero_(), tile).untyped_storage().nbytes() == tile * count * 256
    assert empty_rows(6, 128, CPU, torch.float16).untyped_storage().nbytes() == 6 * 256


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_that_write_x_write_tiles(device):
    pytest.importorskip("triton")
    from subspec.kernels import level

    rows, heads, dim, splits = 21, 2, 64, 2
    hidden, tile = heads * dim, 24
    generator = torch.Generator(device).manual_seed(0)

    def random(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def written(kernel, grid, arguments, **options):
        row_by_row, tiles = (torch.zeros(24, hidden, dtype=torch.bfloat16, device=device)[:rows] for _ in range(2))
        for out, own in ((row_by_row, 0), (tiles, tile)):
            kernel[grid](*arguments(out), TILE=own, **options)
        return row_by_row, tiles

    residual, weight = random(rows, hidden, dtype=torch.bfloat16), random(hidden, dtype=torch.bfloat16)
    norm = written(
        level.add_rms_norm, (rows,), lambda out: (residual, residual, weight, out, rows, 1e-6, hidden, 0), SPLITS=0,
        BLOCK=128,
    )  # fmt: skip
    parts, sums = random(splits, rows, heads, dim), random(2, splits, rows, heads).abs() + 1
    attention = written(
        level.merge_attention, (rows, heads), lambda out: (parts, sums[0], sums[1], out, rows, heads), SPLITS=splits,
        D=dim,
    )  # fmt: skip
    for row_by_row, tiles in (norm, attention):
        assert torch.equal(whole(tiles, tile), whole(in_tiles(row_by_row, tile), tile))


def test_grids():
    assert [tiles_of(rows) for rows in (17, 24, 25, 32, 33, 48, 64, 65, 128, 129)] == [
        (24, 1), (24, 1), (32, 1), (32, 1), (48, 1), (48, 1), (64, 1), (48, 2), (64, 2), (48, 3),
    ]  # fmt: skip
    grids = {
        (37888, 3584, True): WideGrid(32, 1, 5, 1),  # 119 blocks for 132 multiprocessors
        (28672, 4096, True): WideGrid(32, 1, 4, 1),
        (4608, 3584, False): WideGrid(32, 1, 4, 7),
        (3584, 18944, False): WideGrid(32, 1, 4, 9),
        (256, 128, False): WideGrid(32, 1, 1, 1),
    }
    for (n, k, whole_sums), expected in grids.items():
        assert wide_grid(32, n, k // 64, 132, whole=whole_sums) == expected


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(17, 200), n=st.integers(1, 50000), groups=st.integers(1, 400), count=st.sampled_from([132, 78]))
def test_no_slice_is_empty(rows, n, groups, count):
    grid = wide_grid(rows, n, groups, count, whole=False)
    assert (grid.splits - 1) * -(-groups // grid.splits) < groups


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 24, 31, 38, 64, 70])
@pytest.mark.parametrize(("n", "k", "tiles"), [(37888, 3584, 4), (3584, 18944, 2), (1024, 576, 2)])
@pytest.mark.parametrize("swiglu", [False, True])
def test_the_kernel_computes_the_reference(rows, n, k, tiles, swiglu):
    if not int4_wide.runs_on(0):
        pytest.skip("needs compute capability 9.0")
    weight = int4.pack(*integers(n, k, 4, device="cuda"), tiles=tiles, swiglu=swiglu)
    x = inputs(rows, k, "cuda")
    grid = weight.wide(rows)
    for warp_groups in {grid.warp_groups, 1, 2, 3, 4, 5}:
        own = WideGrid(grid.tile, grid.tiles, warp_groups, grid.splits)
        out = empty_output(weight, rows, grid.splits, "cuda")
        weight.multiply_tiles(in_tiles(x, grid.tile), out, own)
        check(weight, x, out, 2e-3)  # weights are rounded to float16
        if swiglu:
            tiled = empty_rows(rows, out.shape[1], x.device, out.dtype)
            weight.multiply_tiles(in_tiles(x, grid.tile), tiled, own, tiled=True)
            for piece in range(grid.tiles):  # what lies behind the last row is not written
                some = min(rows - piece * grid.tile, grid.tile)
                known = whole(in_tiles(out, grid.tile), grid.tile)[piece, :, :some]
                assert torch.equal(whole(tiled, grid.tile)[piece, :, :some], known)


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("width", [20, 40])
def test_wide_levels_are_the_module_by_module_substitutes(width, exact):
    """With ``exact`` the activation comes from a Linear that writes no tiles."""
    device = torch.device("cuda")
    model = model_of("llama", device, hidden_size=256, intermediate_size=512, layers=2)
    fused = fused_draft(model, device)
    for layer in fused.model.layers:
        assert layer.down.tile(width) == (tiles_of(width)[0] if int4_wide.runs_on(0) else 0)
        if exact:
            layer.gate_up = Dense(layer.gate_up.weight.unpack().bfloat16(), swiglu=True)
    engines, logits = grown_alike(model, [module_draft(model), fused], Beam(3, width))
    for expected, got in zip(*logits, strict=True):
        assert apart(expected, got) < 0.08  # bfloat16 in another order
    assert apart(*(engine.cache.rows[:, :, :, : engine.cache.draft_rows] for engine in engines)) < 0.08
