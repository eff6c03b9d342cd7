import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec import build_engine, generate
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.result import FinishReason
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import SubspecError
from tests.decoding.test_stopping import plainly
from tests.helpers.drafts import OracleDraft, RandomDraft, engine_for, hf_greedy
from tests.helpers.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPT = [5, 17, 33, 99, 4, 8, 77, 120, 6]
POLICIES = {
    "chain": lambda: Beam(6, 1),
    "beam": lambda: Beam(5, 4),
    "adaptive": lambda: Adaptive(10, 3, level_cost=0.05, check_every=2, min_depth=1),
    "eagle2": lambda: Eagle2(5, 3, 12),
}
SAMPLINGS = [None, Sampling(1.0), Sampling(0.7, 3, 0.9), Sampling(2.0, 1)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=3)


@pytest.fixture(scope="module")
def reference(model):
    return hf_greedy(model, PROMPT, 60)


@pytest.mark.parametrize(("family", "policy"), [*zip(FAMILIES, POLICIES, strict=True), ("llama", "beam")])
def test_greedy_text_is_transformers_own_for_every_family_and_tree(family, policy):
    model = tiny_model(family, layers=3)
    result = engine_for(model, POLICIES[policy](), prefill_chunk=4).generate(PROMPT, max_new_tokens=50)
    assert result.token_ids == hf_greedy(model, PROMPT, 50)
    stats = result.stats
    assert stats.iterations < 49  # something was accepted
    assert len(stats.block_s) == stats.iterations
    assert sum(stats.block_s) == pytest.approx(stats.decode_s, abs=0.01)
    assert stats.reached_by_depth[0] == stats.drafted_by_depth[0]
    counts = zip(stats.accepted_by_depth, stats.reached_by_depth, stats.drafted_by_depth, strict=True)
    assert all(accepted <= reached <= drafted for accepted, reached, drafted in counts)
    assert all(
        reached <= before for reached, before in zip(stats.reached_by_depth[1:], stats.accepted_by_depth, strict=False)
    )


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_greedy_text_does_not_depend_on_the_substitutes_bits(model, reference, bits):
    result = engine_for(model, Beam(5, 3), bits=bits).generate(PROMPT, max_new_tokens=60)
    assert result.token_ids == reference


def test_plain_decoding_takes_one_pass_per_token(model, reference):
    result = engine_for(model).generate(PROMPT, max_new_tokens=60)
    assert result.token_ids == reference
    assert result.stats.iterations == 59
    assert result.stats.verified_tokens == 59
    assert result.stats.drafted_nodes == 0


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_draft_and_tree_yield_what_plain_decoding_is_defined_to_be(model, data):
    """Draw a setting, take the target's own tokens, look after each of them whether the text ends, compare."""
    draw, tokenizer = data.draw, tiny_tokenizer()
    prompt = draw(st.lists(st.integers(0, 319), min_size=1, max_size=12))
    options = {"sampling": draw(st.sampled_from(SAMPLINGS)), "max_length": len(prompt) + draw(st.integers(1, 30))}
    seed, most = draw(st.integers(0, 9)), draw(st.one_of(st.none(), st.integers(1, 34)))
    free = engine_for(model, **options).generate(prompt, seed=seed).token_ids
    text = tokenizer.decode(free, skip_special_tokens=True) or "x"
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 4))
    cuts = places.map(lambda cut: text[cut[0] : sum(cut)])
    stop = draw(st.lists(st.one_of(cuts, st.sampled_from(["never \0", "<|im_end|>"])), max_size=2))
    eos, ignored = draw(st.sampled_from([(), (free[-1], 319), tuple(free[:9:4])])), draw(st.booleans())
    expected = plainly(tokenizer, free, stop, () if ignored else eos, min(most or 99, len(free)))
    options |= {"eos_token_ids": eos, "tokenizer": tokenizer, "prefill_chunk": draw(st.integers(1, 14))}
    policy = POLICIES[draw(st.sampled_from([*POLICIES]))]()
    for draft in (None, RandomDraft(320, seed, broken=0.02), SubstituteDraft(share_parameters(model))):
        shape = {} if draft is None else {"draft": draft, "policy": policy}
        engine, ids, pieces = Engine(TargetModel(model), **shape, **options), [], []
        result = engine.generate(
            prompt,
            max_new_tokens=most,
            stop=stop,
            seed=seed,
            ignore_eos=ignored,
            on_tokens=lambda block, fresh, ids=ids, pieces=pieces: (ids.extend(block), pieces.append(fresh)),
        )
        assert (result.token_ids, result.finish_reason, result.text) == expected
        assert (ids, "".join(pieces)) == (result.token_ids, result.text)


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


