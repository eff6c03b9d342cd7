"""Speed of every way to run a target that does not fit, on this card, with planted weights.

    python scripts/gpu_benchmark.py [--target qwen2_5_7b] [--vram 8] [--modes accelerate,plain,subspec]

The target has the exact shapes of the named model and planted random weights: it is no language model, its speed is
real, and its acceptance comes from real quantization noise. Every mode runs the same prompts (random tokens, seeds
stated) under the same enforced device-memory budget; a warm-up text is excluded. Prints a table for people and one
JSON line last.
"""

import argparse
import gc
import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from subspec.config.enums import AUTO, Codec, Kernel, VramCounts
from subspec.config.quant_checks import HEAD, USUAL_MODULES
from subspec.config.schema import (
    AccelerateOffloadConfig,
    BeamTreeConfig,
    BenchmarkConfig,
    BitsByModule,
    Config,
    DecodingConfig,
    HqqConfig,
    NoDraftConfig,
    NoLoggerConfig,
    Placement,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.from_config import build_sampling
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.levels.captured_draft import CapturedDraft
from subspec.offload.bandwidth import measure_link
from subspec.offload.streamed_target import StreamedTarget
from subspec.planning.budget import DeviceMemory
from subspec.planning.plan import plan_run
from subspec.session import assemble_streamed, cap_device
from subspec.targets.planted import PlantedSource

# Read when CUDA starts, not when torch is imported: segments that grow keep a tight budget from fragmenting.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

GIB = 2**30
MODES = ("accelerate", "plain", "subspec")


def parse(variant: str) -> tuple[str, int, int]:
    """``kind:depth:width`` with kind ``beam`` or ``adaptive``."""
    kind, depth, width = variant.split(":")
    return kind, int(depth), int(width)


def growth_of(variant: str) -> TreePolicy:
    kind, depth, width = parse(variant)
    if kind == "adaptive":
        return Adaptive(depth, width, level_cost=None, check_every=2, min_depth=1)
    return Beam(depth, width)


def configuration(options: argparse.Namespace, mode: str) -> Config:
    """The run's configuration; its tree is large enough for every variant."""
    shapes = [parse(variant) for variant in options.trees.split(",")]
    width, depth = max(shape[2] for shape in shapes), max(shape[1] for shape in shapes)
    tree = BeamTreeConfig(name="beam", depth=depth, width=width)
    draft = NoDraftConfig(name="none")
    if mode == "subspec":
        draft = SubstituteDraftConfig(name="subspec", kernel=Kernel(options.kernel))
    modules = None if options.head_bits is None else [*USUAL_MODULES, *[HEAD] * (options.head_bits > 0)]
    budget = {"vram_gib": options.vram, "vram_counts": VramCounts.allocator}
    return Config(
        target=PlantedTargetConfig(name=f"planted_{options.target}", shape=options.target),
        draft=draft,
        quant=HqqConfig(name="hqq", modules=modules, bits_by=BitsByModule(lm_head=options.head_bits or None)),
        tree=tree,
        decoding=DecodingConfig(name="greedy", max_new_tokens=options.new_tokens, max_length=options.max_length),
        offload=AccelerateOffloadConfig(name="accelerate", **budget)
        if mode == "accelerate"
        else StreamOffloadConfig(name="stream", **budget, ring_slots=options.slots, codec=Codec(options.codec)),
        benchmark=BenchmarkConfig(name="gsm8k"),
        logger=NoLoggerConfig(name="none"),
        run_dir="",
    )


def run_mode(
    options: argparse.Namespace, mode: str, source: PlantedSource, link: float, bitwise: bool | str
) -> list[dict[str, Any]]:
    """One or, for ``subspec``, several measurements (one per tree) of one loaded target."""
    device = torch.device("cuda")
    config = configuration(options, mode)
    config = replace(config, decoding=replace(config.decoding, bitwise=bitwise))
    cap_device(options.vram, device)
    started = time.perf_counter()
    facts: dict[str, Any] = {"mode": mode}
    if mode == "accelerate":
        from subspec.offload.accelerate import AccelerateTarget

        decoder: Any = AccelerateTarget(source, device, int((options.vram - 1.5) * GIB))
        facts["load_s"] = time.perf_counter() - started
        engine = Engine(decoder, sampling=build_sampling(config), max_length=options.max_length)
        # About a second per token: a few tokens of one prompt will do.
        options = argparse.Namespace(**{**vars(options), "prompts": 1, "timeline": None})
        result = measure(options, engine, source, link, facts, min(options.new_tokens, 8))
        print(json.dumps(result), flush=True)
        return [result]
    memory, free = DeviceMemory.measured(device), psutil.virtual_memory().available
    plan = plan_run(config, source.config, link_gb_per_s=link, host_free=free, device=memory)
    assembly = assemble_streamed(config, source, plan, device)
    streamed = assembly.streamed
    assert streamed is not None
    facts |= {
        "load_s": time.perf_counter() - started,
        "resident_layers": len(streamed.target.resident_layers),
        "prefill_chunk": plan.prefill_chunk,
        "codec": plan.codec.value,
        "bits_per_coded_weight": streamed.bits_per_weight,
        "bits_per_coded_head_weight": streamed.head_bits_per_weight,
        "decode_ms_per_layer": decode_time(streamed.target),
        "planned_gib": plan.total(Placement.device) / GIB,
    }
    assembly.engine = None  # type: ignore[assignment]  # every variant gets an engine and a cache of its own
    results = []
    engine = draft = None
    arithmetic = streamed.target.bitwise
    for variant in options.trees.split(",") if mode == "subspec" else [None]:
        engine = draft = None  # its KV cache and graphs go before the next one's come
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        cap_device(options.vram, device)
        if variant is not None and streamed.substitute is not None:
            draft = CapturedDraft(streamed.substitute)
        engine = Engine(
            streamed.target,
            draft,
            growth_of(variant) if variant is not None else None,
            max_length=options.max_length,
            prefill_chunk=plan.prefill_chunk,
        )
        # Plain decoding: every pass takes the same time, so a few will do.
        tokens = options.new_tokens if variant is not None else min(options.new_tokens, 40)
        name = {"mode": mode if variant is None else f"{mode} {variant}"}
        if arithmetic is not None:
            name["mode"] += " bitwise"
            facts |= {"tilings": {role: str(tiling) for role, tiling in arithmetic.tilings.items()}}
        results.append(measure(options, engine, source, link, facts | name, tokens))
        if options.contexts:
            results[-1]["contexts"] = [
                at_context(engine, source, int(length), options.seed) for length in options.contexts.split(",")
            ]
        print(json.dumps(results[-1]), flush=True)
    assembly.close()
    return results


def decode_time(decoder: StreamedTarget) -> float | None:
    """Milliseconds to decode one layer while nothing else runs: the mean over the pass's layers."""
    decoding = decoder.restorer
    if decoding is None:
        return None
    flats = dict(decoding.resident)
    if not flats:  # what lies in a slot is as good as any
        index = next(iter(decoding.layers))
        flats = {index: torch.zeros(decoding.layers[index].nbytes, dtype=torch.uint8, device="cuda")}
    for log in (None, []):
        decoding.log = log
        for index, flat in flats.items():
            decoding.restore(index, flat)
            for role, first, _ in decoding.slices:
                decoding.restored(role, first)
        torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for _, begin, end in decoding.log or ()]
    decoding.log = None
    return sum(times) / len(flats)


