"""A draft with a cache of its own: same text, nothing accepted is computed twice, its cache is what it says."""

import pytest
import torch

from subspec.decoding.draft import fit_vocabulary
from subspec.decoding.engine import Engine
from subspec.decoding.result import FinishReason
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts import separate_cache
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from tests.helpers.drafts import hf_greedy
from tests.helpers.taught import ALL_POLICIES, PROMPT, disturbed
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=3)


@pytest.fixture(scope="module")
def relative(model):
    """A model that agrees with ``model`` often, but not always: its weights with noise on them."""
    return disturbed(model, 0.02)


@pytest.fixture(scope="module")
def reference(model):
    return hf_greedy(model, PROMPT, 60)


def engine_with(model, small, policy, *, sampling=None, **options):
    """An engine with the small model ``small`` (None: plain decoding)."""
    options = {"max_length": 256, "prefill_chunk": 16, **options}
    if small is None:
        return Engine(TargetModel(model), sampling=sampling, **options)
    levels = SubstituteDraft(small, 1.0)
    draft = SeparateCacheDraft(
        levels,
        levels.model,
        max_length=options["max_length"],
        draft_rows=policy.draft_rows,
        vocab_size=model.config.vocab_size,
    )
    return Engine(TargetModel(model), draft, policy, sampling=sampling, **options)


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_greedy_text_is_transformers_own_for_every_tree(model, relative, reference, policy):
    result = engine_with(model, relative, ALL_POLICIES[policy](), prefill_chunk=4).generate(PROMPT, max_new_tokens=40)
    assert result.token_ids == reference[:40]
    assert result.stats.iterations < 36  # something was accepted


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_text_is_transformers_own_for_every_family(model, reference, family):
    small = tiny_model(family, layers=1, seed=3)  # knows nothing of the target
    engine = engine_with(model, small, Beam(3, 3))
    assert engine.generate(PROMPT, max_new_tokens=20).token_ids == reference[:20]


@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_the_cache_is_what_a_run_from_scratch_computes(model, relative, policy):
    engine = engine_with(model, relative, ALL_POLICIES[policy]())
    result = engine.generate(PROMPT, max_new_tokens=30)
    assert result.stats.iterations < 28
    cache = engine.draft.cache
    assert cache.length == engine.cache.length
    decoder = TargetModel(relative)
    fresh = decoder.new_cache(max_length=256, draft_rows=0, target_rows=256)
    with torch.inference_mode():
        decoder.append(torch.tensor((PROMPT + result.token_ids)[: cache.length]), fresh)
    ours = cache.rows[:, :, :, cache.draft_rows :][:, :, :, : cache.length]
    torch.testing.assert_close(ours, fresh.rows[:, :, :, : cache.length], rtol=1e-4, atol=1e-4)


class RowCount:
    """Counts the tokens that a decoder is run on, and those that a level is run on."""

    def __init__(self, draft, monkeypatch):
        self.rows = self.level_rows = 0
        forward, expand = draft.model.forward, draft.levels.expand

        def counted(batch, **options):
            self.rows += batch.tokens.numel()
            return forward(batch, **options)

        def counted_level(tree, frontier):
            self.level_rows += frontier.numel()
            return expand(tree, frontier)

        monkeypatch.setattr(draft.model, "forward", counted)
        monkeypatch.setattr(draft.levels, "expand", counted_level)


@pytest.mark.parametrize("policy", ["chain", "beam", "adaptive"])
def test_what_was_accepted_is_not_computed_again(model, relative, policy, monkeypatch):
    engine = engine_with(model, relative, ALL_POLICIES[policy]())
    count = RowCount(engine.draft, monkeypatch)
    deepest = []
    commit = engine.draft.commit

    def remember(tree, path, features):
        deepest.append(path.numel() - 1 == tree.levels)
        commit(tree, path, features)

    monkeypatch.setattr(engine.draft, "commit", remember)
    result = engine.generate(PROMPT, max_new_tokens=40)
    assert 0 < sum(deepest) < len(deepest) == result.stats.iterations
    # The prompt once, every node of a level once, and only an accepted node of the deepest level besides.
    assert count.rows == len(PROMPT) + count.level_rows + sum(deepest)


def test_a_perfect_draft_is_accepted_whole(model, reference):
    engine = engine_with(model, model, Beam(7, 1), prefill_chunk=4)
    result = engine.generate(PROMPT, max_new_tokens=1 + 3 * 8)
    assert result.token_ids == reference[:25]
    assert result.stats.iterations == 3
    assert result.stats.accepted_by_depth == [3] * 7


@pytest.mark.parametrize("rows", [1, 5, 256])
def test_prompts_longer_than_a_chunk_of_either_model(model, relative, rows, monkeypatch):
    monkeypatch.setattr(separate_cache, "PROMPT_ROWS", rows)
    prompt = [(7 * i + 3) % 320 for i in range(53)]
    engine = engine_with(model, relative, Beam(5, 3), prefill_chunk=12)
    assert engine.draft.cache.target_rows == rows
    assert engine.generate(prompt, max_new_tokens=20).token_ids == hf_greedy(model, prompt, 20)


def test_many_prompts_in_a_row_with_ends_in_the_middle_of_a_block(model, relative, reference):
    engine = engine_with(model, relative, Beam(6, 3))
    for end in (reference[0], reference[7], reference[20]):
        engine.eos_token_ids = (319, end)
        result = engine.generate(PROMPT, max_new_tokens=60)
        assert result.token_ids == reference[: reference.index(end) + 1]
        assert result.finish_reason is FinishReason.eos
    engine.eos_token_ids = ()
    for prompt in (PROMPT[3:], PROMPT[::-1]):
        expected = hf_greedy(model, prompt, 23)
        for count in (1, 2, 7, 23):
            assert engine.generate(prompt, max_new_tokens=count).token_ids == expected[:count]


def test_a_text_may_fill_the_cache_to_its_end(model, relative):
    engine = engine_with(model, relative, Beam(6, 3), max_length=48)
    result = engine.generate(PROMPT)
    assert result.token_ids == hf_greedy(model, PROMPT, 48 - len(PROMPT))
    assert result.finish_reason is FinishReason.length


@pytest.mark.parametrize("policy", ["beam", "partial", "eagle2"])
def test_samples_are_those_of_plain_decoding(model, relative, policy):
    sampling = Sampling(0.8, 20, 0.9)
    plain = engine_with(model, None, None, sampling=sampling)
    engine = engine_with(model, relative, ALL_POLICIES[policy](), sampling=sampling)
    for seed in range(2):
        expected = plain.generate(PROMPT, max_new_tokens=25, seed=seed)
        result = engine.generate(PROMPT, max_new_tokens=25, seed=seed)
        assert result.token_ids == expected.token_ids
        assert result.stats.iterations < expected.stats.iterations


def test_logits_are_padded_to_the_targets_vocabulary():
    logits = torch.randn(2, 5)
    padded = fit_vocabulary(logits, 7)
    assert torch.equal(padded[:, :5], logits)
    assert (padded[:, 5:] == -torch.inf).all()
    assert fit_vocabulary(logits, 5) is logits
