"""Pairs of grid points of a rotated weight: the quantized weight of HIGGS (arXiv 2411.17525, algorithm 1).

Rotate, scale groups, round to a Gaussian grid. Neighbouring weights are kept in pairs, whatever the grid's dimension:
``2 * bits`` bits name one of ``4 ** bits`` pairs of values (``Grid.pairs``), so one look-up gives two weights and one
kernel serves both dimensions.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subspec.config.quant_checks import LEAST_BLOCK
from subspec.quant.grids import Grid, load_grid
from subspec.quant.hadamard import Rotation
from subspec.quant.quantized_weight import QuantizedWeight

CHUNK = 64
"""Weights that are packed together: eight bytes for every bit."""

REFITS = 3
"""Rounds of "round to the grid, then fit the scale to the points"; a fourth gains less than 0.1 % of the error."""

ROWS_BYTES = 1 << 28
"""Bytes of float32 weights that are quantized at once."""

ROUNDING_BYTES = 30
"""Bytes per weight of those that are quantized at once: 21 counted on a CPU, and 64-bit look-up indices on a GPU."""

REACH = 2.7
"""Standard deviations of an interval to either side of a weight's dequantized value: 0.6 to 0.7 % of weights lie
outside. Wider intervals cost bits for every weight, narrower ones more escapes; between 2.5 and 2.9 the sum hardly
changes (``experiments/codec``)."""


@dataclass(frozen=True)
class QuantizedPairs(QuantizedWeight):
    """A quantized weight in rotated space: ``w[i, j] = scale[i, j / group_size] * values[i, j]``.

    Attributes:
        pairs: uint8 [n, padded / 2]: numbers of pairs of neighbours (rows of ``grid.pairs()``).
        scale: float16 [n, padded / group_size].
        group_size: weights along the inputs that share a scale.
        rotation: of the inputs, whose ``padded`` is the number of weights in a row.
    """

    pairs: Tensor
    scale: Tensor
    grid: Grid
    group_size: int
    rotation: Rotation
    row_fields: ClassVar[tuple[str, ...]] = ("pairs", "scale")
    centred: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.pairs.shape[0], self.rotation.in_features

    def stacks_with(self, other: "QuantizedPairs") -> bool:
        settings = other.grid, other.group_size, other.rotation
        return settings == (self.grid, self.group_size, self.rotation)

    def rotated(self) -> Tensor:
        """The rotated weight, float32 [n, padded]."""
        values = self.grid.pairs().to(self.pairs.device)[self.pairs.int()].flatten(1)
        groups = values.unflatten(1, (-1, self.group_size))
        return (groups * self.scale.float().unsqueeze(-1)).flatten(1)

    def dequantize(self) -> Tensor:
        return self.rotation.inverse(self.rotated())

    def rebuild(self) -> Tensor:
        """:meth:`dequantize` with the same bits on every device: bfloat16 [n, in_features]."""
        return self.rotation.inverse_in_order(self.rotated()).to(torch.bfloat16)

    def tensors(self) -> dict[str, Tensor]:
        """``pairs`` (uint8, :func:`pack_pairs`) and ``scale`` (float16)."""
        return {"pairs": pack_pairs(self.pairs, self.grid.bits).cpu(), "scale": self.scale.cpu().contiguous()}

    @property
    def margin(self) -> float:
        """Half an interval's width in scales: :data:`REACH` of the grid's root mean square errors."""
        return REACH * self.grid.mse**0.5

    def interval(self, begin: int, end: int, margin: float) -> tuple[Tensor, Tensor]:
        """``margin`` times the block's mean scale to either side of the rebuilt weight.

        Rotating back mixes the errors of a whole block: exact weights are Gaussian about the dequantized ones, with the
        grid's root mean square error times the scales. Where a block has several scales their mean counts: after the
        rotation they differ little.
        """
        columns, block = self.rotation.in_features, self.rotation.block
        first, last = begin // columns, -(-end // columns)
        rows = self.rows(first, last - first)
        reach = rows._block_sums() * reach_factor(margin, block)
        reach = reach.repeat_interleave(block, dim=1)[:, :columns]
        own = slice(begin - first * columns, end - first * columns)
        weight, reach = rows.rebuild().float().flatten()[own], reach.flatten()[own]
        return weight - reach, weight + reach

    def _block_sums(self) -> Tensor:
        """Scales of the rotation's blocks, each counted for every 64 weights of a block: float32 [n, blocks]."""
        scale = self.scale.float().repeat_interleave(self.group_size // LEAST_BLOCK, dim=1)
        parts = scale.unflatten(1, (-1, self.rotation.block // LEAST_BLOCK)).unbind(-1)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def reach_factor(margin: float, block: int) -> float:
    """Factor of a block's summed scales in :meth:`QuantizedPairs.interval`, in float32."""
    return margin / (block // LEAST_BLOCK)


def group_of(padded: int, group_size: int) -> int:
    """Weights per scale: the largest multiple of 64 up to ``group_size`` that divides a row of ``padded`` weights."""
    return max(size for size in range(LEAST_BLOCK, group_size + 1, LEAST_BLOCK) if padded % size == 0)


def quantize_pairs(weight: Tensor, *, bits: int, dim: int, group_size: int, hadamard_size: int) -> QuantizedPairs:
    """Quantize a weight.

    The scale of a group starts at the root mean square of its weights and is then fitted to the points that were
    chosen, in turn with choosing them, which only ever lowers the squared error.

    Args:
        weight: floating [n, in_features].
        group_size: weights per scale, at most (see :func:`group_of`).
        hadamard_size: inputs rotated together, at most (see :class:`~subspec.quant.hadamard.Rotation`).
    """
    rotation = Rotation.of(weight.shape[1], hadamard_size)
    grid = load_grid(bits, dim)
    group = group_of(rotation.padded, group_size)
    step = max(1, ROWS_BYTES // (4 * rotation.padded))
    parts = [_encode_rows(rotation(rows.float()), grid, group) for rows in weight.split(step)]
    pairs, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedPairs(pairs, scale, grid, group, rotation)


def _encode_rows(rotated: Tensor, grid: Grid, group: int) -> tuple[Tensor, Tensor]:
    n = rotated.shape[0]
    groups = rotated.view(-1, group)
    points = grid.points.to(rotated.device)
    scale = groups.square().mean(1, keepdim=True).sqrt()
    for _ in range(REFITS):
        chosen = points[_round(groups, scale, grid).int()].view_as(groups)
        # <w, q> / <q, q> minimizes |w - s q|; no grid has a point at zero, so <q, q> is positive
        scale = (groups * chosen).sum(1, keepdim=True) / chosen.square().sum(1, keepdim=True)
    scale = scale.half()
    pairs = _round(groups, scale.float(), grid)
    if grid.dim == 1:
        pairs = pairs.view(-1, 2)
        pairs = pairs[:, 0] | pairs[:, 1] << grid.bits
    return pairs.view(n, -1), scale.view(n, -1)


def _round(groups: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Numbers of the points nearest to ``groups / scale``, uint8 [all of them / dim]."""
    unit = groups / scale.clamp_min(torch.finfo(torch.float32).tiny)  # a group of zeros has scale zero
    return grid.nearest(unit.view(-1, grid.dim))


def pack_pairs(pairs: Tensor, bits: int) -> Tensor:
    """Pair numbers to bytes, row by row: uint8 [n, pairs] to uint8 [n, pairs * bits / 4], exactly ``bits`` a weight.

    A chunk of 32 pairs, seen as four quarters of eight, becomes ``bits`` runs of eight bytes, so that eight
    neighbouring bytes always hold neighbouring pairs: with 4 bits a byte is a pair; with 2 bits a byte has a pair of
    an even quarter in its low half and of the odd quarter behind it in its high half; with 3 bits the low four bits
    are stored like that, and a third run has the two high bits of all four quarters.

    Raises:
        ValueError: the pairs do not make whole chunks.
    """
    n, count = pairs.shape
    if count % (CHUNK // 2):
        raise ValueError(f"{2 * count} weights in a row are not a multiple of {CHUNK}")
    quarters = pairs.view(n, -1, 4, 8)
    if bits == 4:
        return pairs.clone()
    low = quarters & 15
    runs = [low[:, :, 0] | low[:, :, 1] << 4, low[:, :, 2] | low[:, :, 3] << 4]
    if bits == 3:
        high = quarters >> 4
        runs.append(high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6)
    return torch.cat(runs, dim=-1).view(n, -1)


def unpack_pairs(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_pairs`."""
    if bits == 4:
        return packed.clone()
    n = packed.shape[0]
    runs = packed.view(n, -1, bits, 8)
    quarters = torch.stack([runs[:, :, 0] & 15, runs[:, :, 0] >> 4, runs[:, :, 1] & 15, runs[:, :, 1] >> 4], dim=2)
    if bits == 3:
        shifts = torch.tensor([0, 2, 4, 6], device=packed.device, dtype=torch.uint8)[:, None]
        quarters |= (runs[:, :, 2:] >> shifts & 3) << 4
    return quarters.view(n, -1)
