"""Streaming from a disk on this CPU: plain decoding's share of the disk's roofline, and SubSpec's speed over it.

    python scripts/disk_benchmark.py [--rounds 5] [--tokens 48] [--json FILE] [OVERRIDE ...]

No layer stays in memory. All methods take turns in one process, on the same prompts, and the disk is measured before
every text, so that other processes disturb them alike; figures are medians of the rounds. A method's share of the
roofline is the seconds that its passes would take at the disk's bandwidth over the seconds of decoding.
"""

import argparse
import json
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from subspec.config.schema import register_schemas, to_config
from subspec.decoding.result import GenerationResult
from subspec.offload.disk import measure_disk, stored_layers
from subspec.runs.console import RunConsole
from subspec.runs.loading import Loaded, load
from subspec.targets import open_source, resolve_dtype
from subspec.utils.cpu import cpu_name
from subspec.utils.paths import conf_dir

CPU = torch.device("cpu")

METHODS = {
    "plain": ["draft=none"],
    "chain 4": ["draft=subspec", "tree=chain", "tree.depth=4"],
    "chain 6": ["draft=subspec", "tree=chain", "tree.depth=6"],
    "adaptive 16x1": ["draft=subspec", "tree=adaptive", "tree.depth=16", "tree.width=1", "tree.min_depth=0"],
    "beam 8x4": ["draft=subspec", "tree=beam", "tree.depth=8", "tree.width=4"],
    "beam 16x4": ["draft=subspec", "tree=beam", "tree.depth=16", "tree.width=4"],
    "adaptive 16x4": ["draft=subspec", "tree=adaptive", "tree.depth=16", "tree.width=4", "tree.min_depth=0"],
}

PROMPTS = (
    "A shop sells pens at 3 euros a piece and books at 12 euros. How much do 4 pens and 2 books cost?",
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the largest number of a list.",
)


def loaded(overrides: list[str]) -> tuple[Any, Loaded]:
    """A configuration and its engine."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = to_config(compose("config", [*overrides, "run_dir=unused"]))
    return config, load(config, CPU, RunConsole())


def figures(result: GenerationResult, gb_per_s: float, bytes_per_pass: int) -> dict[str, float]:
    """Figures of one text."""
    stats = result.stats
    return {
        "tokens_per_s": stats.verified_tokens / stats.decode_s,
        "tau": stats.verified_tokens / stats.iterations,
        "roofline_share": stats.iterations * bytes_per_pass / (gb_per_s * 1e9 * stats.decode_s),
        "draft_s": stats.draft_s / stats.iterations,
        "verify_s": stats.verify_s / stats.iterations,
        "gb_per_s": gb_per_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    register_schemas()
    common = ["device=cpu", "offload=stream", "offload.resident_layers=0", *options.overrides]
    names = options.methods.split(",")
    engines = {name: loaded([*common, *METHODS[name]])[1] for name in names}
    config, first = loaded([*common, *METHODS["plain"]])
    source = open_source(config.target, resolve_dtype(config.target.dtype, CPU), CPU, note=lambda _: None)
    layers = stored_layers(source, lambda _: None)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    texts: dict[str, list[list[int]]] = {name: [] for name in names}
    for number in range(options.rounds):
        prompt = first.target.chat_ids([{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}])
        for name, run in engines.items():
            engine = run.assembly.engine
            if not number:
                engine.generate(prompt, max_new_tokens=4)  # warm-up, and the first reads, which are compared
            speed = measure_disk(layers, config.offload.ring_slots)
            result = engine.generate(prompt, max_new_tokens=options.tokens, ignore_eos=True)
            rows[name].append(figures(result, speed, first.assembly.streamed.target.streamed_bytes_per_pass))
            texts[name].append(result.token_ids)
            shown = ", ".join(f"{key} {value:.3f}" for key, value in rows[name][-1].items())
            print(f"{name:14} {shown}", flush=True)
    medians = {name: {key: median(row[key] for row in own) for key in own[0]} for name, own in rows.items()}

    over = {
        name: median(
            ours["tokens_per_s"] / plain["tokens_per_s"]
            for ours, plain in zip(own, rows["plain"], strict=True)
        )
        for name, own in rows.items()
    }
    result = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "target": config.target.name,
        "plan": {item.name: item.bytes for item in first.plan.items},
        "disk": first.assembly.facts()["disk"],
        "bytes_per_pass": first.assembly.streamed.target.streamed_bytes_per_pass,
        "same_texts": all(own == texts["plain"] for own in texts.values()),
        "medians": medians,
        "over_plain": over,
        "rounds": rows,
        "offload": {key: value for key, value in asdict(config.offload).items() if value is not None},
    }
    for name in names:
        print(f"{name:14} {over[name]:.2f} x plain, share {medians[name]['roofline_share']:.2f}")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, default=str))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, default=str)


if __name__ == "__main__":
    main()
