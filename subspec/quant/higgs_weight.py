"""HIGGS codes of a weight: rotate, scale groups, round to a Gaussian grid (arXiv 2411.17525, algorithm 1).

Weights are coded in pairs, whatever the grid's dimension: ``2 * bits`` bits name one of ``4 ** bits`` pairs of values
(``Grid.pairs``), so one look-up gives two weights and one kernel serves both dimensions.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from subspec.quant.grids import FILE, Grid, load_grid
from subspec.quant.hadamard import LEAST_BLOCK, Rotation
from subspec.quant.quantized_weight import stack_rows

CHUNK = 64
"""Weights that are packed together: eight bytes for every bit."""

REFITS = 3
"""Rounds of "round to the grid, then fit the scale to what was chosen"; a fourth gains less than 0.1 % of the error."""

ROWS_BYTES = 1 << 28
"""Of float32 weights that are coded at once."""

ROUNDING_BYTES = 30
"""Per weight of those that are coded at once: 21 counted on a CPU, and 64-bit indices of the look-up on a GPU."""


@dataclass(frozen=True)
class HiggsCodes:
    """A quantized weight in rotated space: ``w[i, j] = scale[i, j / group_size] * values[i, j]``.

    Attributes:
        pairs: uint8 [n, padded / 2]: numbers of pairs of neighbours (rows of ``grid.pairs()``).
        scale: float16 [n, padded / group_size].
        grid: what was rounded to.
        group_size: weights along the inputs that share a scale.
        rotation: of the inputs, whose ``padded`` is the number of weights in a row.
    """

    pairs: Tensor
    scale: Tensor
    grid: Grid
    group_size: int
    rotation: Rotation

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.pairs.shape[0], self.rotation.in_features

    def rotated(self) -> Tensor:
        """The rotated weight, float32 [n, padded]."""
        values = self.grid.pairs().to(self.pairs.device)[self.pairs.int()].flatten(1)
        groups = values.unflatten(1, (-1, self.group_size))
        return (groups * self.scale.float().unsqueeze(-1)).flatten(1)

    def dequantize(self) -> Tensor:
        """The weight itself, rotated back: float32 [n, in_features]."""
        return self.rotation.inverse(self.rotated())

    def rows(self, first: int, count: int) -> "HiggsCodes":
        """Rows ``first`` to ``first + count``, as views."""
        pairs, scale = (part[first : first + count] for part in (self.pairs, self.scale))
        return HiggsCodes(pairs, scale, self.grid, self.group_size, self.rotation)

    def stacked(self, others: Sequence["HiggsCodes"], *, swiglu: bool) -> "HiggsCodes":
        """Rows below each other, or, with ``swiglu``, of a gate and an up projection, 16 in turn.

        Raises:
            ValueError: another grid, group size or rotation than this one's.
        """
        if any(
            (o.grid, o.group_size, o.rotation) != (self.grid, self.group_size, self.rotation) for o in others
        ):
            raise ValueError("weights of different grids, groups or rotations are not one weight")
        parts = zip(*((codes.pairs, codes.scale) for codes in (self, *others)), strict=True)
        pairs, scale = (stack_rows(part, swiglu=swiglu) for part in parts)
        return HiggsCodes(pairs, scale, self.grid, self.group_size, self.rotation)

    def tensors(self) -> dict[str, Tensor]:
        """``pairs`` (uint8, as many bits as there are) and ``scale`` (float16)."""
        return {"pairs": pack_pairs(self.pairs, self.grid.bits).cpu(), "scale": self.scale.cpu().contiguous()}


class HiggsCodeQuantizer:
    """A :class:`~subspec.quant.quantized_weight.CodeQuantizer` for the fused level.

    Args:
        bits, dim: of the grid.
        group_size, hadamard_size: at most.
    """

    def __init__(self, bits: int = 4, dim: int = 2, group_size: int = 256, hadamard_size: int = 512) -> None:
        self.bits, self.dim, self.group_size, self.hadamard_size = bits, dim, group_size, hadamard_size

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that codes follow from besides the weight."""
        return {
            "quantizer": "higgs",
            "grids": grids_hash(),
            "bits": self.bits,
            "vector_dim": self.dim,
            "group_size": self.group_size,
            "hadamard_size": self.hadamard_size,
        }

    def codes(self, weight: Tensor, name: str | None = None) -> HiggsCodes:
        """Quantize a weight [n, k]."""
        return encode(
            weight,
            bits=self.bits,
            dim=self.dim,
            group_size=self.group_size,
            hadamard_size=self.hadamard_size,
        )

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], name: str, device: torch.device
    ) -> HiggsCodes | None:
        """What :meth:`HiggsCodes.tensors` made of a weight of this shape; None: these are of another."""
        n, k = shape
        rotation = Rotation.of(k, self.hadamard_size)
        group = group_of(rotation.padded, self.group_size)
        shapes = {"pairs": (n, rotation.padded * self.bits // 8), "scale": (n, rotation.padded // group)}
        if any(part not in stored or tuple(stored[part].shape) != size for part, size in shapes.items()):
            return None
        pairs = unpack_pairs(stored["pairs"].to(device), self.bits)
        return HiggsCodes(pairs, stored["scale"].to(device), load_grid(self.bits, self.dim), group, rotation)

    def stored_bytes(self, shape: tuple[int, int], name: str) -> int:
        """As on the device."""
        return sum(higgs_sizes(*shape, bits=self.bits, group_size=self.group_size))

    def codes_bytes(self, shape: tuple[int, int], name: str) -> int:
        """A byte per pair, and the scales."""
        _, scales = higgs_sizes(*shape, bits=self.bits, group_size=self.group_size)
        return shape[0] * Rotation.of(shape[1], self.hadamard_size).padded // 2 + scales

    def peak_bytes(self, shape: tuple[int, int], name: str) -> int:
        """:data:`ROUNDING_BYTES` per weight of the rows that are coded at once."""
        padded = Rotation.of(shape[1], self.hadamard_size).padded
        return ROUNDING_BYTES * min(shape[0] * padded, max(ROWS_BYTES // 4, padded))

    def end_layer(self) -> None:
        """Nothing is remembered."""


@functools.cache
def grids_hash() -> str:
    """Twelve hex digits of the grids that codes are numbers of."""
    return hashlib.sha256(resources.files("subspec.quant").joinpath(FILE).read_bytes()).hexdigest()[:12]


def group_of(padded: int, group_size: int) -> int:
    """Weights per scale: the largest multiple of 64 up to ``group_size`` that divides a row of ``padded`` weights."""
    return max(size for size in range(LEAST_BLOCK, group_size + 1, LEAST_BLOCK) if padded % size == 0)


def higgs_sizes(out_features: int, in_features: int, *, bits: int, group_size: int) -> tuple[int, int]:
    """Bytes of a quantized Linear from its shape alone: (packed pairs, scales); no bias.

    packed = outputs * padded inputs * bits / 8; scales = two bytes per group. Four bits in groups of 256 make
    4 + 16 / 256 = 4.0625 bits per weight.
    """
    padded = Rotation.of(in_features, LEAST_BLOCK).padded
    weights = out_features * padded
    return weights * bits // 8, weights // group_of(padded, group_size) * 2


def encode(weight: Tensor, *, bits: int, dim: int, group_size: int, hadamard_size: int) -> HiggsCodes:
    """Quantize a weight.

    The scale of a group starts at the root mean square of its weights and is then fitted to the points that were
    chosen, in turn with choosing them, which only ever lowers the squared error.

    Args:
        weight: floating [n, in_features].
        bits, dim: of the grid.
        group_size: weights per scale, at most (see :func:`group_of`).
        hadamard_size: inputs rotated together, at most (see :class:`~subspec.quant.hadamard.Rotation`).
    """
    rotation = Rotation.of(weight.shape[1], hadamard_size)
    grid = load_grid(bits, dim)
    group = group_of(rotation.padded, group_size)
    step = max(1, ROWS_BYTES // (4 * rotation.padded))
    parts = [_encode_rows(rotation(rows.float()), grid, group) for rows in weight.split(step)]
    pairs, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return HiggsCodes(pairs, scale, grid, group, rotation)


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
    codes = _round(groups, scale.float(), grid)
    if grid.dim == 1:
        codes = codes.view(-1, 2)
        codes = codes[:, 0] | codes[:, 1] << grid.bits
    return codes.view(n, -1), scale.view(n, -1)


def _round(groups: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Numbers of the points nearest to ``groups / scale``, uint8 [all of them / dim]."""
    unit = groups / scale.clamp_min(torch.finfo(torch.float32).tiny)  # a group of zeros has scale zero
    return grid.nearest(unit.view(-1, grid.dim))


def pack_pairs(pairs: Tensor, bits: int) -> Tensor:
    """Pair numbers to bytes, row by row: uint8 [n, pairs] to uint8 [n, pairs * bits / 4], honestly ``bits`` a weight.

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
    quarters = torch.stack(
        [runs[:, :, 0] & 15, runs[:, :, 0] >> 4, runs[:, :, 1] & 15, runs[:, :, 1] >> 4], dim=2
    )
    if bits == 3:
        shifts = torch.tensor([0, 2, 4, 6], device=packed.device, dtype=torch.uint8)[:, None]
        quarters |= (runs[:, :, 2:] >> shifts & 3) << 4
    return quarters.view(n, -1)
