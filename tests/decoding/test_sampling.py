import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from subspec.decoding import text_loop
from subspec.decoding.sampling import PositionNoise, Sampler, Sampling, keep_mask
from subspec.decoding.tree_policy import Beam
from subspec.decoding.verify import verify
from subspec.errors import ConfigError
from tests.helpers.drafts import RandomDraft, engine_for
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")


@given(
    seed=st.integers(0, 2**31), top_k=st.integers(0, 12), top_p=st.floats(0.05, 1.0), scale=st.sampled_from([0.5, 2, 6])
)
def test_filters_match_transformers(seed, top_k, top_p, scale):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)) * scale
    expected = logits.clone()
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    keep = keep_mask(logits, Sampling(1.0, top_k, top_p))
    # Whether the token whose cumulative probability equals top_p to the last bit stays is rounding.
    probs = logits.masked_fill(~keep_mask(logits, Sampling(1.0, top_k)), -torch.inf).softmax(-1)
    ordered, order = probs.sort(descending=True)
    on_edge = torch.zeros_like(keep).scatter(-1, order, ((ordered.cumsum(-1) - ordered) - top_p).abs() < 1e-5)
    assert torch.equal(keep | on_edge, expected.isfinite() | on_edge)


@given(seed=st.integers(0, 2**31), slack=st.floats(1e-4, 0.5))
def test_slack_widens_and_narrows_the_filters(seed, slack):
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) * 2
    for sampling in (Sampling(1.0, 4, 1.0), Sampling(1.0, 0, 0.7), Sampling(1.0, 6, 0.8)):
        narrow, exact, wide = (keep_mask(logits, sampling, s) for s in (-slack, 0.0, slack))
        assert not (narrow & ~exact).any()
        assert not (exact & ~wide).any()


def test_noise_depends_on_seed_and_position_only():
    noise = PositionNoise(50, CPU)
    noise.reseed(1)
    rows = noise.rows(10, 3).clone()
    noise.reseed(1)
    assert torch.equal(noise.rows(12, 1)[0], rows[2])  # asked for in another order
    assert torch.equal(noise.rows(10, 1)[0], rows[0])
    noise.forget_before(12)
    assert torch.equal(noise.rows(10, 1)[0], rows[0])  # made again
    noise.reseed(2)
    assert not torch.equal(noise.rows(10, 1)[0], rows[0])


def test_noise_is_gumbel():
    noise = PositionNoise(200_000, CPU)
    noise.reseed(3)
    row = noise.rows(0, 1)[0].double()
    assert row.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert row.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, 1e-9, NAN, INF, -INF, True, "0.7", None, torch.tensor(0.7))),
        *(("top_k", value) for value in (-1, 2.0, NAN, True, "5", None)),
        *(("top_p", value) for value in (0, 0.0, -0.1, 1.5, NAN, INF, True, "0.9", None)),
    ],
)
def test_sampling_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}=") as refused:
        Sampling(**{"temperature": 1.0, name: value})
    assert isinstance(refused.value, ConfigError)


def test_sampling_takes_numbers_of_every_kind():
    assert Sampling(1, np.int64(5), 1).top_k == 5
    assert Sampling(np.float32(0.5)).temperature == 0.5
    assert Sampling(0).greedy
    assert Sampling(-0.0).greedy


# ------------------------------------------------------------- speculative sampling has the target's distribution

VOCAB, LENGTH, DRAWS = 4, 3, 400
PROMPT = [1, 3, 2]


@pytest.fixture(scope="module")
def small():
    return tiny_model("llama", vocab_size=VOCAB, hidden_size=32, layers=1, std=0.35)


def exact_distribution(model, sampling):
    """Probability of every text of LENGTH tokens, by enumerating the plain model."""
    probabilities = {}
    sampler = Sampler(sampling, VOCAB, CPU)
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        ids = torch.tensor([PROMPT + list(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, len(PROMPT) - 1 : -1]
        scores = sampler.scores(logits, torch.zeros_like(logits))
        chosen = scores.softmax(-1).gather(1, torch.tensor(text)[:, None])
        probabilities[text] = float(chosen.prod())
    return probabilities


def p_value(engine, expected, draws=DRAWS):
    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        counts[tuple(engine.generate(PROMPT, max_new_tokens=LENGTH, seed=seed).token_ids)] += 1
    never = sum(counts[text] for text, p in expected.items() if p == 0)
    if never:
        return 0.0
    # Cells too rare for the chi-square approximation are pooled.
    cells = [(counts[text], p * draws) for text, p in expected.items() if p > 0]
    common = [cell for cell in cells if cell[1] >= 8]
    rare = [cell for cell in cells if cell[1] < 8]
    if rare:
        common.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    chi_square = sum((observed - predicted) ** 2 / predicted for observed, predicted in common)
    half = torch.tensor([(len(common) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


SAMPLINGS = [Sampling(1.0), Sampling(0.7, 3, 0.9)]


@pytest.mark.parametrize(("draft", "sampling"), zip(["random", "substitute"], SAMPLINGS, strict=True))
def test_speculative_sampling_has_the_targets_distribution(small, sampling, draft):
    engine = engine_for(small, Beam(2, 2), sampling=sampling)
    if draft == "random":
        engine.draft = RandomDraft(VOCAB)
    # 0.001: two such tests with fixed seeds; a broken verifier is off by many orders of magnitude (below).
    assert p_value(engine, exact_distribution(small, sampling)) > 1e-3


def accept_everything(tree, chosen, levels, finite):
    """A verifier that emits whatever was drafted."""
    forced = chosen.clone()
    forced[tree.parents[1 : tree.size]] = tree.tokens[1 : tree.size]
    return verify(tree, forced, levels, finite)


def fresh_noise_everywhere(tree, chosen, levels, finite):
    """A verifier that prefers drafted children: it resamples when the first sample was not drafted."""
    second = chosen.roll(1)
    drafted = (tree.tokens[: tree.size][None] == chosen[:, None]).any(1)
    return verify(tree, torch.where(drafted, chosen, second), levels, finite)


@pytest.mark.parametrize("broken", [accept_everything, fresh_noise_everywhere])
def test_the_distribution_test_fails_when_the_verifier_is_broken(small, monkeypatch, broken):
    def of_trees(tree, chosen, levels, finite):
        return (broken if levels else verify)(tree, chosen, levels, finite)  # not of prompts

    monkeypatch.setattr(text_loop, "verify", of_trees)
    engine = engine_for(small, Beam(2, 2), sampling=SAMPLINGS[0])
    engine.draft = RandomDraft(VOCAB)
    assert p_value(engine, exact_distribution(small, SAMPLINGS[0]), draws=DRAWS // 2) < 1e-6


def test_the_draft_predicts_samples_when_it_ranks_with_the_targets_noise(monkeypatch):
    """The shared noise is what makes speculative sampling fast; without it the draft guesses."""
    model = tiny_model("llama", layers=2)
    engine = engine_for(model, Beam(6, 2), sampling=Sampling(1.0))
    with_noise = engine.generate([5, 9, 2], max_new_tokens=60, seed=1).stats.iterations
    monkeypatch.setattr(engine.sampler, "perturb", lambda logits, position: logits)
    without = engine.generate([5, 9, 2], max_new_tokens=60, seed=1).stats.iterations
    assert with_noise < without / 2
