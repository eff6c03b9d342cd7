"""Time of the draft's kernels and of a whole draft level on this card (random weights of a real shape).

    python scripts/kernel_benchmark.py [--shape qwen2_5_7b] [--width 6] [--bits 4] [--group 64]
        [--head-bits 8] [--json FILE]

Prints microseconds per call for every kernel and number of rows, beside the time its bytes alone would take at the
measured memory bandwidth, then milliseconds per draft level, its kernels chosen as a run chooses them. Calls are timed
inside a CUDA graph that rotates over enough weights to defeat the L2 cache.
"""

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.kernels import int4
from subspec.kernels.timing import graph_time
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention, LevelLayer, LevelModel
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.hqq import HqqFormat
from subspec.quant.kernel_times import rotated_time, rotation
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.weight_format import WeightFormat

SHAPES = {
    "qwen2_5_7b": (3584, 18944, 28, 4, 128, 152064, 28),
    "qwen2_5_32b": (5120, 27648, 40, 8, 128, 152064, 64),
    "llama3_1_8b": (4096, 14336, 32, 8, 128, 128256, 32),
}
"""hidden, intermediate, q heads, kv heads, head dimension, vocabulary, layers."""

DEVICE = torch.device("cuda")


def role_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a model's fused Linears by role."""
    hidden, inter, heads, kv, dim, vocab, _ = SHAPES[shape]
    return {
        "qkv": ((heads + 2 * kv) * dim, hidden),
        "out": (hidden, heads * dim),
        "gate_up": (2 * inter, hidden),
        "down": (hidden, inter),
        "head": (vocab, hidden),
    }


