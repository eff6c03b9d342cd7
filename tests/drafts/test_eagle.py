"""Drafting with an EAGLE head: the text is the target's own, and the head's state is what it should be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.eagle import EagleDraft
from tests.helpers.drafts import OracleDraft, begin, engine_for, grow, hf_greedy
from tests.helpers.eagle import SHAPES, causal, drafted_paths, random_head
from tests.helpers.taught import POLICIES, PROMPT, draft_engine
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=3)


@settings(max_examples=8, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=20), min_size=1, max_size=3),
    chunk=st.integers(1, 24),
    depth=st.integers(1, 4),
    width=st.integers(1, 4),
    total=st.integers(2, 60),
    count=st.integers(1, 25),
    ends=st.booleans(),
)
def test_any_prompt_chunk_and_length_and_one_engine_for_many(model, prompts, chunk, depth, width, total, count, ends):
    """Prompts of one token, prompts longer than a chunk, texts that stop inside a block, one after another."""
    eos = (hf_greedy(model, prompts[0], count)[count // 2],) if ends else ()
    options = {"prefill_chunk": chunk, "eos_token_ids": eos, "max_length": 64}
    plain = engine_for(model, **options)
    engine = draft_engine(model, Eagle2(depth, width, total), **options)
    for prompt in prompts:
        expected = plain.generate(prompt, max_new_tokens=count)
        got = engine.generate(prompt, max_new_tokens=count)
        assert (got.token_ids, got.finish_reason) == (expected.token_ids, expected.finish_reason)


# --------------------------------------------------------------------------------------- the head's state


def true_features(model, text):
    with torch.no_grad():
        return model.model(torch.tensor([text])).last_hidden_state[0]


def reference_cache(model, draft, text):
    """Keys and values of one causal pass of the head over ``text`` with the target's own features."""
    layer = draft.head.layers[0]
    embeddings = model.get_input_embeddings()(torch.tensor(text[1:]))
    x = draft.head.fc(torch.cat([embeddings, true_features(model, text)[:-1]], dim=-1))
    tables = draft.head.rotary(x, torch.arange(len(text) - 1)[None])
    _, key, value = layer.self_attn.project(x[None], *tables)
    return key[0], value[0]


@pytest.mark.parametrize(("policy", "shape"), [("beam", "qwen2"), *(("eagle2", shape) for shape in SHAPES)])
def test_after_many_iterations_the_heads_rows_are_those_of_one_pass_with_true_features(model, policy, shape):
    future = PROMPT + hf_greedy(model, PROMPT, 52)
    engine = draft_engine(model, POLICIES[policy](), shape, future=future)
    for prompt in (PROMPT, PROMPT[3:5], PROMPT[:1]):
        result = engine.generate(prompt, max_new_tokens=33)
        draft, length = engine.draft, engine.cache.length
        text = (prompt + result.token_ids)[:length]
        assert draft.cache.length == length - 1
        key, value = reference_cache(model, draft, text)
        start = draft.cache.draft_rows
        rows = draft.cache.rows[0, :, :, start : start + length - 1]
        torch.testing.assert_close(rows[0], key, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rows[1], value, rtol=1e-3, atol=1e-4)
        waiting = true_features(model, text)[-1:]
        torch.testing.assert_close(draft._pending, waiting, rtol=1e-3, atol=1e-4)
    assert result.stats.iterations > 3


def branch_logits(model, draft, text, branch):
    """A node's logits, its branch drafted alone: each token is paired with what the head predicted one step before."""
    embed = model.get_input_embeddings()
    features = list(true_features(model, text))
    for count in range(1, len(branch) + 1):
        tokens = torch.tensor((text + branch[:count])[1:])
        predicted = causal(draft.head, embed(tokens)[None], torch.stack(features)[None])[0, -1]
        features.append(predicted)
    return model.lm_head(features[-1])


@pytest.mark.parametrize(
    ("policy", "shape"),
    [*((policy, "qwen2") for policy in POLICIES), *(("eagle2", shape) for shape in SHAPES if shape != "qwen2")],
)
def test_every_level_is_fed_its_own_parents_features(model, policy, shape):
    """Each node's logits against its branch from scratch, before and after tokens were accepted."""
    # A head that amplifies less: rounding errors grow with every feature that is made of the last one.
    engine = draft_engine(model, POLICIES[policy](), shape, future=PROMPT + hf_greedy(model, PROMPT, 42), std=0.08)
    with torch.inference_mode():
        for text, paths in drafted_paths(engine, PROMPT):
            for path, logits in paths[:: max(1, len(paths) // 9)]:
                expected = branch_logits(model, engine.draft, text, list(path))
                torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)
    assert len(text) > len(PROMPT) + 3 + 1  # more than the three roots and one accepted node


def test_drafting_the_same_tree_twice_gives_the_same_tree(model):
    engine = draft_engine(model, Eagle2(4, 3, 15))
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        first = engine.tree.tokens[: engine.tree.size].clone()
        grow(engine, root, 10)
        assert torch.equal(engine.tree.tokens[: engine.tree.size], first)


def test_a_longer_context_takes_a_new_cache(model):
    policy = Beam(3, 2)
    decoder = TargetModel(model)
    draft = EagleDraft(random_head(SHAPES["qwen2"]), decoder, policy)
    for length in (40, 64):
        engine = Engine(decoder, draft, policy, max_length=length)
        assert engine.generate(PROMPT).token_ids == hf_greedy(model, PROMPT, length - len(PROMPT))
        assert draft.cache.max_length == length


def test_a_perfect_draft_is_accepted_whole_through_the_re_ranking(model):
    reference = hf_greedy(model, PROMPT, 40)
    draft = OracleDraft(320, reference)
    engine = Engine(TargetModel(model), draft, Eagle2(7, 3, 12), max_length=256, prefill_chunk=4)
    result = engine.generate(PROMPT, max_new_tokens=1 + 3 * 8)
    assert result.token_ids == reference[:25]
    assert result.stats.iterations == 3
    assert result.stats.accepted_by_depth == [3] * 7
