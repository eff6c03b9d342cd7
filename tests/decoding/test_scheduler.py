"""Texts side by side: each one's tokens are those that it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.decoding.adaptive import Adaptive
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.decoding.verify import NotFiniteError
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.prompt_lookup import PromptLookupDraft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import SubspecError
from tests.helpers.drafts import RandomDraft, substitute_of
from tests.helpers.eagle import SHAPES, random_head
from tests.helpers.tiny import tiny_model, tiny_tokenizer

POLICIES = {
    "chain": lambda: Beam(6, 1),
    "beam": lambda: Beam(4, 3),
    "adaptive": lambda: Adaptive(8, 2, level_cost=0.05, check_every=2),
    "eagle2": lambda: Eagle2(4, 3, 9),
}
LENGTH = 30


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", layers=1)


@pytest.fixture(scope="module")
def substitute(model):
    return substitute_of(model)


def engine_of(model, draft, policy, **options):
    options = {"max_length": LENGTH, "prefill_chunk": 8, "tokenizer": tiny_tokenizer(), **options}
    return Engine(TargetModel(model), draft, policy, **options)


def run(scheduler):
    """Step until nothing is left; the texts in the order in which they ended."""
    ended = []
    while not scheduler.idle:
        ended += scheduler.step()
    return ended


@st.composite
def requests(draw):
    """A text's arguments, and the step before which it arrives."""
    prompt = draw(st.lists(st.integers(0, 319), min_size=1, max_size=12))
    options = {
        "max_new_tokens": draw(st.one_of(st.none(), st.integers(1, 9))),
        "seed": draw(st.integers(0, 3)),
        "ignore_eos": draw(st.booleans()),
        "stop": draw(st.sampled_from([(), ("e",), ("<|im_end|>", "th")])),
    }
    sampling = draw(st.sampled_from([None, Sampling(), Sampling(1.0), Sampling(0.7, 3, 0.9)]))
    return draw(st.integers(0, 12)), prompt, options, sampling


def check_company(engine, alone, asked, places):
    """Run texts side by side, and compare each one with itself alone.

    Args:
        alone: an engine like ``engine``, by the distribution.
    """
    scheduler, texts, step = Scheduler(engine, places), [], 0
    late = sorted(asked, key=lambda one: one[0])
    while late or not scheduler.idle:
        while late and late[0][0] <= step:
            _, prompt, options, sampling = late.pop(0)
            seen = []
            text = scheduler.add(
                prompt, sampling=sampling, on_tokens=lambda ids, _, seen=seen: seen.extend(ids), **options
            )
            texts.append((text, seen, prompt, options, sampling))
        assert scheduler.running <= places
        scheduler.step()
        step += 1
    for text, seen, prompt, options, sampling in texts:
        expected = alone(sampling).generate(prompt, **options)
        assert text.error is None
        got = text.result
        assert (got.token_ids, got.finish_reason, got.text) == (
            expected.token_ids,
            expected.finish_reason,
            expected.text,
        )
        assert seen == got.token_ids
        assert got.stats.verified_tokens == len(got.token_ids) - 1
        assert 0 <= text.beside <= places - 1


@settings(max_examples=6, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["none", "subspec", "random", "prompt_lookup", "eagle2", "small_model"])
def test_any_company_yields_every_text_as_it_is_alone(model, substitute, kind, data):
    name = data.draw(st.sampled_from([*POLICIES]))
    eos = data.draw(st.sampled_from([(), (7, 300)]))

    def build(sampling=None):
        policy = POLICIES[name]()
        draft = {
            "none": lambda: None,
            "subspec": lambda: SubstituteDraft(substitute),
            "random": lambda: ForkedRandom(320, 5, broken=0.02),
            "prompt_lookup": lambda: PromptLookupDraft(NgramIndex(3), 320, earlier_texts=True),
            "eagle2": lambda: EagleDraft(random_head(SHAPES["qwen2"]), TargetModel(model), policy),
            "small_model": lambda: SeparateCacheDraft(
                SubstituteDraft(substitute),
                TargetModel(substitute),
                max_length=LENGTH,
                draft_rows=policy.draft_rows,
                vocab_size=320,
            ),
        }[kind]()
        return engine_of(model, draft, draft and policy, sampling=sampling, eos_token_ids=eos)

    asked = data.draw(st.lists(requests(), min_size=2, max_size=4))
    check_company(build(), build, asked, data.draw(st.integers(1, 4)))


class ForkedRandom(RandomDraft):
    """Proposes noise for several texts."""

    def fork(self):
        return ForkedRandom(self.vocab_size, self.generator.initial_seed() + 1, self.broken)


def test_running_texts_share_passes_and_waiting_ones_join(model, substitute):
    engine = engine_of(model, SubstituteDraft(substitute), Beam(3, 2))
    scheduler, calls, forward = Scheduler(engine, 2), [], engine.target.forward
    engine.target.forward = lambda batch, **kept: calls.append(len(batch.parts)) or forward(batch, **kept)
    first = scheduler.add([1, 2, 3], max_new_tokens=20)
    second = scheduler.add(list(range(1, 18)), max_new_tokens=12)
    third = scheduler.add([4], max_new_tokens=3)
    assert (scheduler.running, scheduler.waiting, scheduler.idle) == (0, 3, False)
    scheduler.step()  # all of the first prompt, and a part of the second
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert (len(first.output.token_ids), len(second.output.token_ids)) == (1, 0)
    assert second.unread.numel() == 12
    ended = run(scheduler)
    assert calls == [2] * (len(calls) - calls.count(1)) + [1] * calls.count(1)
    assert set(ended) == {first, second, third}
    assert ended[-1] is third or third.beside > 0
    assert scheduler.idle
    assert scheduler.step() == []


