"""Grids for rounding Gaussian numbers with the least squared error (HIGGS, arXiv 2411.17525, section 4).

A grid holds ``2 ** (bits * dim)`` points of ``dim`` dimensions, so that a coordinate costs ``bits`` bits. One
dimension is the quantizer of Lloyd and Max: every level is the mean of the Gaussian between the two midpoints beside
it. Two dimensions, CLVQ (Pagès & Printems 2003), do better at the same number of bits, because hexagons fill a plane
better than squares and because rare pairs need no points of their own.

The points are computed here (:func:`lloyd_max`, :func:`lloyd_plane`) by ``scripts/make_grids.py``, which writes them
to ``grids.safetensors`` beside this file: two dimensions take minutes.

Example::

    grid = load_grid(bits=4, dim=2)
    codes = grid.nearest(torch.randn(1000, 2))     # uint8 [1000]
    grid.points[codes.long()]                      # what they stand for
"""

import functools
import math
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

FILE = "grids.safetensors"
BITS = (2, 3, 4)
"""Bits per weight that have a grid."""

DIMS = (1, 2)
"""Dimensions that have one."""

RADIUS = 6.0
"""Half the side of the square of cells by which a pair's nearest point is found; what lies outside is moved to its
edge, where one Gaussian number in 5e8 is."""

CELLS = 1024
"""Cells along that side."""

PLANE = 801
"""Nodes along each axis by which integrals over the plane are computed."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Points to round to.

    Attributes:
        points: float32 [2 ** (bits * dim), dim], each exactly a bfloat16: what kernels look up is what was
            rounded to.
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

    @property
    def size(self) -> int:
        """Number of points."""
        return self.points.shape[0]

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
        # In float32 the cell number is exact enough: a neighbour of the cell differs by nothing that matters.
        cell = ((values + RADIUS) * (1 / step)).clamp_(0, CELLS - 1).to(torch.int32)
        return table[cell[..., 0] * CELLS + cell[..., 1]]

    def pairs(self) -> Tensor:
        """float32 [4 ** bits, 2]: what 2 * bits bits stand for, whatever the dimension.

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
    if bits not in BITS or dim not in DIMS:
        raise ValueError(f"no grid of dimension {dim} with {bits} bits: dimensions {DIMS}, bits {BITS}")
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


# ------------------------------------------------------------------------------------------- making them


def lloyd_max(bits: int, *, steps: int = 100_000, tolerance: float = 1e-14) -> tuple[Tensor, float]:
    """The Lloyd-Max quantizer of N(0, 1): float64 [2 ** bits] ascending and symmetric, and its mean squared error.

    A fixed point of "levels are the means of their cells, cells end half-way between levels".
    """
    count = 2**bits
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = torch.special.ndtri(quantiles) * 1.2
    for _ in range(steps):
        mass, moment = _cell_moments(levels)
        new = moment / mass
        new = (new - new.flip(0)) / 2  # rounding must not cost the symmetry
        change = float((new - levels).abs().max())
        levels = new
        if change < tolerance:
            break
    mass, moment = _cell_moments(levels)
    # E (x - q)^2 = 1 - 2 E x q + E q^2
    return levels, float(1 - 2 * (levels * moment).sum() + (levels * levels * mass).sum())


def _cell_moments(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and first moment of N(0, 1) in every level's cell, in closed form."""
    infinite = levels.new_tensor([math.inf])
    edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
    below = torch.special.ndtr(edges)
    density = torch.exp(-edges * edges / 2) / math.sqrt(2 * math.pi)
    return below.diff(), -density.diff()


def lloyd_plane(
    bits: int,
    *,
    seed: int = 0,
    steps: int = 1000,
    tolerance: float = 1e-6,
    nodes: int = PLANE,
    samples: int = 1 << 17,
) -> tuple[Tensor, float]:
    """A locally optimal quantizer of the standard normal plane with ``4 ** bits`` points, and its error.

    Lloyd's iteration from seeded random points: first on samples, whose noise leads to a better arrangement than a
    start on the lattice would, then on a regular lattice of the plane weighted by the density, so that the result
    does not depend on samples.

    Args:
        steps, tolerance: on the lattice: at most so many, until the error shrinks by less than this part.
        nodes: of the lattice along each axis.
        samples: of the first iterations.

    Returns:
        points float64 [4 ** bits, 2], and the mean squared error per coordinate.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    # The optimal points follow the density to the power 1/2, a Gaussian with twice the variance.
    points = torch.randn(4**bits, 2, generator=generator, dtype=torch.float64) * math.sqrt(2)
    for _ in range(40):
        points, _ = _lloyd_step(points, drawn, torch.ones(samples, dtype=torch.float64))
    for count in (nodes // 3, nodes):  # Lloyd's iteration is slow to end: most of it on a coarse lattice
        lattice, density = _plane(count)
        error = math.inf
        for _ in range(steps):
            points, new = _lloyd_step(points, lattice, density)
            if error - new < tolerance * new:
                break
            error = new
    return points, _lloyd_step(points, lattice, density)[1]


def _plane(count: int) -> tuple[Tensor, Tensor]:
    """Nodes of a regular lattice, float64 [n, 2], and the Gaussian's weight of each, with the sum one."""
    axis = torch.linspace(-RADIUS, RADIUS, count, dtype=torch.float64)
    lattice = torch.cartesian_prod(axis, axis)
    density = torch.exp(-(lattice * lattice).sum(1) / 2)
    kept = density > 1e-9
    return lattice[kept], density[kept] / density[kept].sum()


def _lloyd_step(points: Tensor, nodes: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """New means of the cells, and the error per coordinate of the old points."""
    owner = torch.empty(len(nodes), dtype=torch.int64)
    single, half_square = points.float(), (points * points).sum(1).float() / 2
    for start in range(0, len(nodes), 1 << 16):
        part = slice(start, start + (1 << 16))
        owner[part] = torch.addmm(-half_square, nodes[part].float(), single.t()).argmax(1)
    mass = torch.zeros(len(points), dtype=torch.float64).index_add_(0, owner, weights)
    moment = torch.zeros_like(points).index_add_(0, owner, nodes * weights[:, None])
    error = (weights * (nodes - points[owner]).square().sum(1)).sum() / weights.sum() / 2
    new = torch.where(mass[:, None] > 0, moment / mass[:, None].clamp_min(1e-300), points)
    return new, float(error)