def at_context(engine: Engine, source: PlantedSource, length: int, seed: int) -> dict[str, Any]:
    """Seconds of a prompt of ``length`` tokens, and of the passes behind it (a text before it warms up)."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, source.config.vocab_size, (length,), generator=generator).tolist()
    engine.generate(prompt, max_new_tokens=30)
    stats = [engine.generate(prompt, max_new_tokens=120).stats for _ in range(2)]
    passes = sum(s.iterations for s in stats)
    return {
        "prompt": length,
        "prefill_s": min(s.prefill_s for s in stats),
        "pass_s": sum(s.verify_s - s.accept_s for s in stats) / passes,
        "iteration_s": sum(s.decode_s for s in stats) / passes,
        "tokens_per_s": sum(s.verified_tokens for s in stats) / sum(s.decode_s for s in stats),
    }


def measure(
    options: argparse.Namespace,
    engine: Engine,
    source: PlantedSource,
    link: float,
    facts: dict[str, Any],
    new_tokens: int,
) -> dict[str, Any]:
    """Generate the prompts and compute the figures."""
    decoder: Any = engine.target
    generator = torch.Generator().manual_seed(options.seed)
    vocab = source.config.vocab_size
    prompts = [torch.randint(0, vocab, (64,), generator=generator).tolist() for _ in range(options.prompts)]
    started = time.perf_counter()
    if engine.draft is not None:
        engine.prepare(prompts[0])  # compiles, captures, meets every shape
    engine.generate(prompts[0], max_new_tokens=min(60, new_tokens // 2))
    warm_up = time.perf_counter() - started
    engine.keeps_digests = options.audit and decoder.bitwise is not None
    texts = [engine.generate(prompt, max_new_tokens=new_tokens) for prompt in prompts]
    stats = [text.stats for text in texts]
    passes = sum(s.iterations for s in stats)
    decode = sum(s.decode_s for s in stats)
    tokens = sum(s.verified_tokens for s in stats)
    result = facts | {
        "warmup_s": warm_up,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "tokens_per_s": tokens / decode,
        "tau": tokens / passes,
        "passes": passes,
        "tokens": tokens,
        "prefill_s": sum(s.prefill_s for s in stats) / len(stats),
        "iteration_s": decode / passes,
        "draft_s": sum(s.draft_s for s in stats) / passes,
        "verify_s": sum(s.verify_s for s in stats) / passes,
        "pass_s": sum(s.verify_s - s.accept_s for s in stats) / passes,
        "settle_s": sum(s.accept_s for s in stats) / passes,
        "levels": sum(sum(s.drafted_by_depth) for s in stats) / passes,
    }
    result["other_s"] = result["iteration_s"] - result["draft_s"] - result["verify_s"]
    per_pass = getattr(decoder, "streamed_bytes_per_pass", None)
    if per_pass is not None:
        floor = per_pass / (link * 1e9)
        full = sum(s.numel() for s in source.layer_shapes(0).values()) * 2 * source.config.num_hidden_layers
        seconds = sum(s.transfer_s for s in stats)
        result |= {
            "gb_per_pass": per_pass / 1e9,
            "gb_per_s_while_copying": sum(s.bytes_streamed for s in stats) / max(seconds, 1e-9) / 1e9,
            "link_busy": seconds / sum(s.decode_s + s.prefill_s for s in stats),
            "roofline_tokens_per_s": result["tau"] / floor if floor else None,
            "roofline_share": result["tokens_per_s"] * floor / result["tau"] if floor else None,
            "share_of_full_streaming": result["tokens_per_s"] / (result["tau"] * link * 1e9 / full),
        }
    if options.timeline:
        from subspec.runs.timeline import record_timeline

        folder = Path(options.timeline) / facts["mode"].replace(" ", "-").replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        record_timeline(engine, prompts[0], folder)
    if options.audit and per_pass is not None:
        # Everything is measured: the audit's own workspace is not the run's.
        torch.cuda.set_per_process_memory_fraction(1.0)
        auditor = Auditor(decoder)
        audits = [auditor.audit(p, t.token_ids, digests=t.digests) for p, t in zip(prompts, texts, strict=True)]
        result["audit"] = {
            "exact": sum(a.exact for a in audits),
            "near_tie": sum(a.near_tie for a in audits),
            "mismatch": sum(a.mismatch for a in audits),
            "bitwise": sum(a.bitwise for a in audits),
            "max_gap": max(a.max_gap for a in audits),
            "margin": audits[0].margin,
        }
    return result


def table(results: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    columns = {
        "mode": "mode", "tokens/s": "tokens_per_s", "tau": "tau", "s/iter": "iteration_s", "draft": "draft_s",
        "target": "pass_s", "verify": "settle_s", "other": "other_s", "levels": "levels", "GB/pass": "gb_per_pass",
        "roofline": "roofline_share", "of full": "share_of_full_streaming", "peak GiB": "reserved_gib",
    }  # fmt: skip
    for name in columns:
        shown.add_column(name, justify="left" if name == "mode" else "right")
    for result in results:
        cells = [result.get(key) for key in columns.values()]
        shown.add_row(*("-" if c is None else c if isinstance(c, str) else f"{c:.3f}" for c in cells))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="qwen2_5_7b")
    parser.add_argument("--vram", type=float, default=8.0, help="GiB of PyTorch's allocations")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument(
        "--trees", default="beam:48:6,adaptive:48:6", help="kind:depth:width of every subspec measurement"
    )
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--codec", default="none", choices=[codec.value for codec in Codec])
    parser.add_argument("--kernel", default="auto", help="draft.kernel")
    parser.add_argument(
        "--head-bits", type=int, help="of an LM head of the draft's own; 0: the target's; default: as runs have it"
    )
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; the weights have seed 0")
    parser.add_argument(
        "--bitwise", default="on,off", help="batch-invariant passes of the target: on, off or both, one after the other"
    )
    parser.add_argument("--contexts", help="prompt lengths whose prefill and passes are measured besides")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--timeline", help="folder for a trace and a picture per mode")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    console = Console(width=140)
    device = torch.device("cuda")
    link = measure_link(device)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, link {link:.1f} GB/s")
    config = PlantedTargetConfig(name=f"planted_{options.target}", shape=options.target)
    source = PlantedSource(config, torch.bfloat16, device)
    results = []
    for mode, bitwise in itertools.product(options.modes.split(","), options.bitwise.split(",")):
        if mode == "accelerate" and bitwise != options.bitwise.split(",")[0]:
            continue  # it has no such passes
        results += run_mode(options, mode, source, link, AUTO if bitwise == "on" else False)
        gc.collect()
        torch.cuda.empty_cache()
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "link_gb_per_s": link,
        "target": source.source,
        **{k: v for k, v in vars(options).items() if k != "json"},
        "results": results,
    }
    console.print(
        table(results, f"planted {options.target} in {options.vram:g} GiB, link {link:.1f} GB/s (no language model)")
    )
    print(json.dumps(summary))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)


if __name__ == "__main__":
    main()
