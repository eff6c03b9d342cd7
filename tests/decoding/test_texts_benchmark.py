"""The benchmark of texts side by side, on a tiny target."""

import importlib
from pathlib import Path

import pytest
import torch

from subspec.decoding.tree_policy import Beam
from tests.helpers.drafts import engine_for
from tests.helpers.tiny import tiny_model


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return importlib.import_module("texts_benchmark")


def test_its_figures_are_of_all_texts(benchmark):
    engine = engine_for(tiny_model("qwen2", layers=1), Beam(3, 2), max_length=128)
    prompts = [[n + 1, 5, 9] for n in range(3)]
    figures, texts = benchmark.together(engine, prompts, 24)
    assert [len(text.result.token_ids) for text in texts] == [24] * 3
    assert figures["tokens_per_s"] > 0
    assert 1 <= figures["tau"] <= 4
    assert 0 < figures["beside"] <= 2
    assert benchmark.same_alone(engine, texts) == {"same_tokens": 3, "same_bits": 0, "compared": 3}
    joined = benchmark.joining(engine, prompts, [7] * 100, 60)
    assert joined["prompt"] == 100
    assert joined["passes_beside"] == 7  # pieces of 16 tokens
    assert joined["slow_down"] > 0
    assert not engine.running
