"""Compute the Gaussian grids of ``quant=higgs`` and write them beside the code that reads them.

    python scripts/make_grids.py [--seeds 3] [--output subspec/quant/grids.safetensors]

A minute or two on a CPU. Two dimensions are started from several seeds, and the best result is kept.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from subspec.config.quant_checks import HIGGS_BITS as BITS
from subspec.quant.grids import FILE, RADIUS

HERE = Path(__file__).resolve().parents[1] / "subspec" / "quant" / FILE

PLANE = 481
"""Nodes along each axis by which integrals over the plane are computed; the error that is stated uses three times as
many."""


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
    bits: int, *, seed: int = 0, steps: int = 1000, tolerance: float = 1e-6, nodes: int = PLANE, samples: int = 1 << 16
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
    return points, _lloyd_step(points, *_plane(3 * nodes))[1]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="starts per grid of the plane; thrice that below 4 bits")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    stored = {}
    for bits in BITS:
        starts = options.seeds * (1 if bits == 4 else 3)  # small grids are quick
        found = [lloyd_max(bits), min((lloyd_plane(bits, seed=s) for s in range(starts)), key=_error)]
        for dim, (points, error) in enumerate(found, start=1):
            stored[f"{dim}x{bits}"] = points.float().reshape(-1, dim).contiguous()
            stored[f"{dim}x{bits}:mse"] = torch.tensor(error, dtype=torch.float64)
            print(f"{bits} bits, dimension {dim}: {len(points):3} points, error {error:.6f}", flush=True)
    save_file(stored, options.output)


def _error(found: tuple[torch.Tensor, float]) -> float:
    return found[1]


if __name__ == "__main__":
    main()
