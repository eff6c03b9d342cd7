import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec import build_engine, generate
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.engine import Engine
from subspec.decoding.result import FinishReason
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.errors import SubspecError
from tests.helpers.drafts import OracleDraft, RandomDraft, engine_for, hf_greedy
from tests.helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPT = [5, 17, 33, 99, 4, 8, 77, 120, 6]
POLICIES = {
    "chain": lambda: Beam(6, 1),
    "beam": lambda: Beam(5, 4),
    "adaptive": lambda: Adaptive(10, 3, level_cost=0.05, check_every=2, min_depth=1),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=3)


@pytest.fixture(scope="module")
def reference(model):
    return hf_greedy(model, PROMPT, 60)


@pytest.mark.parametrize(
    ("family", "policy"),
    [*((family, "beam") for family in FAMILIES), ("qwen2", "chain"), ("qwen2", "adaptive")],
)
def test_greedy_text_is_transformers_own_for_every_family_and_tree(family, policy):
    model = tiny_model(family, layers=3)
    result = engine_for(model, POLICIES[policy](), prefill_chunk=4).generate(PROMPT, max_new_tokens=50)
    assert result.token_ids == hf_greedy(model, PROMPT, 50)
    assert result.stats.iterations < 49  # something was accepted


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_greedy_text_does_not_depend_on_the_substitutes_bits(model, reference, bits):
    result = engine_for(model, Beam(5, 3), bits=bits).generate(PROMPT, max_new_tokens=60)
    assert result.token_ids == reference


def test_plain_decoding_takes_one_pass_per_token(model, reference):
    result = engine_for(model).generate(PROMPT, max_new_tokens=60)
    assert result.token_ids == reference
    assert result.stats.iterations == 59
    assert result.stats.verified_tokens == 59
    assert result.stats.drafted_nodes == 0


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 319), min_size=1, max_size=20),
    chunk=st.integers(1, 24),
    depth=st.integers(1, 6),
    width=st.integers(1, 4),
    count=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_any_draft_yields_the_plain_text(model, prompt, chunk, depth, width, count, seed):
    plain = engine_for(model).generate(prompt, max_new_tokens=count).token_ids
    for draft in (RandomDraft(320, seed), None):
        engine = engine_for(model, Beam(depth, width), prefill_chunk=chunk)
        engine.draft = draft or engine.draft
        assert engine.generate(prompt, max_new_tokens=count).token_ids == plain


def test_a_perfect_draft_is_accepted_whole_and_sees_every_feature(model, reference):
    draft = OracleDraft(320, reference)
    engine = Engine(TargetModel(model), draft, Beam(7, 2), max_length=256, prefill_chunk=4)
    result = engine.generate(PROMPT, max_new_tokens=1 + 3 * 8)
    assert result.token_ids == reference[:25]
    assert result.stats.iterations == 3
    assert result.stats.accepted_by_depth == [3] * 7
    with torch.no_grad():
        base = model.model(torch.tensor([PROMPT + reference[:24]])).last_hidden_state[0]
    torch.testing.assert_close(torch.cat(draft.features), base, rtol=1e-3, atol=1e-4)


def test_committed_rows_are_the_targets_exact_keys_and_values(model):
    engine = engine_for(model, Beam(5, 3))
    result = engine.generate(PROMPT, max_new_tokens=40)
    length = engine.cache.length
    text = (PROMPT + result.token_ids)[:length]
    fresh = engine_for(model, max_length=512, prefill_chunk=512)
    fresh.generate(text, max_new_tokens=1)
    ours = engine.cache.rows[:, :, :, engine.cache.draft_rows :][:, :, :, :length]
    torch.testing.assert_close(ours, fresh.cache.rows[:, :, :, :length], rtol=1e-4, atol=1e-4)


def test_the_last_tree_is_no_deeper_than_the_tokens_still_wanted(model, reference):
    result = engine_for(model, Beam(5, 1)).generate(PROMPT, max_new_tokens=2)
    assert result.token_ids == reference[:2]
    assert result.stats.drafted_nodes == 0  # one token missing: the root's own pass yields it


# ------------------------------------------------------------------------------------------ what ends a text


@pytest.mark.parametrize("policy", [None, Beam(6, 3)], ids=["plain", "beam"])
def test_any_eos_ends_the_text_and_is_its_last_token(model, reference, policy):
    for end in (reference[0], reference[7], reference[20]):
        first = reference.index(end)
        result = engine_for(model, policy, eos_token_ids=(319, end)).generate(PROMPT, max_new_tokens=60)
        assert result.token_ids == reference[: first + 1]
        assert result.finish_reason is FinishReason.eos
    engine = engine_for(model, policy, eos_token_ids=(reference[3],))
    assert engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True).token_ids == reference[:30]


@pytest.mark.parametrize("count", [1, 2, 7, 33])
def test_length_is_exact(model, reference, count):
    result = engine_for(model, Beam(6, 3)).generate(PROMPT, max_new_tokens=count)
    assert result.token_ids == reference[:count]
    assert result.finish_reason is FinishReason.length


