"""Passes of the substitute per token with and without a proposer, on real text with the default model.

    python experiments/drafts/cascade.py DATA [--trees 6x1,6x4,16x4] [--drafts none,prompt_lookup,small_model] \
        [--tokens 64] [--json FILE]

DATA is a folder with ``gsm8k_test.jsonl`` and ``mt_bench.jsonl``. A draft is ``none``, or a proposer with
``draft.proposed`` behind a colon if it is not 32; ``plain`` is decoding without a draft. All drafts of a tree run in
turn on every prompt, so that other processes disturb them alike. CPU seconds are the thread's.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from subspec.config.enums import Proposer
from subspec.config.schema import (
    Config,
    DecodingConfig,
    EmbeddedTargetConfig,
    HqqConfig,
    NoDraftConfig,
    OffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.engine import Engine
from subspec.decoding.tree_policy import Beam
from subspec.session import assemble
from subspec.targets import Target
from subspec.targets.load import load_target

GSM8K, MT_BENCH = slice(740, 742), slice(36, 79, 21)


@dataclass
class Sums:
    """Of all prompts."""

    tokens: int = 0
    iterations: int = 0
    levels: int = 0
    passes: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    ids: list[int] | None = None


def prompts(data: Path) -> list[str]:
    """Questions of GSM8K, and first turns of MT-Bench."""
    rows = {name: (data / name).read_text().splitlines() for name in ("gsm8k_test.jsonl", "mt_bench.jsonl")}
    questions = [json.loads(row)["question"] for row in rows["gsm8k_test.jsonl"][GSM8K]]
    return questions + [json.loads(row)["turns"][0] for row in rows["mt_bench.jsonl"][MT_BENCH]]


def engine_of(target: Target, tree: str, draft: str) -> Engine:
    """The engine of a run with these settings."""
    depth, width = map(int, tree.split("x"))
    proposer, _, proposed = draft.partition(":")
    drafted = SubstituteDraftConfig(name="subspec", proposed=int(proposed or 32))
    if proposer != "plain":
        drafted.proposer = Proposer(proposer)
    config = Config(
        target=EmbeddedTargetConfig(name="smollm2_135m"),
        draft=NoDraftConfig(name="none") if proposer == "plain" else drafted,
        quant=HqqConfig(name="hqq"),
        decoding=DecodingConfig(name="greedy"),
        offload=OffloadConfig(name="none"),
    )
    return assemble(config, target, policy=Beam(depth, width)).engine


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--trees", default="6x1,6x4,16x4")
    parser.add_argument("--drafts", default="none,prompt_lookup,small_model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = load_target(EmbeddedTargetConfig(name="smollm2_135m"), torch.device("cpu"))
    found: dict[str, dict[str, Sums]] = {}
    for tree in options.trees.split(","):
        engines = {draft: engine_of(target, tree, draft) for draft in options.drafts.split(",")}
        sums = found[tree] = {draft: Sums(ids=[]) for draft in engines}
        for engine in engines.values():
            engine.generate([1, 2, 3], max_new_tokens=8)
        for prompt in prompts(options.data):
            ids = target.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for draft, engine in engines.items():
                started = time.thread_time()
                result = engine.generate(ids, max_new_tokens=options.tokens)
                own, stats = sums[draft], result.stats
                own.cpu += time.thread_time() - started
                own.tokens += stats.verified_tokens
                own.iterations += stats.iterations
                own.levels += sum(stats.drafted_by_depth)
                own.passes += stats.draft_passes
                own.seconds += stats.decode_s
                own.ids += result.token_ids
        first = next(iter(sums.values()))
        for draft, own in sums.items():
            print(
                f"{tree} {draft}: tau {own.tokens / own.iterations:.2f}, passes/token {own.passes / own.tokens:.3f}, "
                f"passes/levels {own.passes / max(own.levels, 1):.3f}, {own.tokens / own.seconds:.2f} tokens/s, "
                f"CPU {own.cpu:.1f} s ({first.cpu / own.cpu:.2f}), same text {own.ids == first.ids}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({t: {d: asdict(s) for d, s in own.items()} for t, own in found.items()}))


if __name__ == "__main__":
    main()
