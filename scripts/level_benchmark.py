"""Time of a whole draft level by quantizer and bits on this card (random weights of a real shape).

    python scripts/level_benchmark.py [--shape qwen2_5_7b] [--formats hqq:4,hqq:4+head:8,higgs:4] [--json FILE]

For every format the fastest setting of our CUDA kernel is found first for each role; then 48 levels of width 6 are
captured over a prefix of 512 tokens and replayed. ``--gemlite`` adds gemlite's time for the same roles; it tunes itself
for some ten seconds per shape.
"""

import argparse
import itertools
import json
import time
from collections.abc import Mapping

import torch
from kernel_benchmark import DEVICE, SHAPES, levels, memory_bandwidth, random_model, role_shapes

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.kernels.timing import graph_time
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention, LevelModel
from subspec.quant.codebook_linear import HiggsFormat
from subspec.quant.gemlite import GemLite
from subspec.quant.hqq import HqqFormat
from subspec.quant.kernel_times import variant_time
from subspec.quant.level_linear import Variant
from subspec.quant.weight_format import WeightFormat

FORMATS = "hqq:4,hqq:4+head:8,hqq:4+head:4,hqq:3,hqq:8,hqq:2,higgs:4,higgs:3,higgs:2"


def parse(text: str) -> tuple[WeightFormat, WeightFormat | None]:
    """``hqq:4+head:8``: the layers' format, and that of the draft's own LM head."""
    method, _, head = text.partition("+head:")
    name, bits = method.split(":")
    own: WeightFormat = HiggsFormat(int(bits)) if name == "higgs" else HqqFormat(int(bits))
    return own, HqqFormat(int(head)) if head else None


def fastest(
    formats: Mapping[str, WeightFormat], shapes: Mapping[str, tuple[int, int]], width: int
) -> tuple[dict[str, Variant], dict[str, dict[str, float]]]:
    """The best variant of every role, and microseconds of all that were tried."""
    best: dict[str, Variant] = {}
    times: dict[str, dict[str, float]] = {}
    for role, format_ in formats.items():
        n, k = shapes[role]
        times[role] = {}
        for kernel in format_.kernels:
            if kernel == GemLite.kind or format_.unfit(kernel, n, k):
                continue
            for variant in format_.variants(kernel, role, n, k):
                try:
                    seconds = variant_time(variant, format_, n, k, width, DEVICE, swiglu=role == "gate_up")
                except Exception as error:
                    print(f"{role} {variant}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                    continue
                times[role][str(variant)] = seconds * 1e6
                if times[role][str(variant)] == min(times[role].values()):
                    best[role] = variant
    return best, times


def pass_ms(model: LevelModel, layers: int, rows: int) -> float:
    """Milliseconds of a captured pass over ``rows`` nodes behind a prefix of 512 tokens, logits included."""
    cache = KVCache(
        layers=layers, kv_heads=model.kv_heads, head_dim=model.head_dim, max_length=1024, draft_rows=rows + 1,
        target_rows=0, dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    cache.rows.normal_()
    cache.extend(512)
    draft, tree = CapturedDraft(model), Tree(rows + 1, DEVICE)
    draft.begin(cache)
    root = tree.plant(torch.tensor([17], device=DEVICE))
    tokens = torch.arange(rows, device=DEVICE)
    nodes = tree.append(tokens, root.expand(rows), torch.zeros(rows, device=DEVICE))
    draft.expand(tree, nodes)
    return graph_time(lambda: draft._level(tree, 1, None)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_7b")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--rows", help="instead: passes over these numbers of rows, like 6,32,64, without growth")
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
        wide = [int(rows) for rows in (options.rows or str(options.width)).split(",")]
        for text, width in itertools.product(options.formats.split(","), wide):
            started = time.perf_counter()
            own, head = parse(text)
            formats: dict[str, WeightFormat] = {role: own for role in shapes if role != "head"}
            if head is not None:
                formats["head"] = head
            variants, times = fastest(formats, shapes, width)
            model = random_model(
                hidden, inter, heads, kv, dim, vocab, layers,
                shapes=shapes, formats=formats, width=width, variants=variants,
            )  # fmt: skip
            if options.rows:
                ms, best = pass_ms(model, layers, width), {r: times[r][str(v)] for r, v in variants.items()}
                result["formats"][f"{text} {width} rows"] = {"ms": ms, "us": best}
                print(f"{text}, {width} rows: {ms:.3f} ms; {best}; {time.perf_counter() - started:.0f} s")
                del model
                torch.cuda.empty_cache()
                keep()
                continue
            bytes_ = sum(formats[role].device_bytes(*shapes[role]) for role in formats if role != "head")
            weights = sum(n * k for role, (n, k) in shapes.items() if role != "head")
            measured = levels(model, layers, width, lengths=(512,), slices=(Attention().splits,))
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
        if options.gemlite and HqqFormat().unavailable(GemLite.kind, DEVICE) is None:
            result["gemlite_us"] = {}
            for role, (n, k) in shapes.items():
                if role != "head":
                    seconds = variant_time(
                        Variant(GemLite.kind), HqqFormat(), n, k, options.width, DEVICE, swiglu=role == "gate_up"
                    )
                    result["gemlite_us"][role] = seconds * 1e6
                    print(f"gemlite, hqq 4 bit, {role}: {seconds * 1e6:.1f} us", flush=True)
                    keep()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
