"""Time of a whole draft level by quantizer and bits on this card (random weights of a real shape).

    python scripts/level_benchmark.py [--shape qwen2_5_7b] [--formats hqq:4,hqq:4+head:8,higgs:4] [--json FILE]

For every format the fastest kernel of each role is found first, among all settings of the CUDA kernels and a few of the
Triton ones; then 48 levels of width 6 are captured over a prefix of 512 tokens and replayed. Last comes what gemlite
takes for the same roles, if ``--gemlite`` asks for it: it tunes itself for some ten seconds per shape.
"""

import argparse
import json
import time
from collections.abc import Mapping

import torch
from kernel_benchmark import DEVICE, SHAPES, levels, memory_bandwidth, random_model, role_shapes

from subspec.levels.model import Attention
from subspec.quant.affine_format import AffineFormat, Format, affine_format
from subspec.quant.codebook_format import LutFormat
from subspec.quant.kernel_timing import variant_time
from subspec.quant.level_linear import GemLite, Tinygemm, Variant, unavailable

FORMATS = "hqq:4,hqq:4+head:8,hqq:4+head:4,hqq:3,hqq:8,hqq:2,higgs:4,higgs:3,higgs:2"
FEW = {(4, 1), (4, 4), (2, 1)}
"""Outputs in sixteens and splits of the Triton kernels that are tried: each costs a second to compile."""


def parse(text: str) -> tuple[Format, Format | None]:
    """``hqq:4+head:8``: the layers' format, and that of the draft's own LM head."""
    method, _, head = text.partition("+head:")
    name, bits = method.split(":")
    own: Format = LutFormat(int(bits)) if name == "higgs" else affine_format(int(bits), 64)
    return own, affine_format(int(head), 64) if head else None


def fastest(
    formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]], width: int
) -> tuple[dict[str, Variant], dict[str, dict[str, float]]]:
    """The best variant of every role, and microseconds of all that were tried."""
    best: dict[str, Variant] = {}
    times: dict[str, dict[str, float]] = {}
    for role, format_ in formats.items():
        n, k = shapes[role]
        times[role] = {}
        for kernel in format_.kernels:
            if kernel in (GemLite.kind, Tinygemm.kind) or format_.unfit(kernel, n, k):
                continue
            for variant in format_.variants(kernel, role, n, k):
                if "triton" in kernel and (variant.tiles, variant.splits) not in FEW:
                    continue
                if "triton" in kernel and times[role] and format_.bits == 4:
                    continue  # the CUDA kernel has these bits, and is known to be faster
                try:
                    seconds = variant_time(
                        variant, n, k, width, DEVICE, swiglu=role == "gate_up", format_=format_
                    )
                except Exception as error:
                    print(f"{role} {variant}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                    continue
                times[role][str(variant)] = seconds * 1e6
                if times[role][str(variant)] == min(times[role].values()):
                    best[role] = variant
    return best, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_7b")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--gemlite", action="store_true")
    parser.add_argument("--json", help="rewritten after every format")
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden, inter, heads, kv, dim, vocab, layers = SHAPES[options.shape]
    shapes = role_shapes(options.shape)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "shape": options.shape,
        "width": options.width,
        "memory_bytes_per_s": memory_bandwidth(),
        "formats": {},
    }

    def keep() -> None:
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)

    with torch.inference_mode():
        for text in options.formats.split(","):
            started = time.perf_counter()
            own, head = parse(text)
            formats: dict[str, Format] = {role: own for role in shapes if role != "head"}
            if head is not None:
                formats["head"] = head
            variants, times = fastest(formats, shapes, options.width)
            model = random_model(
                hidden, inter, heads, kv, dim, vocab, layers,
                shapes=shapes, formats=formats, width=options.width, variants=variants,
            )  # fmt: skip
            bytes_ = sum(formats[role].device_bytes(*shapes[role]) for role in formats if role != "head")
            weights = sum(n * k for role, (n, k) in shapes.items() if role != "head")
            measured = levels(model, layers, options.width, lengths=(512,), slices=(Attention().splits,))
            result["formats"][text] = {
                "bits_per_weight": 8 * bytes_ / weights,
                "kernels": {role: str(variant) for role, variant in variants.items()},
                "us": times,
                "ms_per_level": measured[0]["ms_per_level"],
            }
            chosen = {role: f"{v} {times[role][str(v)]:.1f} us" for role, v in variants.items()}
            line = f"{text}: {measured[0]['ms_per_level']:.3f} ms a level; {chosen}"
            print(f"{line}; {time.perf_counter() - started:.0f} s", flush=True)
            del model
            torch.cuda.empty_cache()
            keep()
        if options.gemlite and unavailable(GemLite.kind, DEVICE) is None:
            result["gemlite_us"] = {}
            for role, (n, k) in shapes.items():
                if role != "head":
                    seconds = variant_time(
                        Variant(GemLite.kind), n, k, options.width, DEVICE, swiglu=role == "gate_up",
                        format_=AffineFormat(),
                    )  # fmt: skip
                    result["gemlite_us"][role] = seconds * 1e6
                    print(f"gemlite, hqq 4 bit, {role}: {seconds * 1e6:.1f} us", flush=True)
                    keep()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