def memory_bandwidth() -> float:
    """Bytes per second of a large device copy, read + written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / graph_time(lambda: b.copy_(a))


def kernels(shapes: dict[str, tuple[int, int]], formats: dict[str, HqqFormat], bandwidth: float) -> list[dict]:
    rows_list = [1, 2, 4, 6, 8]
    results = []
    for role, (n, k) in shapes.items():
        if role not in formats:
            continue
        format_, swiglu = formats[role], role == "gate_up"
        floor = format_.device_bytes(n, k) / bandwidth * 1e6
        variants = [
            variant
            for kernel in format_.kernels
            if format_.unavailable(kernel, DEVICE) is None and format_.unfit(kernel, n, k) is None
            for variant in format_.variants(kernel, role, n, k)
        ]
        for variant in variants:
            linears = rotation(format_.random_linear(variant, n, k, DEVICE, swiglu=swiglu), DEVICE)
            times = {}
            for rows in rows_list:
                x = torch.randn(rows, k, device=DEVICE, dtype=linears[0].reads)
                times[rows] = rotated_time(linears, x) * 1e6
            results.append(
                {
                    "role": role,
                    "format": str(format_),
                    "kernel": variant.kernel,
                    "tiles": variant.tiles,
                    "splits": variant.splits,
                    "floor_us": floor,
                    "us": times,
                }
            )
            print(
                f"{role:8} {variant!s:14}  floor {floor:5.1f}  "
                + "  ".join(f"{rows}:{t:6.1f}" for rows, t in times.items()),
                flush=True,
            )
            del linears
    return results


def random_model(
    hidden: int,
    inter: int,
    heads: int,
    kv: int,
    dim: int,
    vocab: int,
    layers: int,
    *,
    shapes: dict[str, tuple[int, int]],
    formats: Mapping[str, WeightFormat],
    width: int,
    variants: Mapping[str, Variant] | None = None,
) -> LevelModel:
    """A draft with made-up weights; ``variants``: its kernels by role, None: chosen by measurement."""
    chosen = {role: shapes[role] for role in formats}
    if variants is None:
        choice = choose_kernels(chosen, width, DEVICE, formats=formats)
        print(choice.summary(), flush=True)
        variants = choice.variants
    patterns: dict[str, LevelLinear] = {}

    def linear(role: str) -> LevelLinear:
        """One with memory of its own; packing is done once per role."""
        if role not in patterns:
            n, k = shapes[role]
            patterns[role] = formats[role].random_linear(variants[role], n, k, DEVICE, swiglu=role == "gate_up")
        made = copy.copy(patterns[role])
        made.adopt([tensor.clone() for tensor in made.tensors])
        return made

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16, device=DEVICE)

    built = [
        LevelLayer(
            qkv=linear("qkv"),
            out=linear("out"),
            gate_up=linear("gate_up"),
            down=linear("down"),
            qkv_bias=torch.zeros((heads + 2 * kv) * dim, dtype=torch.bfloat16, device=DEVICE),
            input_norm=ones(),
            post_norm=ones(),
        )
        for _ in range(layers)
    ]
    table = torch.randn(vocab, hidden, device=DEVICE, dtype=torch.bfloat16)
    return LevelModel(
        layers=built,
        embedding=table.cpu().pin_memory(),
        final_norm=ones(),
        head=table,
        inverse_frequency=1e6 ** (-torch.arange(0, dim, 2, device=DEVICE).float() / dim),
        attention_scaling=1.0,
        eps=1e-6,
        q_heads=heads,
        kv_heads=kv,
        head_dim=dim,
        hidden=hidden,
        vocab_size=vocab,
        draft_head=linear("head") if "head" in formats else None,
    )


def levels(
    model: LevelModel,
    layers: int,
    width: int,
    lengths: Sequence[int] = (128, 512, 1500),
    slices: Sequence[int] = (8, 16, 32),
) -> list[dict]:
    results = []
    for length in lengths:
        policy = Beam(48, width)
        cache = KVCache(
            layers=layers, kv_heads=model.kv_heads, head_dim=model.head_dim, max_length=2048,
            draft_rows=policy.draft_rows, target_rows=policy.capacity, dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
        cache.rows.normal_()
        cache.extend(length)
        for splits in slices:
            draft = CapturedDraft(model, attention=Attention(splits=splits))
            draft.begin(cache)
            tree = Tree(policy.capacity, DEVICE)
            root = torch.tensor([17], device=DEVICE)
            started = time.perf_counter()
            for _ in range(3):
                tree.plant(root)
                while tree.levels < 48:
                    draft.extend(tree, tree.last_level, policy)
                draft.commit(tree, root, None)
            torch.cuda.synchronize()
            captured = time.perf_counter() - started
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            host = time.perf_counter()
            start.record()
            for _ in range(5):
                tree.plant(root)
                while tree.levels < 48:
                    draft.extend(tree, tree.last_level, policy)
            end.record()
            host = (time.perf_counter() - host) / 5
            torch.cuda.synchronize()
            level = start.elapsed_time(end) / 5 / 48
            results.append({"length": length, "splits": splits, "ms_per_level": level, "host_ms": host * 1e3 / 48})
            print(
                f"level at width {width}, prefix {length}, {splits} attention slices: {level:.3f} ms "
                f"(host {host * 1e3 / 48:.3f} ms; 48 captures with warm-up {captured:.1f} s)",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_7b")
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--head-bits", type=int, default=0, help="of the LM head; 0: exact")
    parser.add_argument("--json")
    parser.add_argument("--skip-kernels", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden, inter, heads, kv, dim, vocab, layers = SHAPES[options.shape]
    shapes = role_shapes(options.shape)
    formats = {
        role: HqqFormat(options.head_bits if role == "head" else options.bits, options.group)
        for role in shapes
        if role != "head" or options.head_bits
    }
    bandwidth = memory_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, device memory {bandwidth / 1e12:.2f} TB/s")
    print("our kernel:", int4.unavailable() or "available", flush=True)
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bandwidth": bandwidth}
    with torch.inference_mode():
        if not options.skip_kernels:
            result["kernels"] = kernels(shapes, formats, bandwidth)
        model = random_model(
            hidden, inter, heads, kv, dim, vocab, layers, shapes=shapes, formats=formats, width=options.width
        )
        result["levels"] = levels(model, layers, options.width)
    print(json.dumps(result))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
