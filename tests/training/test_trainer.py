"""The loop: resumed and uninterrupted runs end alike, losses fall, and Ctrl-C loses nothing."""

import os
import signal
from functools import partial

import pytest
import torch
from training.block import BlockLesson
from training.corpus import Batches, Corpus, load_corpus, shard_path, write_shard
from training.eagle import EagleLesson, balance_inputs, shape_for, target_states
from training.losses import SampledVocabulary
from training.student import StudentLesson, build_student
from training.trainer import Schedule, Trainer

from subspec.drafts.block_head import BlockHead, BlockShape
from subspec.drafts.eagle3_head import Eagle3Head, Eagle3Shape
from subspec.drafts.eagle_head import EagleHead
from subspec.errors import SubspecError
from tests.helpers.tiny import tiny_model

LENGTH = 24


@pytest.fixture(scope="module")
def target():
    return tiny_model(seed=4, std=0.2)


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (24, LENGTH), generator=generator, dtype=torch.int32)
    learn = torch.rand(24, LENGTH, generator=generator) < 0.7
    return Corpus(ids[4:], learn[4:], ids[:4], learn[:4], {"seed": 0})


def eagle(target, **options):
    head = EagleHead(shape_for(target), seed=0)
    lesson = EagleLesson(target, head, passes=2, **options)
    features = target_states(target, torch.arange(3, 103).view(4, 25), lesson.wants)[1].flatten(0, 1)
    balance_inputs(head, (target.get_input_embeddings().weight, features))
    return lesson


