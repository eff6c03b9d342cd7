"""Draft levels of many rows: 4-bit weights times x in tiles (``csrc/int4_wide.cu``), on compute capability 9.0.

The instructions of a warp group read x from shared memory, where it lies swizzled, and the inputs of a group are those
of ``int4.py``, whose order differs from x's. A kernel that brought x into that order would take as long as a small
Linear, so the kernel before writes x in tiles: for every ``tile`` rows and every group of 64 inputs one block of memory
that is copied to shared memory as it is. Such an x keeps its shape, [rows, inputs]; its memory has whole tiles
(:func:`empty_rows`). Rows of a tile that do not exist may hold anything: they are columns of the product that nobody
reads.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from subspec.utils.rounding import round_up

FROM = 17
"""Rows from which a level is faster than with ``int4.cu`` (``experiments/rows``)."""

EIGHTS = (3, 4, 6, 8)
"""Eights of rows that a block of threads can multiply with."""

GROUP = 64
"""Inputs of a tile."""

OUTPUTS, MOST_WARP_GROUPS = 64, 5
"""Of a warp group; and warp groups of a block, more of which would leave a thread too few registers."""


@functools.cache
def runs_on(device: int) -> bool:
    """Whether the CUDA device of that number has ``wgmma``, which compute capability 9.0 alone has."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def tiles_of(rows: int) -> tuple[int, int]:
    """Rows of a tile, and the tiles that hold ``rows``."""
    count = -(-rows // (8 * EIGHTS[-1]))
    return next(8 * eights for eights in EIGHTS if 8 * eights * count >= rows), count


def empty_rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uninitialized [rows, columns], of 16 bits each, in memory that has whole tiles."""
    tile, count = tiles_of(rows) if rows >= FROM else (rows, 1)
    return torch.empty(tile * count, columns, dtype=dtype, device=device)[:rows]


def in_tiles(x: Tensor, tile: int) -> Tensor:
    """A copy of x [rows, columns], 16 bits each, in tiles of ``tile`` rows; columns are a multiple of 64. 0: x itself.

    Number ``16 t + 2 c + e`` of a row of a tile (t below 4, e below 2) lies in chunk ``c ^ (row % 8)`` of eight, at
    ``2 t + e``. ``c`` counts the pairs that a thread ``t`` holds; the rest is the "128-byte swizzle" of ``wgmma``.
    """
    if not tile:
        return x
    rows, columns = x.shape
    padded = functional.pad(x, (0, 0, 0, round_up(rows, tile) - rows))
    parts = padded.view(-1, tile, columns // GROUP, 4, 8, 2).permute(0, 2, 1, 4, 3, 5)  # tile, group, row, c, t, e
    chunk = torch.arange(8, device=x.device) ^ (torch.arange(tile, device=x.device) % 8)[:, None]
    swizzled = parts.gather(3, chunk[None, None, :, :, None, None].expand(parts.shape))
    return swizzled.reshape(padded.shape)[:rows]


@dataclass(frozen=True)
class WideGrid:
    """How a Linear is shared among blocks of threads.

    Attributes:
        tile, tiles: rows of a tile of x, and their number.
        warp_groups: of a block.
        splits: slices of the inputs.
    """

    tile: int
    tiles: int
    warp_groups: int
    splits: int

    @property
    def macros(self) -> dict[str, int]:
        """Of the kernel: the fastest registers and loads in flight of those tried (``experiments/rows``)."""
        groups = self.warp_groups
        own = {"BLOCKS": max(1, 4 // groups), "DEPTH": 2 if groups > 2 else 4}
        return {"WARPS": 4 * groups, "EIGHTS": self.tile // 8, **own}


@functools.cache
def wide_grid(rows: int, outputs: int, groups: int, multiprocessors: int, *, whole: bool) -> WideGrid:
    """The grid for ``rows`` rows: as few warp groups as possible on the busiest multiprocessor.

    Args:
        groups: of 64 inputs. whole: sums must be whole, not slices.
    """
    (tile, tiles), pieces = tiles_of(rows), -(-outputs // OUTPUTS)
    splits = 1 if whole else max(1, min(multiprocessors // (-(-pieces // 4) * tiles), groups // 4))
    splits = -(-groups // -(-groups // splits))  # none is empty

    def busiest(warp_groups: int) -> int:
        blocks = -(-pieces // warp_groups) * splits * tiles
        return -(-blocks // multiprocessors) * warp_groups

    return WideGrid(tile, tiles, min(range(MOST_WARP_GROUPS, 0, -1), key=busiest), splits)