def test_timed_plain_passes_change_no_text(model, reference, monkeypatch):
    engine = engine_for(model, Beam(5, 3), max_length=len(PROMPT) + 60)
    engine._pass.row_multiple = 8  # passes over trees are rounded up on a GPU, plain ones are not
    first = engine.generate(PROMPT, max_new_tokens=30)
    length, rows, forward = engine.cache.length, [], engine.target.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.target, "forward", lambda batch, **kept: rows.append(len(batch.tokens)) or forward(batch, **kept)
        )
        passes, seconds = engine.time_plain(4)
    assert (passes, engine.cache.length) == (4, length + 5)
    assert rows == [1] * 5
    assert seconds > 0
    assert engine.generate(PROMPT, max_new_tokens=60).token_ids == reference
    assert engine.time_plain(4) == (0, 0.0)  # the text ended at max_length
    assert first.token_ids == reference[:30]


def test_the_last_tree_is_no_deeper_than_the_tokens_still_wanted(model, reference):
    result = engine_for(model, Beam(5, 1)).generate(PROMPT, max_new_tokens=2)
    assert result.token_ids == reference[:2]
    assert result.stats.drafted_nodes == 0  # one token missing: the root's own pass yields it


def test_tokens_are_streamed_as_they_are_emitted(model, reference):
    seen = []
    engine_for(model, Beam(6, 3)).generate(PROMPT, max_new_tokens=40, on_tokens=lambda ids, _: seen.append(ids))
    assert seen[0] == reference[:1]
    assert len(seen) > 2


def test_the_logits_of_a_tree_are_gone_before_the_next_one_is_drafted(model, monkeypatch):
    """They are the largest piece of a pass's workspace, which a plan counts once."""
    engine, alive = engine_for(model, Beam(6, 3)), []
    score, grow = engine.target.logits, engine._grow

    def scored(hidden):
        logits = score(hidden)
        alive.append(weakref.ref(logits))
        return logits

    def grown(*arguments):
        assert not any(reference() is not None for reference in alive)
        return grow(*arguments)

    monkeypatch.setattr(engine.target, "logits", scored)
    monkeypatch.setattr(engine, "_grow", grown)
    engine.generate(PROMPT, max_new_tokens=30)
    assert len(alive) > 1


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        (list(range(64)), {}, "decoding.max_length=64 leaves no room"),
        ([1, 320], {}, "outside the target's vocabulary of 320"),
        ([-1], {}, "outside the target's vocabulary"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([1], {"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_what_cannot_run_is_refused(model, prompt, options, message):
    with pytest.raises(SubspecError, match=message):
        engine_for(model, max_length=64).generate(prompt, **options)


def test_a_tree_wider_than_the_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="wider than the vocabulary"):
        engine_for(model, Beam(2, 321))


# ------------------------------------------------------------------------------------------------- library


def test_generate_needs_neither_hydra_nor_a_config(model, reference):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"max_new_tokens": 40, "tree_policy": Beam(6, 2), "max_length": 128}
    result = generate(model, torch.tensor([PROMPT]), **options)
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
