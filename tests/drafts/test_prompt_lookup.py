"""Drafts from n-grams of the text: their probabilities, and runs that emit plain decoding's tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspec.config.schema import Config, Eagle2TreeConfig, PromptLookupDraftConfig
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.drafts.check_config import check_config
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.prompt_lookup import PromptLookupDraft, PromptLookupSpec
from subspec.errors import ConfigError
from tests.helpers.planning import planned, settings
from tests.helpers.tiny import tiny_model

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3)


def indexed(texts, longest, shortest=1):
    index = NgramIndex(longest, shortest)
    for text in texts:
        index.end_text()
        index.add(text[:5])  # in two pieces
        index.add(text[5:])
    return index


def defined(texts, context, longest, shortest):
    """Prediction by partial matching, method C, counted anew for every question."""
    found, left = {}, 1.0
    for length in range(min(longest, len(context)), shortest - 1, -1):
        end = tuple(context[len(context) - length :])
        followers = [text[i] for text in texts for i in range(length, len(text)) if tuple(text[i - length : i]) == end]
        if followers:
            kinds = set(followers)
            for token in kinds:
                share = followers.count(token) / (len(followers) + len(kinds))
                found[token] = found.get(token, 0.0) + left * share
            left *= len(kinds) / (len(followers) + len(kinds))
    return found


@given(TEXTS, st.lists(st.integers(0, 3), max_size=5), st.integers(1, 4), st.integers(1, 2))
def test_probabilities_are_those_of_partial_matching(texts, context, longest, shortest):
    shortest = min(shortest, longest)
    found = indexed(texts, longest, shortest).candidates(context, 9)
    assert found == pytest.approx(defined(texts, context, longest, shortest))
    assert sum(found.values()) < 1
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_likeliest_come_first_and_texts_do_not_run_into_each_other():
    index = indexed([[1, 2, 3, 1, 2, 3, 1, 2, 4], [7, 1]], longest=2)
    assert list(index.candidates([1, 2], 1)) == [3]
    assert set(index.candidates([1, 2], 5)) == {3, 4}
    assert index.candidates([4], 5) == {}  # 7 began another text
    assert index.tail == (7, 1)


def drafted(draft, text, policy):
    draft.begin(None)
    draft.observe(torch.tensor(text[:-1]), None)
    tree = Tree(policy.capacity, torch.device("cpu"))
    frontier = tree.plant(torch.tensor(text[-1:]))
    while frontier.numel() and policy.wants_level(tree):
        frontier = draft.extend(tree, frontier, policy)
    return tree


def test_a_repeated_phrase_is_drafted_and_nothing_where_nothing_repeats():
    draft = PromptLookupDraft(NgramIndex(3, 2), vocab_size=50)
    tree = drafted(draft, [10, 11, 12, 13, 14, 15, 10, 11], Beam(16, 4))
    # Behind the second "10 11" the phrase goes on, again and again.
    assert tree.tokens[: tree.size].tolist() == [11, *[12, 13, 14, 15, 10, 11] * 3][: tree.size]
    assert tree.size == 17
    nothing = drafted(draft, [1, 2, 3, 4], Beam(16, 4))
    assert (nothing.size, nothing.levels) == (1, 0)


def test_a_level_has_only_tokens_that_followed():
    draft = PromptLookupDraft(NgramIndex(2, 1), vocab_size=50)
    tree = drafted(draft, [5, 6, 5, 7, 5], Beam(1, 4))
    assert sorted(tree.tokens[1 : tree.size].tolist()) == [6, 7]
    assert tree.scores[1:3].exp().sum() < 1


@pytest.mark.parametrize(("sampling", "earlier"), [(Sampling(), True), (Sampling(0.7, top_k=8), False)])
def test_text_is_plain_decodings_with_fewer_passes(sampling, earlier):
    target, prompts = TargetModel(tiny_model("llama", vocab_size=64)), [[3, 4, 5, 3, 4, 5, 3], [7, 7, 7]]
    plain = Engine(target, sampling=sampling, max_length=128)
    expected = [plain.generate(prompt, max_new_tokens=60, seed=seed) for seed, prompt in enumerate(prompts)]
    adaptive = Adaptive(6, 3, level_cost=0.1, check_every=2, min_depth=1)
    for policy in (Beam(6, 1), Beam(5, 3), Eagle2(4, 3, 10), adaptive):
        draft = PromptLookupDraft(NgramIndex(3, 1), 64, earlier_texts=earlier)
        lookup = Engine(target, draft, policy, sampling=sampling, max_length=128)
        for seed in (0, 1, 0, 1) if earlier else (0, 1):
            ours, theirs = lookup.generate(prompts[seed], max_new_tokens=60, seed=seed), expected[seed]
            assert ours.token_ids == theirs.token_ids
            assert ours.stats.iterations < theirs.stats.iterations
        if earlier:  # the last text was an earlier one
            assert ours.stats.iterations < 30


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (3, 0)])
def test_lengths_out_of_order_are_refused(longest, shortest):
    config = Config(draft=PromptLookupDraftConfig(name="prompt_lookup", longest=longest, shortest=shortest))
    with pytest.raises(ConfigError, match=r"^draft\.shortest=. and draft\.longest="):
        PromptLookupSpec.check(config)


def test_a_streamed_target_takes_any_tree():
    """It drafts without captured levels, so a tree may expand parts of one."""
    tree = Eagle2TreeConfig(name="eagle2", depth=4, width=3, total_tokens=20)
    config = replace(settings(8.0, "prompt_lookup"), tree=tree)
    check_config(config)
    assert planned(config).streamed_layers
