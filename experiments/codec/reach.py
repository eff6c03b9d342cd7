"""How wide HIGGS's intervals should be, which order of symbols suits them, and what a Rice code would take instead.

    python experiments/codec/reach.py [--rows 128] [--bits 4 3 2] [--json experiments/codec/reach.json]

Mean bits of single weights' codes; what chunks take besides (a word that says where one begins, and half a word of
padding, for every 512 weights) is left out: 0.09 bits.
"""

import argparse
import json
from pathlib import Path

import torch
from bits import matrices
from torch import Tensor

from subspec.offload.codec import RAW_BITS, _Cells, _cells, _symbols
from subspec.offload.intervals import intervals_of, rebuild
from subspec.quant.higgs_codes import HiggsCodeQuantizer, HiggsCodes

REACHES = (2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.2)
UNARY = 8
"""Zeros that a Rice code's quotient has at most; so many say that the 16 bits follow."""


def rice(words: Tensor, cells: _Cells, middle: Tensor, deviations: Tensor, shift: int) -> Tensor:
    """Lengths of Rice codes of the distance from the middle cell.

    Args:
        middle: dequantized weights, float32.
        deviations: of the residuals, in cells.
        shift: of the remainder's bits, from the binary logarithm of the deviation.
    """
    raw = words.to(torch.int32) & 0xFFFF
    size, negative = raw & 0x7FFF, raw >> 15 == 1
    rest = cells.exponent + 127 - (size >> 7)
    usable = (rest >= 0) & (rest <= 7) & (size >> 7 > 0)
    number = torch.where(usable, ((size & 127) | 128) >> rest.clamp(0, 7), 0)
    centre = torch.floor(middle * torch.exp2((7 - cells.exponent).float())).to(torch.int32)
    aside = torch.where(negative, -1 - number, number) - centre
    symbol = torch.where(aside < 0, -2 * aside - 1, 2 * aside)
    bits = (torch.floor(torch.log2(deviations) + shift / 10)).clamp_min(0).to(torch.int32)
    quotient = symbol >> bits
    found = ((number > 0) | (size == 0)) & (quotient < UNARY)
    return torch.where(
        found, quotient + 1 + bits + torch.where(number > 0, rest, 0), UNARY + RAW_BITS
    ).float()


def sweep(weights: list[Tensor], quantizer: HiggsCodeQuantizer) -> dict:
    """Mean lengths by reach: with symbols in ascending order, from the middle, and of the Rice code."""
    codes: list[HiggsCodes] = [quantizer.codes(weight) for weight in weights]
    deviation = codes[0].grid.mse ** 0.5
    total = sum(weight.numel() for weight in weights)
    rows: dict[str, dict[str, float]] = {}
    for reach in REACHES:
        row = dict.fromkeys(("ascending", "from_the_middle", "outside"), 0.0)
        for weight, own in zip(weights, codes, strict=True):
            low, high = intervals_of(own, reach * deviation).between(0, weight.numel())
            cells, words, flat = (
                _cells(low, high),
                weight.view(torch.int16).flatten(),
                weight.float().flatten(),
            )
            row["ascending"] += float(_symbols(words, cells, False)[1].sum()) / total
            row["from_the_middle"] += float(_symbols(words, cells, True)[1].sum()) / total
            row["outside"] += float(((flat < low) | (flat > high)).sum()) / total
        rows[str(reach)] = row
    best: dict[int, float] = {}
    for shift in (2, 4, 6, 8):  # tenths
        for weight, own in zip(weights, codes, strict=True):
            low, high = intervals_of(own, deviation).between(0, weight.numel())
            middle = rebuild(own).float().flatten()
            cells = _cells(middle - 2.7 * (high - low) / 2, middle + 2.7 * (high - low) / 2)
            deviations = (high - low) / 2 * torch.exp2((7 - cells.exponent).float())
            taken = rice(weight.view(torch.int16).flatten(), cells, middle, deviations, shift)
            best[shift] = best.get(shift, 0.0) + float(taken.sum()) / total
    return {"by_reach": rows, "rice": min(best.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="of each matrix")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for kind, weights in matrices(options.rows).items():
        for bits in options.bits:
            result = sweep(weights, HiggsCodeQuantizer(bits))
            results[f"{kind}, HIGGS {bits} bits"] = result
            print(f"{kind}, HIGGS {bits} bits: Rice {result['rice']:.3f}")
            for reach, row in result["by_reach"].items():
                print(f"  {reach}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
