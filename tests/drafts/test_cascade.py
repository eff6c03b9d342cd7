"""A proposer in front of the substitute: the same trees and texts in fewer passes."""

from functools import cache

import pytest
import torch

from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts import cascade
from subspec.drafts.cascade import SPARE, CascadeDraft, GuessPolicy
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.padded_levels import KnownLevels
from subspec.drafts.prompt_lookup import PromptLookupDraft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from tests.helpers.drafts import RandomDraft
from tests.helpers.eagle import SHAPES, random_head
from tests.helpers.taught import ALL_POLICIES, disturbed
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
PROMPT = [5, 17, 33, 99, 4, 8, 5, 17, 33]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=2)


@pytest.fixture(scope="module")
def substitute(model):
    """Often right about ``model``, but not always."""
    return disturbed(model, 0.02)


def own_cache(small, model, sizes):
    levels = SubstituteDraft(small, 1.0)
    vocab = model.config.vocab_size
    return SeparateCacheDraft(levels, levels.model, max_length=128, draft_rows=sizes.draft_rows, vocab_size=vocab)


PROPOSERS = {
    "index": lambda model, target, sizes: None,
    "lookup": lambda model, target, sizes: PromptLookupDraft(NgramIndex(3, 1), target.vocab_size),
    "relative": lambda model, target, sizes: own_cache(disturbed(model, 0.03, seed=5), model, sizes),
    "stranger": lambda model, target, sizes: own_cache(tiny_model("llama", layers=1, seed=3), model, sizes),
    "itself": lambda model, target, sizes: own_cache(share_parameters(model), model, sizes),
    "eagle": lambda model, target, sizes: EagleDraft(random_head(SHAPES["qwen2"]), target, sizes),
    "noise": lambda model, target, sizes: RandomDraft(target.vocab_size),
}


def engine_with(model, substitute, proposer, policy, *, proposed=16, sampling=None):
    target = TargetModel(model)
    draft = SubstituteDraft(share_parameters(substitute))
    if proposer is not None:
        sizes = GuessPolicy(policy, proposed)
        levels, built = KnownLevels(draft, sizes.draft_rows, CPU), PROPOSERS[proposer](model, target, sizes)
        draft = CascadeDraft(levels, draft.temperature, built, policy, proposed, target.vocab_size)
    return Engine(target, draft, policy, sampling=sampling, max_length=128, prefill_chunk=4)


def generated(engine, count=24):
    """A text, with the tokens, parents, scores and passes of every tree."""
    trees, learn = [], engine.policy.finish

    def finish(tree):
        learn(tree)
        own = (tree.tokens, tree.parents, tree.scores)
        trees.append((*(values[: tree.size].tolist() for values in own), engine.draft.passes(tree)))

    engine.policy.finish = finish
    return engine.generate(PROMPT, max_new_tokens=count, seed=3), trees


@pytest.fixture(scope="module")
def alone(model, substitute):
    """What the substitute generates without a proposer, once for each policy and way of sampling."""
    return cache(
        lambda policy, sampling: generated(
            engine_with(model, substitute, None, ALL_POLICIES[policy](), sampling=sampling)
        )
    )


@pytest.mark.parametrize(
    ("proposer", "policy", "sampled"),
    [(proposer, "beam", proposer == "relative") for proposer in PROPOSERS]
    + [("relative", policy, False) for policy in ALL_POLICIES if policy != "beam"]
    + [("index", policy, False) for policy in ALL_POLICIES if policy != "beam"]
    + [("index", policy, True) for policy in ALL_POLICIES],
)
def test_trees_and_texts_are_the_substitutes_own(model, substitute, alone, proposer, policy, sampled):
    sampling = Sampling(0.9, top_k=20) if sampled else Sampling()
    expected, own = alone(policy, sampling)
    found, trees = generated(engine_with(model, substitute, proposer, ALL_POLICIES[policy](), sampling=sampling))
    assert found.token_ids == expected.token_ids
    for (tokens, parents, scores, _), (own_tokens, own_parents, own_scores, _) in zip(trees, own, strict=True):
        assert (tokens, parents) == (own_tokens, own_parents)
        assert scores == pytest.approx(own_scores, abs=1e-3)
    passes, most = (result.stats.draft_passes for result in (found, expected))
    assert (passes, most) == (sum(tree[3] for tree in trees), sum(tree[3] for tree in own))
    assert passes <= most
    if proposer in ("relative", "itself"):
        assert passes < most


@pytest.mark.parametrize(
    ("seed", "policy", "proposed"), [(1, (3, 2), 1), (2, (5, 3), 7), (3, (4, 6), 64), (4, (1, 3), 8)]
)
def test_trees_are_the_same_for_random_models_and_sizes(seed, policy, proposed):
    model = tiny_model("llama", layers=1, seed=seed)
    substitute = disturbed(model, 0.05, seed=seed)
    expected, own = generated(engine_with(model, substitute, None, Beam(*policy)))
    found, trees = generated(engine_with(model, substitute, "relative", Beam(*policy), proposed=proposed))
    assert found.token_ids == expected.token_ids
    assert [tree[:2] for tree in trees] == [tree[:2] for tree in own]


@pytest.mark.parametrize(("proposed", "passes"), [(1, 3), (2, 2), (16, 1)])
def test_a_perfect_proposer_divides_the_passes(model, proposed, passes, monkeypatch):
    """Every pass scores the frontier of a chain of 6 levels and the nodes ahead of it."""
    monkeypatch.setattr(cascade, "INDEX_SHARE", 1e-9)
    _, trees = generated(engine_with(model, model, "itself", Beam(6, 1), proposed=proposed))
    assert {tree[3] for tree in trees[:-1]} == {passes}  # the last is cut by the length limit


def test_wrong_guesses_never_take_the_rows_that_the_tree_needs(model, substitute):
    expected, own = generated(engine_with(model, substitute, None, Beam(12, 3)))
    engine = engine_with(model, substitute, "noise", Beam(12, 3), proposed=4)
    most, run = [], engine.draft._run
    engine.draft._run = lambda *inputs: (run(*inputs), most.append(engine.draft.levels.levels.rows.used))
    found, trees = generated(engine)
    assert found.token_ids == expected.token_ids
    assert [tree[:2] for tree in trees] == [tree[:2] for tree in own]
    assert engine.cache.draft_rows == Beam(12, 3).draft_rows + SPARE * 8
    assert max(most) > Beam(12, 3).draft_rows  # some of the spare rows were used


def test_the_index_guesses_what_the_substitute_said_before(model, substitute):
    """Every tree of a text that repeats itself; the proposer knows nothing."""
    engine = engine_with(model, substitute, "stranger", Beam(4, 1))
    found, _ = generated(engine, 60)
    assert found.stats.draft_passes < sum(found.stats.drafted_by_depth) * 0.9
    index = engine.draft._index
    assert index.tail == tuple([*PROMPT, *found.token_ids][:-1][-len(index.tail) :])
