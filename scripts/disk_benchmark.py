"""Streaming from a disk: plain decoding's share of the disk's roofline, and SubSpec's speed over it.

    python scripts/disk_benchmark.py [--rounds 5] [--tokens 48] [--json FILE] [OVERRIDE ...]
    python scripts/disk_benchmark.py --gpu [--on-disk 0.5] [--rounds 3] [--tokens 100] [--json FILE] [OVERRIDE ...]

On this CPU, without ``--gpu``:

No layer stays in memory. All methods take turns in one process, on the same prompts, and the disk is measured before
every text, so that other processes disturb them alike; figures are medians of the rounds. A method's share of the
roofline is the seconds that its passes would take at the disk's bandwidth over the seconds of decoding.

With ``--gpu``: a planted 7B in 8 GiB of device memory, coded, with ``offload.ram_gib`` so that a share of the streamed
layers lies on the disk; then the same with all of them in pinned memory, whose texts must be the same. The share is of
the slower link's roofline, and the disk is measured before every text.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from subspec.config.schema import Config, Placement, register_schemas, to_config
from subspec.decoding.result import GenerationResult
from subspec.memory.allocator import GIB
from subspec.offload import disk
from subspec.offload.disk import measure_disk, stored_layers
from subspec.runs.console import RunConsole
from subspec.runs.environment import peak_ram_gib
from subspec.runs.loading import Loaded, load
from subspec.session import plan_for
from subspec.targets import load_target_config, open_source, resolve_dtype
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


GPU = [
    "target=planted_qwen2_5_7b",
    "offload=stream",
    "offload.vram_gib=8",
    "offload.codec=substitute",
    "draft=subspec",
    "tree=adaptive",
    "tree.depth=48",
    "tree.width=6",
    "decoding.max_length=2048",
]

PROMPT_TOKENS, PLAIN_TOKENS = 64, 8


def configured(overrides: list[str]) -> Config:
    """A configuration."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", [*overrides, "run_dir=unused"]))


def loaded(overrides: list[str]) -> tuple[Config, Loaded]:
    """A configuration for the CPU and its engine."""
    config = configured(overrides)
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


def memory_for(share: float, overrides: list[str], device: torch.device) -> float:
    """The largest ``offload.ram_gib``, in steps of 0.05, that leaves ``share`` of the streamed layers to the disk."""
    config = configured([*overrides, "offload.ram_gib=1000"])
    model = load_target_config(config.target)
    ram = plan_for(config, model, device).total(Placement.host) / GIB
    while True:
        ram = round(ram - 0.05, 2)
        plan = plan_for(configured([*overrides, f"offload.ram_gib={ram}", "offload.link_gb_per_s=1"]), model, device)
        if len(plan.disk_layers) >= share * len(plan.streamed_layers):
            return ram


def run_on_gpu(overrides: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Speed, plain and with the substitute, of one placement of the layers."""
    device, started = torch.device("cuda", 0), time.perf_counter()
    run = load(configured(overrides), device, RunConsole())
    engine, link = run.assembly.engine, run.link
    streamed = run.assembly.streamed
    assert link is not None
    assert run.plan is not None
    assert streamed is not None
    target = streamed.target
    seconds = {"load_s": time.perf_counter() - started}
    generator = torch.Generator().manual_seed(0)
    size = options.rounds, PROMPT_TOKENS
    prompts = torch.randint(0, target.vocab_size, size, generator=generator).tolist()
    started = time.perf_counter()
    engine.prepare(prompts[0])
    engine.generate(prompts[0], max_new_tokens=40, ignore_eos=True)
    seconds["warm_up_s"] = time.perf_counter() - started
    rows, texts = [], []
    for prompt in prompts:
        by_disk = target.recorded is target.disk
        speed = measure_disk(target.disk.layers, run.plan.ring_slots) if target.disk and by_disk else link.gb_per_s
        text = engine.generate(prompt, max_new_tokens=options.tokens, ignore_eos=True)
        row = figures(text, speed, link.bytes_per_pass)
        row["busy_share"] = text.stats.transfer_s / (text.stats.prefill_s + text.stats.decode_s)
        rows.append(row)
        texts.append(text.token_ids)
        print(json.dumps(row), flush=True)
    passes, plain_s = engine.time_plain(PLAIN_TOKENS)
    speed = median(row["gb_per_s"] for row in rows)
    facts = run.facts()
    result = {
        **seconds,
        "subspec": {key: median(row[key] for row in rows) for key in rows[0]},
        "plain": {
            "tokens_per_s": passes / plain_s,
            "roofline_share": passes * link.bytes_per_pass / (speed * 1e9 * plain_s),
        },
        "slower_link": facts.get("slower_link", "link"),
        "measured_when_loaded_gb_per_s": link.gb_per_s,
        "bytes_per_pass": link.bytes_per_pass,
        "pcie_bytes_per_pass": target.streamed_bytes_per_pass,
        "pcie_gb_per_s": run.plan.link and run.plan.link.gb_per_s,
        "ram_gib": getattr(configured(overrides).offload, "ram_gib", None),
        "planned_host_gib": run.plan.total(Placement.host) / GIB,
        "peak_vram_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_ram_gib": peak_ram_gib(),
        "layers": {
            "resident": len(run.plan.resident_layers),
            "pinned": len(run.plan.streamed_layers) - len(run.plan.disk_layers),
            "disk": len(run.plan.disk_layers),
        },
        "disk": facts.get("disk"),
        "coded_cache": facts.get("coded_cache"),
        "rows": rows,
        "texts": texts,
    }
    run.assembly.close()
    return result


def main_gpu(options: argparse.Namespace) -> None:
    """Half the streamed layers from the disk, and none."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before CUDA starts
    overrides, device = [*GPU, *options.overrides], torch.device("cuda", 0)
    ram = memory_for(options.on_disk, overrides, device)
    found = {"disk": run_on_gpu([*overrides, f"offload.ram_gib={ram}"], options)}
    if not options.disk_only:
        found["pinned"] = run_on_gpu(overrides, options)
    texts = [own.pop("texts") for own in found.values()]
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "target": configured(overrides).target.name,
        "same_texts": all(own == texts[0] for own in texts),
        **found,
    }
    for name, own in found.items():
        print(f"{name}: {own['layers']}, shares of the roofline of the slower link ({own['slower_link']})")
        for method in ("subspec", "plain"):
            speed, share = (own[method][key] for key in ("tokens_per_s", "roofline_share"))
            print(f"    {method:8} {speed:8.3f} tokens/s, share {share:.3f}")
    print(json.dumps(result, default=str))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, default=str)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, help="default: 48, with --gpu 100")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--readers", type=int, help="threads that read from the disk")
    parser.add_argument("--on-disk", type=float, default=0.5, help="share of the streamed layers (--gpu)")
    parser.add_argument("--disk-only", action="store_true", help="not with all layers in pinned memory (--gpu)")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    register_schemas()
    disk.READERS = options.readers or disk.READERS
    options.tokens = options.tokens or (100 if options.gpu else 48)
    if options.gpu:
        main_gpu(options)
        return
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
            ours["tokens_per_s"] / plain["tokens_per_s"] for ours, plain in zip(own, rows["plain"], strict=True)
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
