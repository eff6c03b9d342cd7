"""Speed of several texts that share every pass of a streamed target, on this card, with planted weights.

    python scripts/texts_benchmark.py [--texts 1 4 8] [--target qwen2_5_7b] [--vram 8] [--codec substitute]

Every number of texts is planned and loaded by itself, since caches take memory from resident layers: with the
substitute, and the largest number also for plain streaming. One text runs through ``Engine.generate`` besides. Prompts
are random tokens, texts are greedy; a warm-up is excluded. Afterwards every text runs alone and must have the same
tokens, and, in batch-invariant arithmetic, the same logits to the last bit. Last, a long prompt joins all but one of
the texts, in caches of its length. Prints one JSON line per measurement, and writes all of them.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import psutil
import torch
from gpu_benchmark import GIB, configuration  # beside this script

from subspec.config.enums import Codec
from subspec.config.schema import AdaptiveTreeConfig, Config
from subspec.decoding.engine import Engine
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.text import Text
from subspec.offload.bandwidth import measure_link
from subspec.planning.budget import DeviceMemory
from subspec.planning.plan import plan_run
from subspec.session import Assembly, assemble_streamed, cap_device
from subspec.targets.planted import PlantedSource

PROMPT, JOINING = 64, 2000
"""Tokens of a prompt, and of the one that joins running texts."""


def settings(options: argparse.Namespace, mode: str, texts: int) -> Config:
    """The run's configuration: the default adaptive tree of a streamed target."""
    config = configuration(options, mode)
    tree = AdaptiveTreeConfig(name="adaptive", depth=options.depth, width=options.width, check_every=2)
    return replace(config, tree=tree, decoding=replace(config.decoding, texts=texts))


def load(
    options: argparse.Namespace, source: PlantedSource, link: float, mode: str, texts: int
) -> tuple[Assembly, dict[str, Any]]:
    """A ready engine for ``texts`` texts, and the plan's figures."""
    config, device = settings(options, mode, texts), torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    cap_device(options.vram, device)
    memory, free = DeviceMemory.measured(device), psutil.virtual_memory().available
    started = time.perf_counter()
    plan = plan_run(config, source.config, link_gb_per_s=link, host_free=free, device=memory)
    assembly = assemble_streamed(config, source, plan, device)
    return assembly, {
        "mode": mode,
        "texts": texts,
        "load_s": time.perf_counter() - started,
        "resident_layers": len(assembly.streamed.target.resident_layers),
        "gb_per_pass": assembly.streamed.target.streamed_bytes_per_pass / 1e9,
        "prefill_chunk": plan.prefill_chunk,
        "bitwise": assembly.target.bitwise is not None,
    }


def prompts_of(source: PlantedSource, count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, source.config.vocab_size, (length,), generator=generator).tolist() for _ in range(count)]


def timed_steps(scheduler: Scheduler, until: Any) -> list[float]:
    """Seconds of every step until ``until()`` holds."""
    seconds = []
    while not scheduler.idle and not until():
        started = time.perf_counter()
        scheduler.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def emitted(texts: list[Text]) -> int:
    """Tokens of all texts so far."""
    return sum(len(text.output.token_ids) for text in texts)