def test_max_length_bounds_prompt_and_answer_together(model, reference):
    engine = engine_for(model, Beam(6, 3), max_length=len(PROMPT) + 21)
    result = engine.generate(PROMPT, max_new_tokens=None)
    assert result.token_ids == reference[:21]
    assert engine.generate(PROMPT, max_new_tokens=500).token_ids == reference[:21]


@pytest.mark.parametrize("policy", [None, Beam(6, 3)], ids=["plain", "beam"])
def test_stop_strings_cut_ids_and_text_where_plain_decoding_would(model, reference, policy):
    tokenizer = tiny_tokenizer(320)
    engine = engine_for(model, policy, tokenizer=tokenizer)
    whole = engine.generate(PROMPT, max_new_tokens=50)
    for start, size in ((3, 1), (8, 2), (15, 4), (0, 1)):
        stop = whole.text[start : start + size]
        result = engine.generate(PROMPT, max_new_tokens=50, stop=["never in it \x00", stop])
        assert result.finish_reason is FinishReason.stop
        assert result.text == whole.text[: whole.text.index(stop)]
        ids = result.token_ids
        assert ids == reference[: len(ids)]
        assert stop in tokenizer.decode(ids, skip_special_tokens=True)
        assert stop not in tokenizer.decode(ids[:-1], skip_special_tokens=True)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.text(alphabet="abé漢 \n", min_size=1, max_size=3), max_size=2), st.integers(0, 100))
def test_streamed_text_adds_up_to_the_final_text(model, stops, seed):
    tokenizer = tiny_tokenizer(320)
    engine = engine_for(model, Beam(4, 2), tokenizer=tokenizer)
    ids, pieces = [], []
    prompt = [(seed * 7 + i * 31) % 320 for i in range(6)]
    result = engine.generate(
        prompt,
        max_new_tokens=30,
        stop=stops,
        on_tokens=lambda block, text: (ids.extend(block), pieces.append(text)),
    )
    assert ids == result.token_ids
    assert "".join(pieces) == result.text


def test_tokens_are_streamed_as_they_are_emitted(model, reference):
    seen = []
    engine_for(model, Beam(6, 3)).generate(
        PROMPT, max_new_tokens=40, on_tokens=lambda ids, text: seen.append(ids)
    )
    assert seen[0] == reference[:1]
    assert len(seen) > 2
    assert [token for block in seen for token in block] == reference[:40]


def test_the_logits_of_a_tree_are_gone_before_the_next_one_is_drafted(model, monkeypatch):
    """They are the largest piece of a pass's workspace, which a plan counts once."""
    engine, alive = engine_for(model, Beam(6, 3)), []
    score, draft = engine._score, engine._draft

    def scored(size):
        hidden, logits = score(size)
        alive.append(weakref.ref(logits))
        return hidden, logits

    def drafted(*arguments):
        assert not any(reference() is not None for reference in alive)
        return draft(*arguments)

    monkeypatch.setattr(engine, "_score", scored)
    monkeypatch.setattr(engine, "_draft", drafted)
    engine.generate(PROMPT, max_new_tokens=30)
    assert len(alive) > 1


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (list(range(64)), "decoding.max_length=64 leaves no room"),
        ([1, 320], "outside the target's vocabulary of 320"),
        ([-1], "outside the target's vocabulary"),
    ],
)
def test_prompts_that_cannot_run_are_refused(model, prompt, message):
    with pytest.raises(SubspecError, match=message):
        engine_for(model, max_length=64).generate(prompt)


@pytest.mark.parametrize("count", [0, -3])
def test_a_text_of_no_tokens_is_refused(model, count):
    with pytest.raises(SubspecError, match="must be at least 1"):
        engine_for(model).generate(PROMPT, max_new_tokens=count)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_pass_are_refused(kind):
    import copy

    from subspec.errors import ConfigError

    moving = tiny_model("llama")
    moving.config = copy.deepcopy(moving.config)
    moving.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConfigError, match=f"{kind} rotary embeddings"):
        build_engine(moving)


def test_a_tree_wider_than_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="wider than the vocabulary"):
        engine_for(model, Beam(2, 321))


# ------------------------------------------------------------------------------------------------- library


def test_generate_needs_neither_hydra_nor_a_config(model, reference):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = generate(
        model, torch.tensor([PROMPT]), max_new_tokens=40, tree_policy=Beam(6, 2), max_length=128
    )
    assert result.token_ids == reference[: len(result.token_ids)]
    assert result.finish_reason in FinishReason
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_engine_serves_many_prompts(model):
    engine = build_engine(model, tree_policy=Beam(4, 2), max_length=128)
    plain = build_engine(model, draft="none", max_length=128)
    for shift in range(4):
        prompt = [(t + shift * 13) % 320 for t in PROMPT]
        ours = engine.generate(prompt, max_new_tokens=20, ignore_eos=True)
        assert ours.token_ids == plain.generate(prompt, max_new_tokens=20, ignore_eos=True).token_ids
