"""Relative error of quantized weights, HQQ beside HIGGS, on a target's own weights and on Gaussian ones.

    python experiments/quantizers/errors.py [--layers 0 7 14 21 29] [--target smollm2_135m | FOLDER] [--json FILE]

The error is |W - Q(W)| / |W| in the Frobenius norm over all decoder Linears of the chosen layers; bits per weight
count everything that is stored. A minute or two on a CPU with the default target.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig
from subspec.quant.higgs import HiggsQuantizer
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.pairs import group_of
from subspec.quant.quantize_model import Quantizer
from subspec.targets import load_target

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One quantizer of the table."""

    name: str
    bits: int
    group: int
    dim: int = 0

    def quantizer(self, inputs: int) -> Quantizer:
        """For so many inputs, unpacked, in float32: its weights are what kernels would compute with.

        HQQ gets the group that HIGGS would take, the largest multiple of 64 that divides the inputs.
        """
        common = {"compute_dtype": torch.float32, "device": CPU, "unpack": True}
        if self.dim:
            return HiggsQuantizer(bits=self.bits, vector_dim=self.dim, group_size=self.group, **common)
        return HqqQuantizer(bits=self.bits, group_size=group_of(inputs, self.group), **common)


SETTINGS = (
    Setting("HQQ", 8, 64),
    *(Setting("HQQ", bits, group) for bits in (4, 3, 2) for group in (64, 256)),
    *(Setting("HIGGS", bits, 256, dim) for bits in (4, 3, 2) for dim in (1, 2)),
    *(Setting("HIGGS", bits, 64, 2) for bits in (4, 3, 2)),
)


def stored(setting: Setting, quantizer: Quantizer, linear: nn.Linear) -> int:
    """Bytes with 16-bit scales and zeros, as on a GPU; in 3 bits hqq stores ten values in 32 bits."""
    if not setting.dim:
        quantizer.compute_dtype = torch.bfloat16
    try:
        return quantizer.stored_bytes(linear)
    finally:
        quantizer.compute_dtype = torch.float32


def measure(linears: Iterable[nn.Linear], setting: Setting) -> dict[str, float]:
    """Error and bits per weight over some Linears."""
    squared, total, count, size = 0.0, 0.0, 0, 0
    for linear in linears:
        quantizer = setting.quantizer(linear.in_features)
        quantized = quantizer.quantize(linear, "weight").weight
        squared += float((quantized - linear.weight).square().sum(dtype=torch.float64))
        total += float(linear.weight.square().sum(dtype=torch.float64))
        count += linear.weight.numel()
        size += stored(setting, quantizer, linear)
    return {"bits_per_weight": 8 * size / count, "error": (squared / total) ** 0.5}


def as_linear(weight: Tensor) -> nn.Linear:
    """A Linear around a weight."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    return linear


def target_linears(name: str, layers: list[int]) -> list[nn.Linear]:
    """The decoder Linears of some layers of the default target or of a checkpoint's folder."""
    config = HubTargetConfig(name="hub", path=name) if Path(name).is_dir() else EmbeddedTargetConfig(name=name)
    decoder = load_target(config, CPU).model.get_decoder()
    return [
        as_linear(module.weight)
        for index in layers
        for module in decoder.layers[index].modules()
        if isinstance(module, nn.Linear)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2_135m")
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 7, 14, 21, 29])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sources = {
        options.target: target_linears(options.target, options.layers),
        "Gaussian 1024 x 3584": [as_linear(torch.randn(1024, 3584, generator=generator) * 0.02)],
    }
    rows = []
    with torch.inference_mode():
        for source, linears in sources.items():
            print(f"\n{source}\n| quantizer | bits | group, at most | dimension | bits per weight | relative error |")
            print("|---|---|---|---|---|---|")
            for setting in SETTINGS:
                found = measure(linears, setting)
                rows.append({"source": source, **vars(setting), **found})
                print(
                    f"| {setting.name} | {setting.bits} | {setting.group} | {setting.dim or '-'} | "
                    f"{found['bits_per_weight']:.3f} | {found['error']:.4f} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
