"""Captured passes over trees: the bits of passes that are not captured, behind any prefix."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from tests.helpers.drafts import begin, grow
from tests.helpers.tiny import tiny_model
from tests.kernels.test_invariant import arithmetic, device_of_tests

SHAPE = {"hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 32, "layers": 1, "vocab_size": 64}


def engine_of(model, policy, *, whole, **options):
    target = arithmetic(model)
    target.whole = whole
    draft = SubstituteDraft(share_parameters(model)) if policy else None
    engine = Engine(target, draft, policy, max_length=48, prefill_chunk=8, **options)
    engine.keeps_digests = True
    return engine


@pytest.mark.parametrize("policy", [None, Beam(3, 2)], ids=["plain", "beam"])
def test_texts_have_the_bits_of_passes_that_are_launched_one_by_one(policy):
    device = device_of_tests()
    model = tiny_model("llama", **SHAPE).to(device, torch.bfloat16)
    length = 40 if device.type == "cuda" else 4
    captured, launched = (
        engine_of(model, policy, whole=whole, sampling=Sampling(0.8, top_p=0.9)) for whole in (True, False)
    )
    assert captured.target.captured
    assert not launched.target.captured
    auditors = [Auditor(engine.target, engine.sampler.sampling) for engine in (captured, launched)]
    prompts = [[5, 17, 33], [2, 3, 5, 7, 11, 13, 17]]  # a graph serves every prefix
    for prompt in prompts if device.type == "cuda" else prompts[:1]:
        texts = [engine.generate(prompt, max_new_tokens=length, seed=3) for engine in (captured, launched)]
        assert texts[0].token_ids == texts[1].token_ids
        assert texts[0].digests == texts[1].digests
        for auditor in auditors:
            found = auditor.audit(prompt, texts[0].token_ids, seed=3, digests=texts[0].digests)
            assert found.exact == len(texts[0].token_ids)
    if device.type == "cuda":
        assert len(captured._pass.captured._graphs) == 1


@pytest.mark.parametrize(
    ("policy", "whole"),
    [
        pytest.param(None, True, id="plain captured"),
        pytest.param(Beam(3, 2), False, id="beam launched"),
        pytest.param(None, False, id="plain launched", marks=pytest.mark.slow),
        pytest.param(Beam(3, 2), True, id="beam captured", marks=pytest.mark.slow),
    ],
)
def test_texts_side_by_side_have_the_bits_that_each_has_alone(policy, whole):
    device = device_of_tests()
    model = tiny_model("llama", **SHAPE).to(device, torch.bfloat16)
    on_gpu = device.type == "cuda"
    texts = [([5, 17, 33], 0, None), ([2, 3, 5, 7, 11, 13, 17, 9, 1], 3, Sampling(0.8, top_p=0.9)), ([9], 1, None)]
    engine, count = engine_of(model, policy, whole=whole), 30 if on_gpu else 3
    scheduler = Scheduler(engine, 2)  # the last one joins a running one, and takes over a place
    added = [
        scheduler.add(prompt, seed=seed, sampling=sampling, max_new_tokens=count - number)
        for number, (prompt, seed, sampling) in enumerate(texts)
    ]
    while not scheduler.idle:
        scheduler.step()
    for text, (prompt, seed, sampling) in zip(added, texts, strict=True):
        alone = engine_of(model, policy, whole=whole, sampling=sampling)
        expected = alone.generate(prompt, seed=seed, max_new_tokens=len(text.result.token_ids))
        assert text.result.token_ids == expected.token_ids
        assert text.result.digests == expected.digests
    assert added[0].beside > 0
    if on_gpu and whole:
        assert {texts for texts, _ in engine._pass.captured._graphs} == {1, 2}


def test_entries_behind_the_tree_change_no_bits_and_reach_no_row_outside_the_cache():
    device = device_of_tests()
    model = tiny_model("llama", **SHAPE).to(device, torch.bfloat16)
    engine = engine_of(model, Beam(3, 2), whole=True)
    with torch.inference_mode():
        root = begin(engine, [5, 17, 33])
        grow(engine, root, 3)  # the whole tree: its entries stay when the next one is smaller
        engine.tree.plant(root)
        size, rows = engine.tree.size, engine.tree.capacity
        assert size < rows
        exact = engine._pass.captured.run(1, size).final.clone()
        assert torch.equal(engine._pass.captured.run(1, rows).final[:size], exact)
        engine.cache.length = engine.max_length - 1  # the last pass of a text
        before = engine.cache.rows[:, :, :, : engine.cache.draft_rows + engine.cache.length].clone()
        engine._pass.captured.run(1, rows)
        assert torch.equal(engine.cache.rows[:, :, :, : before.shape[3]], before)