def together(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[dict[str, Any], list[Text]]:
    """Texts side by side: the speed while all of them run, and from the first prompt to the last token."""
    scheduler = Scheduler(engine, len(prompts))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    texts = [scheduler.add(prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts]
    reading = timed_steps(scheduler, lambda: all(text.root is not None for text in texts))
    before = emitted(texts)
    steps = timed_steps(scheduler, lambda: any(text.ended for text in texts))
    steady = emitted(texts) - before
    timed_steps(scheduler, lambda: False)
    whole = time.perf_counter() - begun
    stats = [text.result.stats for text in texts if text.result]
    passes = sum(s.iterations for s in stats)
    return {
        "tokens_per_s": steady / sum(steps),
        "tokens_per_s_whole": emitted(texts) / whole,
        "iteration_s": sum(steps) / len(steps),
        "draft_s": sum(s.draft_s for s in stats) / passes,
        "pass_s": sum(s.verify_s - s.accept_s for s in stats) / passes,
        "accept_s": sum(s.accept_s for s in stats) / passes,
        "levels": sum(sum(s.drafted_by_depth) for s in stats) / passes,
        "tau": sum(s.verified_tokens for s in stats) / passes,
        "reading_s": sum(reading),
        "beside": statistics.mean(text.beside for text in texts),
    }, texts


def joining(engine: Engine, prompts: list[list[int]], long: list[int], tokens: int) -> dict[str, Any]:
    """Passes of running texts while a long prompt is read beside them, against those before."""
    scheduler = Scheduler(engine, len(prompts) + 1)
    texts = [scheduler.add(prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts]
    timed_steps(scheduler, lambda: all(len(text.output.token_ids) > tokens // 4 for text in texts))
    before = timed_steps(scheduler, lambda: any(len(t.output.token_ids) > tokens // 2 for t in texts))
    late = scheduler.add(long, max_new_tokens=8, ignore_eos=True)
    beside = timed_steps(scheduler, lambda: late.root is not None or any(text.ended for text in texts))
    for text in [*texts, late]:
        scheduler.remove(text)
    return {
        "prompt": len(long),
        "pass_before_s": statistics.median(before),
        "pass_beside_s": statistics.median(beside),
        "passes_beside": len(beside),
        "slow_down": statistics.median(beside) / statistics.median(before),
    }


def same_alone(engine: Engine, texts: list[Text]) -> dict[str, int]:
    """The number of texts whose tokens, and whose logits' bits, are those that they have alone."""
    tokens = bits = 0
    for text in texts:
        assert text.result is not None
        alone = engine.generate(text.prompt, max_new_tokens=len(text.result.token_ids), ignore_eos=True)
        tokens += alone.token_ids == text.result.token_ids
        bits += alone.digests is not None and alone.digests == text.result.digests
    return {"same_tokens": tokens, "same_bits": bits, "compared": len(texts)}


def measure(options: argparse.Namespace, source: PlantedSource, link: float, mode: str, texts: int) -> dict[str, Any]:
    """All figures of one number of texts."""
    assembly, facts = load(options, source, link, mode, texts)
    engine, prompts = assembly.engine, prompts_of(source, texts, PROMPT, options.seed)
    tokens = options.new_tokens if mode == "subspec" else min(options.new_tokens, 40)
    started = time.perf_counter()
    engine.prepare(prompts[0])
    together(engine, prompts, min(60, tokens))
    facts["warmup_s"] = time.perf_counter() - started
    if texts == 1:
        stats = [engine.generate(prompts[0], max_new_tokens=tokens, ignore_eos=True).stats for _ in range(3)]
        facts["generate_tokens_per_s"] = [s.verified_tokens / s.decode_s for s in stats]
    figures, ran = together(engine, prompts, tokens)
    figures |= {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "graphs": engine.draft.facts().get("graphs_captured") if engine.draft else 0,
    }
    engine.keeps_digests = facts["bitwise"]
    _, ran = together(engine, prompts, min(tokens, 120))
    figures |= same_alone(engine, ran)
    assembly.close()
    return facts | figures


def measure_joining(options: argparse.Namespace, source: PlantedSource, link: float, texts: int) -> dict[str, Any]:
    """A prompt of :data:`JOINING` tokens joins ``texts`` - 1 running ones."""
    own = argparse.Namespace(**vars(options) | {"max_length": max(options.max_length, JOINING + 48)})
    assembly, facts = load(own, source, link, "subspec", texts)
    prompts = prompts_of(source, texts - 1, PROMPT, options.seed)
    assembly.engine.prepare(prompts[0])
    together(assembly.engine, prompts, min(60, options.new_tokens))
    [long] = prompts_of(source, 1, JOINING, options.seed + 1)
    figures = joining(assembly.engine, prompts, long, options.new_tokens)
    assembly.close()
    return facts | {"mode": "joining"} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--target", default="qwen2_5_7b")
    parser.add_argument("--vram", type=float, default=8.0, help="GiB of PyTorch's allocations")
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a text's cache")
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--codec", default="substitute", choices=[codec.value for codec in Codec])
    parser.add_argument("--kernel", default="auto", help="draft.kernel")
    parser.add_argument(
        "--head-bits", type=int, help="of an LM head of the draft's own; 0: the target's; default: as runs have it"
    )
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; the weights have seed 0")
    parser.add_argument("--no-plain", action="store_true", help="leave plain streaming out")
    parser.add_argument("--json", default="texts_benchmark.json", help="file of the results")
    options = parser.parse_args()
    options.trees = f"adaptive:{options.depth}:{options.width}"
    device = torch.device("cuda")
    link = measure_link(device)
    config = configuration(options, "plain").target
    source = PlantedSource(config, torch.bfloat16, device)
    asked = [("subspec", texts) for texts in options.texts]
    most = max(options.texts)
    asked += [] if options.no_plain else [("plain", most)]
    asked += [("joining", most)] if most > 1 else []
    results = []
    for mode, texts in asked:
        if mode == "joining":
            results.append(measure_joining(options, source, link, texts))
        else:
            results.append(measure(options, source, link, mode, texts))
        print(json.dumps(results[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    summary = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "link_gb_per_s": link,
        "target": source.source,
        **{key: value for key, value in vars(options).items() if key != "json"},
        "results": results,
    }
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)


if __name__ == "__main__":
    main()
