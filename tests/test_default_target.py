"""The real default model, in float32 on the CPU: no draft, tree or number of bits changes a token."""

import json
from pathlib import Path

import pytest
import torch

from subspec.benchmarks import load_benchmark
from subspec.config.schema import BenchmarkConfig, Source
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft
from tests.helpers.cli import cli, records_of, summary_of
from tests.helpers.drafts import substitute_of

pytestmark = pytest.mark.slow

TOKENS = 128
MIXED = ["gsm8k", "mt_bench", "human_eval", "alpaca", "cnn_dm", "aime", "gpqa", "math_500", "livecodebench"]
MIXED += ["alpaca"]


@pytest.fixture(scope="module")
def prompts(default_target):
    """Ten prompts of mixed benchmarks, from the packaged samples."""
    ids = []
    for place, name in enumerate(MIXED):
        config = BenchmarkConfig(name=name, source=Source.sample, max_samples=2)
        samples = load_benchmark(config, seed=0).samples
        question = samples[place // len(set(MIXED))].turns[0]
        ids.append(default_target.chat_ids([{"role": "user", "content": question}]))
    return ids


def engine(target, policy=None, bits=4):
    draft = SubstituteDraft(substitute_of(target.model, bits=bits, group_size=64)) if policy is not None else None
    options = {"eos_token_ids": target.eos_token_ids, "tokenizer": target.tokenizer}
    return Engine(TargetModel(target.model), draft, policy, **options)


@pytest.fixture(scope="module")
def plain(default_target, prompts):
    return [engine(default_target).generate(p, max_new_tokens=TOKENS).token_ids for p in prompts]


def test_plain_decoding_is_transformers_own(default_target, prompts, plain):
    for prompt, ours in zip(prompts[:3], plain[:3], strict=True):
        output = default_target.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, do_sample=False
        )
        assert output[0, len(prompt) :].tolist() == ours


CASES = {
    "chain-4bit": (lambda: Beam(8, 1), 4, 4.0),
    "beam-4bit": (lambda: Beam(16, 4), 4, 5.0),
    "adaptive-4bit": (lambda: Adaptive(32, 4, level_cost=0.1, check_every=2, min_depth=1), 4, 3.0),
    "beam-3bit": (lambda: Beam(4, 4), 3, 1.2),
    "beam-2bit": (lambda: Beam(1, 4), 2, 0.9),
}


@pytest.mark.parametrize("case", CASES)
def test_no_token_changes_on_ten_mixed_prompts(default_target, prompts, plain, case):
    policy, bits, least_tau = CASES[case]
    drafting = engine(default_target, policy(), bits)
    auditor = Auditor(TargetModel(default_target.model))
    tokens = passes = 0
    for prompt, expected in zip(prompts, plain, strict=True):
        result = drafting.generate(prompt, max_new_tokens=TOKENS)
        assert result.token_ids == expected
        assert auditor.audit(prompt, result.token_ids).mismatch == 0
        tokens += result.stats.verified_tokens
        passes += result.stats.iterations
    print(f"\n{case}: tau {tokens / passes:.2f} over {len(prompts)} prompts")
    assert tokens / passes > least_tau


def test_real_gsm8k_rows_when_they_are_at_hand(default_target):
    file = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
    if not file.exists():
        pytest.skip("no shared data beside the checkout")
    question = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["question"]
    prompt = default_target.chat_ids([{"role": "user", "content": question}])
    expected = engine(default_target).generate(prompt, max_new_tokens=64).token_ids
    assert engine(default_target, Beam(16, 4)).generate(prompt, max_new_tokens=64).token_ids == expected


# ------------------------------------------------------------------------------------------ whole runs, every draft


def run(folder, *overrides):
    """Two packaged prompts x 48 tokens from the command line."""
    ran = cli(
        *["device=cpu", "logger=none", "warmup=0", "benchmark=alpaca", "benchmark.source=sample"],
        *["benchmark.max_samples=2", "decoding.max_new_tokens=48", *overrides, f"run_dir={folder}"],
    )
    assert ran.code == 0, ran.err
    return [record["token_ids"] for record in records_of(folder)], summary_of(folder)


@pytest.fixture(scope="module")
def plainly(default_target, tmp_path_factory):
    """Plain decoding's tokens, greedy and sampled."""
    root = tmp_path_factory.mktemp("plain")
    return {
        decoding: run(root / decoding, "draft=none", f"decoding={decoding}")[0] for decoding in ("greedy", "sampling")
    }


SHALLOW = ["tree=beam", "tree.depth=6", "tree.width=4"]
DRAFTS = {
    "hqq": (["draft=subspec", "quant=hqq", *SHALLOW], 3.0),
    "higgs": (["draft=subspec", "quant=higgs", *SHALLOW], 2.5),
    "eagle2": (["draft=eagle2", "tree=eagle2"], 1.8),
    "eagle2 beam": (["draft=eagle2", *SHALLOW], 1.5),
    "eagle3": (["draft=eagle3", "tree=eagle2"], 1.5),
    "block_head": (["draft=block_head", "tree=eagle2", "tree.depth=7"], 1.3),
    "small_model": (["draft=small_model", *SHALLOW], 1.5),
    "small_model adaptive": (["draft=small_model", "tree=adaptive", "tree.depth=8"], 1.3),
    "layer_skip": (["draft=layer_skip", "tree=chain", "tree.depth=2"], 1.0),
}
"""What is set, and a tau that a draft which has come apart would not reach."""


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
@pytest.mark.parametrize("name", DRAFTS)
def test_every_draft_passes_the_audit_and_emits_what_plain_decoding_does(tmp_path, plainly, name, decoding):
    overrides, least_tau = DRAFTS[name]
    texts, summary = run(tmp_path / "run", *overrides, f"decoding={decoding}", "audit=true")
    assert texts == plainly[decoding]
    assert summary["audit"]["mismatch"] == 0
    assert summary["audit"]["exact"] + summary["audit"]["near_tie"] == sum(map(len, texts))
    tau = summary["totals"]["tau"]
    print(f"\n{name}, {decoding}: tau {tau:.2f}")
    assert tau >= least_tau


@pytest.mark.parametrize("draft", ["eagle2", "eagle3", "block_head", "small_model"])
def test_the_drafts_that_ship_need_no_further_settings(tmp_path, plainly, draft):
    texts, summary = run(tmp_path / "run", f"draft={draft}")
    assert texts == plainly["greedy"]
    facts = summary["run"]["draft"]
    assert facts.get("head", facts.get("source")).startswith("shipped with subspec (sha256 ")