def test_a_text_that_is_removed_frees_its_place_and_changes_no_other(model, substitute):
    build = lambda: engine_of(model, SubstituteDraft(substitute), Beam(3, 2))  # noqa: E731
    scheduler = Scheduler(build(), 2)
    gone, kept, late = (scheduler.add(prompt, max_new_tokens=20) for prompt in ([1], [2, 3], [4, 5]))
    scheduler.step()
    scheduler.remove(gone)
    scheduler.remove(gone)
    waiting = scheduler.add([9])
    scheduler.remove(waiting)
    assert (scheduler.running, scheduler.waiting) == (1, 1)
    ended = run(scheduler)
    assert set(ended) == {kept, late}
    assert gone.result is None
    for text in ended:
        scheduler.remove(text)
        assert text.result.token_ids == build().generate(list(text.prompt), max_new_tokens=20).token_ids


def test_a_callback_may_remove_and_add_texts(model, substitute):
    build = lambda: engine_of(model, SubstituteDraft(substitute), Beam(3, 2))  # noqa: E731
    scheduler, texts, seen = Scheduler(build(), 3), {}, []

    def turn(ids, text):
        if len(texts["first"].output.token_ids) > 3 and "late" not in texts:
            for name in ("second", "first"):  # another one, and itself
                scheduler.remove(texts[name])
                seen.append(len(texts[name].output.token_ids))
            texts["late"] = scheduler.add([8, 9], max_new_tokens=9)

    for name, prompt in (("first", [1]), ("second", [2, 3]), ("third", [4, 5, 6])):
        texts[name] = scheduler.add(prompt, max_new_tokens=18, on_tokens=turn if name == "first" else None)
    ended = run(scheduler)
    assert set(ended) == {texts["third"], texts["late"]}
    assert [len(texts[name].output.token_ids) for name in ("second", "first")] == seen
    for text in ended:
        expected = build().generate(text.prompt, max_new_tokens=len(text.output.token_ids))
        assert text.result.token_ids == expected.token_ids


def test_a_failing_text_ends_alone(model):
    engine = engine_of(model, None, None)
    scheduler, forward = Scheduler(engine, 3), engine.target.logits

    def refuse(ids, text):
        raise RuntimeError("the caller's own")

    damaged, fine = (scheduler.add(prompt, max_new_tokens=8) for prompt in ([1, 2], [3]))
    refusing = scheduler.add([5], on_tokens=refuse)

    def broken(hidden):
        logits = forward(hidden)
        logits[0] = torch.nan  # the first place's text
        return logits

    scheduler.step()
    assert isinstance(refusing.error, RuntimeError)
    engine.target.logits = broken
    assert scheduler.step() == [damaged]
    engine.target.logits = forward
    assert isinstance(damaged.error, NotFiniteError)
    assert damaged.result is None
    run(scheduler)
    assert fine.result.token_ids == engine.generate([3], max_new_tokens=8).token_ids


def test_a_pause_is_in_no_figure(model, monkeypatch):
    """Every look at the link finds that another 100 bytes have crossed it."""
    engine = engine_of(model, None, None)
    scheduler, clock = Scheduler(engine, 2), [0.0]
    monkeypatch.setattr("subspec.decoding.engine.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(engine.target, "take_transfer", lambda: (100, 1.0), raising=False)
    running, joining = scheduler.add([1], max_new_tokens=5), scheduler.add([1] * 20, max_new_tokens=5)
    scheduler.step()
    assert joining.root is None
    with engine.paused():
        clock[0] += 50.0
    run(scheduler)
    for text in (running, joining):
        stats = text.result.stats
        assert (stats.prefill_s, stats.decode_s, max(stats.block_s)) == (0.0, 0.0, 0.0)
    assert running.result.stats.bytes_streamed == 300  # its end, the other's start, and the look before the pause


def test_texts_are_checked_when_they_are_added(model):
    scheduler = Scheduler(engine_of(model, None, None), 2)
    for prompt, options, message in (
        ([], {}, "the prompt is empty"),
        ([1] * LENGTH, {}, "decoding.max_length"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"stop": [""]}, "stop"),
    ):
        with pytest.raises(SubspecError, match=message):
            scheduler.add(prompt, **options)
    assert scheduler.idle


def test_one_text_at_a_time_is_refused_more(model):
    with pytest.raises(SubspecError, match=r"decoding\.texts"):
        Scheduler(engine_of(model, RandomDraft(320), Beam(2, 2)), 2)
    scheduler = Scheduler(engine_of(model, None, None), 2)
    text = scheduler.add([1], max_new_tokens=4)
    scheduler.step()
    with pytest.raises(SubspecError, match="running"):
        scheduler.engine.generate([1])
    run(scheduler)
    assert scheduler.engine.generate([1], max_new_tokens=4).token_ids == text.result.token_ids
