"""Errors of HQQ's integers with scales of its own and with scales that contain their zero, and bits of coded weights.

    python experiments/quantizers/short_scales.py

Needs no GPU and no checkpoint: random weights, seed 0. What it printed is in this folder's README.
"""

import torch
from torch import Tensor

from subspec.codec.format import encode
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import QuantizedIntegers

SHAPE = 512, 3584


class OfModules(HqqFormat):
    """HQQ's own scales and zeros, float16 each."""

    as_modules = True


def weights() -> dict[str, Tensor]:
    """bfloat16 weights by distribution."""
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(5.0).sample(SHAPE)
    return {"Gaussian": (0.02 * torch.randn(SHAPE)).bfloat16(), "Student's t, 5": (0.02 * heavy).bfloat16()}


def error(weight: Tensor, quantized: QuantizedIntegers) -> float:
    """Root mean square error over that of the weight."""
    return ((quantized.dequantize() - weight.float()).norm() / weight.float().norm()).item()


def coded_bits(weight: Tensor, quantized: QuantizedIntegers) -> float:
    """Bits per exact weight, coded given the quantized one."""
    coded = encode(weight, quantized, quantized.margin)
    return 32 * (coded.starts.numel() + coded.stream.numel()) / weight.numel()


def main() -> None:
    """Print the table."""
    for name, weight in weights().items():
        for bits in (8, 4, 3, 2):
            cells = []
            for format_ in (OfModules, HqqFormat):
                quantized = format_(bits).quantize(weight)
                cells.append(f"{error(weight, quantized):.4f} | {coded_bits(weight, quantized):.2f}")
            print(f"| {name} | {bits} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
