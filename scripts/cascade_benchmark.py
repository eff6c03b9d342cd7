"""Speed of ``draft.proposer`` on this card, with planted weights and a proposer whose acceptance is set by hand.

    python scripts/cascade_benchmark.py [--target qwen2_5_7b] [--vram 8] [--proposed 10] [--right 1,0.8,0.6]

A planted target is no language model: nothing guesses its tokens. So the first runs record what the substitute says
after every node. In later ones the cascade's index returns these tokens with the given probability, and wrong
ones otherwise. Such guesses cost nothing: what is measured is the substitute's passes, the cascade's own work and
the target. Passes per level of real proposers on text are in ``experiments/drafts``: compare runs with as many. Prints
a JSON line per run, and one with all of them last.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from subspec.config.enums import AUTO, Codec, Proposer, VramCounts
from subspec.config.schema import (
    AdaptiveTreeConfig,
    BenchmarkConfig,
    Config,
    DecodingConfig,
    HqqConfig,
    NoLoggerConfig,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.draft import Perturb
from subspec.decoding.engine import Engine
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.cascade import CascadeDraft
from subspec.drafts.ngram_index import NgramIndex
from subspec.offload.bandwidth import measure_link
from subspec.planning.budget import DeviceMemory
from subspec.planning.plan import plan_run
from subspec.session import assemble_streamed, cap_device
from subspec.targets.planted import PlantedSource

# Read when CUDA starts, not when torch is imported: segments that grow keep a tight budget from fragmenting.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class ByHand(NgramIndex):
    """An index that returns the substitute's tokens with probability ``right``, and wrong ones otherwise.

    Attributes:
        known: tokens and their probabilities by the tokens before.
        asked, found: numbers of contexts looked up, and of those that were known.
    """

    def __init__(self, longest: int, vocab_size: int) -> None:
        super().__init__(longest)
        self.vocab_size = vocab_size
        self.known: dict[tuple[int, ...], dict[int, float]] = {}
        self.right, self.asked, self.found = 1.0, 0, 0

    def count(self, context: Sequence[int], token: int) -> None:
        """Count nothing."""

    def candidates(self, context: Sequence[int], most: int) -> dict[int, float]:
        found = self.known.get(tuple(context), {})
        self.asked, self.found = self.asked + 1, self.found + bool(found)
        wrong = hash(tuple(context)) % 1000 >= 1000 * self.right
        return {(token + wrong) % self.vocab_size: p for token, p in found.items()}


def recording(cascade: CascadeDraft, index: ByHand) -> Callable[..., None]:
    """Run passes of the cascade and record what the substitute says."""
    run = type(cascade)._run

    def recorded(nodes: list[int], frontier: Tensor, policy: TreePolicy, perturb: Perturb | None) -> None:
        before = set(cascade._scored)
        run(cascade, nodes, frontier, policy, perturb)
        for node in cascade._scored.keys() - before:
            said, temperature = cascade._scored[node], policy.sharpened(cascade.temperature)
            weights = [math.exp(value * temperature) for value in said.sharp]
            index.known[cascade._known.ends[node]] = {
                token: weight / sum(weights) for token, weight in zip(said.tokens, weights, strict=True)
            }

    return recorded


def configuration(options: argparse.Namespace) -> Config:
    """The default settings of a streamed coded run, with a proposer."""
    return Config(
        target=PlantedTargetConfig(name=f"planted_{options.target}", shape=options.target),
        draft=SubstituteDraftConfig(name="subspec", proposer=Proposer.prompt_lookup, proposed=options.proposed),
        quant=HqqConfig(name="hqq"),
        tree=AdaptiveTreeConfig(name="adaptive", depth=48, width=6, check_every=2, min_depth=1),
        decoding=DecodingConfig(name="greedy", max_new_tokens=options.new_tokens, bitwise=AUTO),
        offload=StreamOffloadConfig(
            name="stream", vram_gib=options.vram, vram_counts=VramCounts.allocator, codec=Codec.substitute
        ),
        benchmark=BenchmarkConfig(name="gsm8k"),
        logger=NoLoggerConfig(name="none"),
        run_dir="",
    )


def measure(engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> dict[str, Any]:
    """Figures of all prompts."""
    stats = [engine.generate(prompt, max_new_tokens=new_tokens).stats for prompt in prompts]
    passes, decode = sum(s.iterations for s in stats), sum(s.decode_s for s in stats)
    tokens, levels = sum(s.verified_tokens for s in stats), sum(sum(s.drafted_by_depth) for s in stats)
    return {
        "tokens_per_s": tokens / decode,
        "tau": tokens / passes,
        "iteration_s": decode / passes,
        "draft_s": sum(s.draft_s for s in stats) / passes,
        "pass_s": sum(s.verify_s for s in stats) / passes,
        "levels": levels / passes,
        "passes_per_level": sum(s.draft_passes for s in stats) / levels,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="qwen2_5_7b")
    parser.add_argument("--vram", type=float, default=8.0, help="GiB of PyTorch's allocations")
    parser.add_argument("--proposed", type=int, default=10, help="draft.proposed")
    parser.add_argument("--right", default="1,0.8,0.6", help="probabilities that the proposer is right")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--profile", help="file for a table of the host's time")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, config = torch.device("cuda"), configuration(options)
    cap_device(options.vram, device)
    link = measure_link(device)
    source = PlantedSource(config.target, torch.bfloat16, device)
    memory, free = DeviceMemory.measured(device), psutil.virtual_memory().available
    plan = plan_run(config, source.config, link_gb_per_s=link, host_free=free, device=memory)
    started = time.perf_counter()
    assembly = assemble_streamed(config, source, plan, device)
    engine, vocab, cascade = assembly.engine, source.config.vocab_size, assembly.engine.draft
    assert isinstance(cascade, CascadeDraft)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocab, (64,), generator=generator).tolist() for _ in range(options.prompts)]
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "resident_layers": len(engine.target.resident_layers),
        "link_gb_per_s": link,
        "load_s": time.perf_counter() - started,
    }
    engine.prepare(prompts[0])
    engine.generate(prompts[0], max_new_tokens=options.new_tokens)  # captures
    results: list[dict[str, Any]] = [{"proposer": "prompt_lookup", **measure(engine, prompts, options.new_tokens)}]
    print(json.dumps(results[-1]), flush=True)
    cascade._index = index = ByHand(cascade._index.longest, vocab)
    cascade._run = recording(cascade, index)  # type: ignore[method-assign]
    for _ in range(2):  # twice: trees of the second run begin at other positions
        measure(engine, prompts, options.new_tokens)
    del cascade._run
    for index.right in map(float, options.right.split(",")):
        index.asked = index.found = 0
        figures = measure(engine, prompts, options.new_tokens)
        about = {"proposer": "by hand", "right": index.right, "known": index.found / max(index.asked, 1)}
        results.append(about | figures)
        print(json.dumps(results[-1]), flush=True)
    if options.profile:
        import cProfile
        import pstats

        with cProfile.Profile() as profile:
            measure(engine, prompts[:1], options.new_tokens)
        with open(options.profile, "w", encoding="utf-8") as file:
            pstats.Stats(profile, stream=file).sort_stats("tottime").print_stats(45)
    assembly.close()
    summary = facts | {k: v for k, v in vars(options).items() if k not in ("json", "profile")} | {"results": results}
    print(json.dumps(summary))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)


if __name__ == "__main__":
    main()
