"""Bits per coded weight, by quantizer bits and by level, on Gaussian weights and on the default model's.

    python experiments/codec/bits.py [--rows 256] [--json experiments/codec/bits.json]

Every matrix is decoded again and compared bit by bit. The entropy is that of the exact weight given its level, scale
and zero under a density that is constant within an interval: log2(interval / spacing of bfloat16 at the weight).
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from subspec.config import EmbeddedTargetConfig
from subspec.offload.codec import decode, encode, margin_for
from subspec.quant.codes import HqqCodes
from subspec.targets import open_source

CPU = torch.device("cpu")
LAYERS = (0, 10, 20, 29)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def lengths(weight: Tensor, codes: HqqCodes, bits: int) -> tuple[Tensor, Tensor]:
    """Bits that each weight takes, and its level, both flat."""
    from subspec.offload.codec import _cells, _symbols

    own = codes.codes(weight)
    flat = weight.view(torch.int16).flatten()
    group = torch.arange(flat.numel()) // own.group_size
    cells = _cells(own.q.flatten(), own.scale.flatten()[group], own.zero.flatten()[group], margin_for(bits))
    return _symbols(flat, cells)[1].float(), own.q.flatten()


def entropy(weight: Tensor, codes: HqqCodes) -> float:
    """Mean log2(interval / spacing), at least 0."""
    own = codes.codes(weight)
    scale = own.scale.repeat_interleave(own.group_size, dim=1).abs()
    magnitude = weight.float().abs().clamp_min(1e-30)
    spacing = torch.exp2(torch.floor(torch.log2(magnitude)) - 7)
    return float(torch.log2(scale / spacing).clamp_min(0).mean())


def measure(weights: list[Tensor], bits: int) -> dict:
    codes = HqqCodes(bits)
    total = coded = exact = 0
    ideal, levels = 0.0, {}
    for weight in weights:
        own = codes.codes(weight)
        result = encode(weight, own, margin_for(bits))
        exact += torch.equal(decode(result, own).view(torch.int16), weight.view(torch.int16))
        total, coded = total + weight.numel(), coded + 8 * result.nbytes
        ideal += entropy(weight, codes) * weight.numel()
        taken, level = lengths(weight, codes, bits)
        for number in level.unique().tolist():
            here = taken[level == number]
            known = levels.setdefault(int(number), [0, 0.0])
            known[0] += here.numel()
            known[1] += float(here.sum())
    return {
        "bits_per_weight": coded / total,
        "entropy": ideal / total,
        "matrices": len(weights),
        "rebuilt_bit_for_bit": exact,
        "by_level": {k: {"share": n / total, "bits": s / n} for k, (n, s) in sorted(levels.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="of each matrix")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    source = open_source(EmbeddedTargetConfig(name="smollm2_135m"), torch.bfloat16, CPU)
    real = [
        source.layer(index, CPU)[f"{name}.weight"][: options.rows].contiguous()
        for index in LAYERS
        for name in LINEARS
    ]
    kinds = {
        "Gaussian": [(torch.randn(options.rows, 3584, generator=generator) * 0.02).bfloat16()],
        "default model": real,
    }
    results = {}
    for kind, weights in kinds.items():
        for bits in (8, 4, 3, 2):
            result = measure(weights, bits)
            results[f"{kind}, {bits} bits"] = result
            print(
                f"{kind:14} HQQ {bits} bits: {result['bits_per_weight']:.3f} bits per weight (entropy "
                f"{result['entropy']:.3f}), {result['rebuilt_bit_for_bit']} of {result['matrices']} matrices rebuilt"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
