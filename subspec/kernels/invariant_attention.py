"""Attention whose rows have the same bits in any company: over absolute positions, for chains and trees alike.

Plain decoding of a token sees the keys at positions 0 .. p as one run; a tree's node sees the same keys, the last of
them scattered over the rows of its ancestors. Both are reduced in the same blocks and splits of absolute positions, so
that the sums have the same operands in the same order (:func:`subspec.kernels.invariant.attention`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.kernels.invariant_linear import operand
from subspec.kernels.modules import triton_kernels
from subspec.utils.rounding import next_power_of_two, round_up

SPLIT = 1024
"""Positions of a split: what one program runs through."""

TILE = 32
"""Pairs of a row and one of its query heads that a program computes."""

PARTIAL_BYTES = 32 * 2**20
"""Of the float32 partial sums at once: longer batches are launched in pieces, which changes no bits."""

WARPS, STAGES = 2, 2

ALIGNMENT = 64
"""float32 numbers: partial sums begin at multiples."""


@dataclass(frozen=True)
class Heads:
    """Query heads, key and value heads, and their dimension."""

    query: int
    kv: int
    dim: int

    @property
    def block(self) -> int:
        """Positions at a time, from the dimension alone: what two stages of keys and values leave of 99 KiB."""
        return 64 if self.dim <= 128 else 32

    def piece_rows(self, rows: int, length: int) -> int:
        """Rows per launch when the last position is below ``length``."""
        per_row = splits_of(length) * self.query * (self.dim + 2) * 4
        # Multiples of 16, so that every piece begins at an aligned address.
        return min(rows, max(16, PARTIAL_BYTES // per_row // 16 * 16))

    def partial_sizes(self, rows: int, length: int) -> list[int]:
        """float32 numbers of the partial sums of a launch over ``rows``: outputs, maxima, denominators."""
        slots = splits_of(length) * rows * self.query
        return [round_up(slots * self.dim, ALIGNMENT), round_up(slots, ALIGNMENT), round_up(slots, ALIGNMENT)]

    def partial_floats(self, rows: int, length: int) -> int:
        """float32 numbers that :func:`attend` needs at most for ``rows`` rows; it never falls with ``length``."""
        per_row = splits_of(length) * self.query * (self.dim + 2)
        return min(rows * per_row, max(PARTIAL_BYTES // 4, 16 * per_row)) + 3 * ALIGNMENT


def splits_of(length: int) -> int:
    """Splits that ``length`` positions touch."""
    return -(-length // SPLIT)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    prefix: Tensor,
    paths: Tensor,
    *,
    is_tree: bool,
    length: int,
    heads: Heads,
    scale: float,
    partial: Tensor,
    out: Tensor,
    texts: int = 1,
    cache_stride: int = 0,
) -> None:
    """Attention of every row over the positions 0 .. its own.

    Several texts have as many rows each, one text's behind the other's, and no more than :meth:`Heads.piece_rows`
    altogether.

    Args:
        query: [rows, query heads, dim].
        keys, values: [kv heads, ., dim], row p holding position p of the prefix.
        positions: int64 [rows].
        prefix: int64 [texts], tokens of the prefix.
        paths: int32 [rows, width]: the batch's row that holds a row's ancestor at position prefix + column.
        is_tree: False: a run of text, whose positions lie in the cache in order; ``paths`` (int32, of any shape) is not
            read.
        length: no position reaches it.
        partial: float32, at least :meth:`Heads.partial_floats`.
        out: [rows, query heads * dim].
        cache_stride: numbers between ``keys`` of one text, which are given, and of the next.
    """
    invariant = triton_kernels("invariant", query.device)
    rows = query.shape[0]
    splits, piece = splits_of(length), heads.piece_rows(rows, length)
    group = heads.query // heads.kv
    block = max(16, next_power_of_two(heads.dim))
    width = paths.shape[1] if is_tree else 0
    for first in range(0, rows, piece):
        count = min(piece, rows - first)
        sizes = heads.partial_sizes(count, length)
        outs, maxima, sums = partial[: sum(sizes)].split(sizes)
        own = slice(first, first + count)
        invariant.attention[(heads.kv, splits, texts * -(-(count // texts) * group // TILE))](
            query[own], keys, values, positions[own], prefix, paths[own] if is_tree else paths, outs, maxima, sums,
            count // texts, int(not is_tree), width, count, keys.stride(1), keys.stride(0), cache_stride, scale,
            Q_HEADS=heads.query, KV_HEADS=heads.kv, D=heads.dim, D_BLOCK=block,
            TILE=TILE, BLOCK=heads.block, SPLIT=SPLIT, OPERAND=operand(query),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        invariant.merge[(count, heads.query)](
            outs, maxima, sums, positions[own], out[own], count,
            Q_HEADS=heads.query, D=heads.dim, D_BLOCK=block, SPLIT=SPLIT, num_warps=1,
        )  # fmt: skip


def path_table(ancestors: Tensor, depths: Tensor, levels: int) -> Tensor:
    """The ancestor of every node at every depth, int32 [n, levels + 2]; what lies past a node's own depth is unused.

    Args:
        ancestors: bool [n, n]; row i marks the path from the root to node i, both included.
        depths: int64 [n], at most ``levels``.
    """
    n = depths.numel()
    columns = torch.where(ancestors, depths[None, :], levels + 1)
    nodes = torch.arange(n, dtype=torch.int32, device=depths.device)
    table = torch.zeros(n, levels + 2, dtype=torch.int32, device=depths.device)
    return table.scatter_(1, columns, nodes.expand(n, n))
