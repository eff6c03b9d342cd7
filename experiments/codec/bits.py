"""Bits per coded weight, by quantizer bits and by level, on Gaussian weights and on the default model's.

    python experiments/codec/bits.py [--rows 256] [--json experiments/codec/bits.json]

Every matrix is decoded again and compared bit by bit. The entropy is that of the exact weight given its substitute, of
its density against the spacing of bfloat16 numbers at the weight: with HQQ a density that is constant within a bucket,
log2(bucket / spacing), with HIGGS a Gaussian of the grid's error, log2(sqrt(2 pi e) * deviation / spacing).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from subspec.config import EmbeddedTargetConfig
from subspec.offload.codec import decode, encode
from subspec.offload.intervals import intervals_of, margin_of
from subspec.quant.codes import CodeQuantizer, Codes, HqqCodes, QuantizedWeight
from subspec.quant.higgs_codes import HiggsCodeQuantizer
from subspec.targets import open_source

CPU = torch.device("cpu")
LAYERS = (0, 10, 20, 29)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def matrices(rows: int) -> dict[str, list[Tensor]]:
    """What is coded: the first rows of some of the default model's weights, and a Gaussian one."""
    generator = torch.Generator().manual_seed(0)
    source = open_source(EmbeddedTargetConfig(name="smollm2_135m"), torch.bfloat16, CPU)
    real = [
        source.layer(index, CPU)[f"{name}.weight"][:rows].contiguous() for index in LAYERS for name in LINEARS
    ]
    return {
        "Gaussian": [(torch.randn(rows, 3584, generator=generator) * 0.02).bfloat16()],
        "default model": real,
    }


def lengths(weight: Tensor, own: QuantizedWeight) -> Tensor:
    """Bits that each weight takes, flat."""
    from subspec.offload.codec import _cells, _symbols

    intervals = intervals_of(own, margin_of(own))
    cells = _cells(*intervals.between(0, weight.numel()))
    return _symbols(weight.view(torch.int16).flatten(), cells, intervals.centred)[1].float()


def entropy(weight: Tensor, own: QuantizedWeight) -> float:
    """Mean log2(width / spacing), at least 0; the width is that of the uniform density with the same entropy."""
    if isinstance(own, Codes):
        width = own.scale.repeat_interleave(own.group_size, dim=1).abs()
    else:
        low, high = intervals_of(own, own.grid.mse**0.5).between(0, weight.numel())
        width = (math.sqrt(2 * math.pi * math.e) * (high - low) / 2).view(weight.shape)
    magnitude = weight.float().abs().clamp_min(1e-30)
    spacing = torch.exp2(torch.floor(torch.log2(magnitude)) - 7)
    return float(torch.log2(width / spacing).clamp_min(0).mean())


def measure(weights: list[Tensor], quantizer: CodeQuantizer) -> dict:
    total = coded = exact = 0
    ideal, levels = 0.0, {}
    for weight in weights:
        own = quantizer.codes(weight)
        result = encode(weight, own, margin_of(own))
        exact += torch.equal(decode(result, own).view(torch.int16), weight.view(torch.int16))
        total, coded = total + weight.numel(), coded + 8 * result.nbytes
        ideal += entropy(weight, own) * weight.numel()
        if not isinstance(own, Codes):  # a rotated level says nothing of a single weight
            continue
        taken, level = lengths(weight, own), own.q.flatten()
        for number in level.unique().tolist():
            here = taken[level == number]
            known = levels.setdefault(int(number), [0, 0.0])
            known[0] += here.numel()
            known[1] += float(here.sum())
    result = {
        "bits_per_weight": coded / total,
        "entropy": ideal / total,
        "matrices": len(weights),
        "rebuilt_bit_for_bit": exact,
    }
    by_level = {k: {"share": n / total, "bits": s / n} for k, (n, s) in sorted(levels.items())}
    return result | ({"by_level": by_level} if by_level else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="of each matrix")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quantizers: dict[str, CodeQuantizer] = {f"HQQ {bits} bits": HqqCodes(bits) for bits in (8, 4, 3, 2)}
    for bits in (4, 3, 2):
        for dim in (2, 1):
            quantizers[f"HIGGS {bits} bits, dimension {dim}"] = HiggsCodeQuantizer(bits, dim)
    results = {}
    for kind, weights in matrices(options.rows).items():
        for name, quantizer in quantizers.items():
            result = measure(weights, quantizer)
            results[f"{kind}, {name}"] = result
            print(
                f"{kind:14} {name:20}: {result['bits_per_weight']:.3f} bits per weight (entropy "
                f"{result['entropy']:.3f}), {result['rebuilt_bit_for_bit']} of {result['matrices']} matrices rebuilt"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
