"""Grids for rounding Gaussian numbers with the least squared error (HIGGS, arXiv 2411.17525, section 4).

A grid holds ``2 ** (bits * dim)`` points of ``dim`` dimensions, so that a coordinate costs ``bits`` bits. One
dimension is the quantizer of Lloyd and Max: every level is the mean of the Gaussian between the two midpoints beside
it. Two dimensions, CLVQ (Pagès & Printems 2003), do better at the same number of bits, because hexagons fill a plane
better than squares and because rare pairs need no points of their own.

``scripts/make_grids.py`` computes the points and writes them to ``grids.safetensors`` beside this file.

Example::

    grid = load_grid(bits=4, dim=2)
    codes = grid.nearest(torch.randn(1000, 2))     # uint8 [1000]
    grid.points[codes.long()]                      # the points
"""

import functools
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from subspec.config.quant_checks import HIGGS_BITS, HIGGS_DIMS

FILE = "grids.safetensors"
RADIUS = 6.0
"""Half the side of the square of cells by which a pair's nearest point is found. Values outside (one Gaussian number in
5e8) are moved to its edge."""

CELLS = 1024
"""Cells along that side."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Points to round to.

    Attributes:
        points: float32 [2 ** (bits * dim), dim], each exactly a bfloat16, as kernels look them up.
        bits: per coordinate.
        mse: mean squared error per coordinate of a standard normal variable (of the points before they were
            rounded to bfloat16, which changes it by less than one part in a thousand).
    """

    points: Tensor
    bits: int
    mse: float

    @property
    def dim(self) -> int:
        """Coordinates per point."""
        return self.points.shape[1]

    def nearest(self, values: Tensor) -> Tensor:
        """Numbers of the nearest points, uint8 [...].

        One dimension compares with the midpoints and is exact. Two dimensions look up the point that is nearest to
        the middle of a small cell: up to 0.2 % more squared error than the exact search, hundreds of times faster.

        Args:
            values: float32 [..., dim].
        """
        if self.dim == 1:
            flat = self.points[:, 0].to(values.device)
            found = torch.bucketize(values[..., 0].contiguous(), (flat[1:] + flat[:-1]) / 2)
            return found.to(torch.uint8)
        table = _cells(self.bits).to(values.device)
        step = 2 * RADIUS / CELLS
        # In float32 the cell number is exact enough: a neighbouring cell has nearly the same point. A NaN, of weights
        # that overflow, must not become an index.
        cell = ((values + RADIUS) * (1 / step)).clamp_(0, CELLS - 1).nan_to_num_().to(torch.int32)
        return table[cell[..., 0] * CELLS + cell[..., 1]]

    def pairs(self) -> Tensor:
        """float32 [4 ** bits, 2]: the pair of values of every number of 2 * bits bits, for either dimension.

        With one dimension the low ``bits`` bits are the first weight's code and the high ones the second's.
        """
        if self.dim == 2:
            return self.points
        flat = self.points[:, 0]
        second, first = torch.meshgrid(flat, flat, indexing="ij")
        return torch.stack([first.flatten(), second.flatten()], dim=-1)


@functools.cache
def load_grid(bits: int, dim: int) -> Grid:
    """The shipped grid.

    Raises:
        ValueError: there is none with these ``bits`` and ``dim``.
    """
    if bits not in HIGGS_BITS or dim not in HIGGS_DIMS:
        raise ValueError(f"no grid of dimension {dim} with {bits} bits: dimensions {HIGGS_DIMS}, bits {HIGGS_BITS}")
    stored = load_tensors(resources.files("subspec.quant").joinpath(FILE).read_bytes())
    points = stored[f"{dim}x{bits}"]
    return Grid(points.to(torch.bfloat16).float(), bits, float(stored[f"{dim}x{bits}:mse"]))


@functools.cache
def _cells(bits: int) -> Tensor:
    """uint8 [CELLS * CELLS]: the point nearest to the middle of each cell."""
    points = load_grid(bits, 2).points
    axis = (torch.arange(CELLS) + 0.5) * (2 * RADIUS / CELLS) - RADIUS
    half_square = (points * points).sum(1) / 2
    rows = []
    for part in axis.split(64):
        nodes = torch.cartesian_prod(part, axis)
        rows.append((nodes @ points.t() - half_square).argmax(1).to(torch.uint8))
    return torch.cat(rows)