def eagle3(target, **options):
    """With an LM head of its own for the even ids."""
    width, vocab = target.config.hidden_size, target.config.vocab_size
    own = {"draft_vocab": vocab // 2, "mapped": True, "last_id": vocab - 2}
    shape = shape_for(target, Eagle3Shape, fc_inputs=3 * width, layers=(0, 1, 1), **own)
    head = Eagle3Head(shape)
    head.d2t.copy_(torch.arange(vocab // 2))
    return EagleLesson(target, head, passes=2, regression=0, **options)


def block(target, **options):
    width, vocab = target.config.hidden_size, target.config.vocab_size
    own = {"layers": (0, 1), "fc_inputs": 2 * width, "qk_norm": True, "decoder_layers": 2, "mask_id": 2}
    dspark = {"block": 4, "shifted": True, "markov": (vocab, 8), "confidence": width + 8}
    head = BlockHead(shape_for(target, BlockShape, **own, **dspark))
    vocabulary = SampledVocabulary.of(torch.arange(vocab), 100, 50)
    return BlockLesson(target, head, anchors=6, vocabulary=vocabulary, **options)


def student(target, **options):
    counts = torch.ones(target.config.vocab_size, dtype=torch.int64)
    shape = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 24}
    return StudentLesson(target, build_student(target, counts, **shape, seed=0), **options)


LESSONS = {"eagle": partial(eagle, noise=0.1), "eagle3": eagle3, "block": block, "student": student}


def trainer(lesson, corpus, folder, **schedule):
    options = {"rows": 6, "lr": 3e-3, "seed": 1} | schedule
    return Trainer(lesson, corpus, Schedule(**options), folder / "run.ckpt", {}, note=lambda line: None)


def weights(lesson):
    return {name: tensor.clone() for name, tensor in lesson.module.state_dict().items()}


@pytest.mark.parametrize("kind", LESSONS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, target, corpus, tmp_path):
    make = LESSONS[kind]
    whole = make(target)
    run = trainer(whole, corpus, tmp_path / "a", steps=6)
    figures = run.run()
    again = make(target)
    assert trainer(again, corpus, tmp_path / "b", steps=6).run() == figures

    # Interrupted after a step by the signal that Ctrl-C sends, then resumed in new objects.
    first = make(target)
    part = trainer(first, corpus, tmp_path / "c", steps=6)
    loss = first.loss

    def interrupted(*arguments):
        if part.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    first.loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert part.step == 3
    second = make(target)
    rest = trainer(second, corpus, tmp_path / "c", steps=6)
    rest.resume()
    assert rest.step == 3
    assert rest.run() == figures
    expected = weights(whole)
    for name, tensor in weights(second).items():
        assert torch.equal(tensor, expected[name]), name
    # Another seed gives other weights, so the comparison can fail.
    other = make(target)
    trainer(other, corpus, tmp_path / "d", steps=6, seed=2).run()
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in weights(other).items())


@pytest.mark.parametrize("kind", LESSONS)
def test_training_lowers_the_loss_and_raises_agreement(kind, target, corpus, tmp_path):
    lesson = LESSONS[kind](target)
    ids, learn = corpus.ids.long(), corpus.learn

    def judge():
        return float(lesson.loss(ids, learn, torch.Generator().manual_seed(0))[0].detach())

    before, figures = judge(), lesson.evaluate(ids, learn)
    # Of a block, each step judges some anchors only.
    trainer(
        lesson, corpus, tmp_path, **({"steps": 160, "lr": 1e-2} if kind == "block" else {"steps": 80, "lr": 2e-2})
    ).run()
    assert judge() < before - 0.4
    top1 = "top1" if kind == "student" else "top1@1"
    after = lesson.evaluate(ids, learn)
    assert after[top1] > figures[top1] + 0.1
    assert after["chain_tau"] > figures["chain_tau"] + 0.1


def test_a_checkpoint_of_other_settings_is_refused(target, corpus, tmp_path):
    trainer(student(target), corpus, tmp_path, steps=1).run()
    with pytest.raises(SubspecError, match="lr"):
        trainer(student(target), corpus, tmp_path, steps=2, lr=1e-4).resume()


def test_a_budget_in_minutes_ends_a_run_and_an_end_is_needed(target, corpus, tmp_path):
    run = trainer(student(target), corpus, tmp_path, minutes=1 / 120)
    run.run()
    assert 0.45 < run.seconds < 10
    assert run.step > 1
    with pytest.raises(SubspecError, match="--steps"):
        Schedule()


def test_the_rate_rises_then_falls():
    schedule = Schedule(steps=100, lr=1.0, warmup=0.1, floor=0.0)
    rates = [schedule.rate(schedule.progress(step, 0.0)) for step in range(101)]
    assert rates[0] > 0
    assert max(rates) == pytest.approx(rates[10]) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0, abs=1e-9)


def test_every_epoch_shows_every_row_once(corpus):
    batches = Batches(corpus, rows=5, seed=0)
    epochs = [torch.cat([batches[e * batches.per_epoch + i][0] for i in range(4)]) for e in range(2)]
    rows = sorted(map(tuple, corpus.ids.tolist()))
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == rows
    assert not torch.equal(*epochs)


def test_shards_come_back_and_mixed_settings_are_refused(corpus, tmp_path):
    for index in range(2):
        write_shard(shard_path(tmp_path, index), corpus.ids, corpus.learn, {"seed": 0})
    (tmp_path / "shard-0002.part").write_bytes(b"half")
    found = load_corpus(tmp_path, held_out=5)
    assert torch.equal(torch.cat([found.held_ids, found.ids]), corpus.ids.repeat(2, 1))
    assert torch.equal(torch.cat([found.held_learn, found.learn]), corpus.learn.repeat(2, 1))
    assert len(found.held_ids) == 5
    assert found.answer_tokens == int(found.learn.sum())
    with pytest.raises(SubspecError, match="--held-out"):
        load_corpus(tmp_path, held_out=40)
    write_shard(shard_path(tmp_path, 2), corpus.ids, corpus.learn, {"seed": 1})
    with pytest.raises(SubspecError, match="other settings"):
        load_corpus(tmp_path, held_out=5)
    with pytest.raises(SubspecError, match="generate_text"):
        load_corpus(tmp_path / "none", held_out=5)
