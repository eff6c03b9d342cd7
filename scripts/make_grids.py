"""Compute the Gaussian grids of ``quant=higgs`` and write them beside the code that reads them.

    python scripts/make_grids.py [--seeds 3] [--output subspec/quant/grids.safetensors]

A few minutes on a CPU. Two dimensions are started from several seeds, and the best result is kept.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from subspec.quant.grids import BITS, FILE, lloyd_max, lloyd_plane

HERE = Path(__file__).resolve().parents[1] / "subspec" / "quant" / FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="starts of each two-dimensional grid")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    stored = {}
    for bits in BITS:
        found = [lloyd_max(bits), min((lloyd_plane(bits, seed=s) for s in range(options.seeds)), key=_error)]
        for dim, (points, error) in enumerate(found, start=1):
            stored[f"{dim}x{bits}"] = points.float().reshape(-1, dim).contiguous()
            stored[f"{dim}x{bits}:mse"] = torch.tensor(error, dtype=torch.float64)
            print(f"{bits} bits, dimension {dim}: {len(points):3} points, error {error:.6f}", flush=True)
    save_file(stored, options.output)


def _error(found: tuple[torch.Tensor, float]) -> float:
    return found[1]


if __name__ == "__main__":
    main()
