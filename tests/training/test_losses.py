"""The loss without logits against the one with them, and the measures."""

import pytest
import torch
from training import losses, measures
from training.losses import SampledVocabulary, soft_cross_entropy
from training.measures import chain_tau, greedy_ranks

from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_are_those_of_autograd(chunk, head, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    teacher, table, shift = torch.randn(8, 5), torch.randn(20, 5), torch.rand(20)
    weight, hidden = torch.randn(20, 6, requires_grad=head), torch.randn(3, 8, 6, requires_grad=True)
    weights = torch.rand(3, 8)
    wanted = torch.softmax(teacher @ table.T + shift, -1)
    logp = torch.log_softmax(hidden @ weight.T + shift, -1)
    entropy = -(wanted * logp).sum(-1)
    (2 * (entropy * weights).sum() / weights.sum()).backward()
    expected, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    found = soft_cross_entropy(hidden, weight, teacher, table, torch.float32, weights, shift)
    (2 * found.loss).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
    torch.testing.assert_close(found.entropy, entropy.detach())
    assert torch.equal(found.right, logp.argmax(-1) == wanted.argmax(-1))
    torch.testing.assert_close(found.overlap, torch.minimum(logp.exp(), wanted).sum(-1).detach())


def test_sampled_ids_stand_for_all_others():
    counts = torch.tensor([5, 0, 9, 1, 0, 7, 0, 0, 0, 0])
    assert SampledVocabulary.of(counts, 8, 2).draw(torch.Generator())[1] is None
    vocabulary, logits = SampledVocabulary.of(counts, 3, 2), torch.randn(10)
    assert vocabulary.frequent.tolist() == [0, 2, 5]
    generator = torch.Generator().manual_seed(0)
    drawn = [vocabulary.draw(generator) for _ in range(4000)]
    sums = torch.stack([(logits[ids] + shift).exp().sum() for ids, shift in drawn])
    assert float(sums.mean()) == pytest.approx(float(logits.exp().sum()), rel=0.05)


def test_ranks(monkeypatch):
    monkeypatch.setattr(measures, "CHUNK", 2)
    table = torch.eye(4)
    mine = torch.tensor([[[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 4, 3, 2]]])
    true = torch.tensor([[[9.0, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0]]])
    assert greedy_ranks(mine, table, true, table).tolist() == [[0, 2, 3]]
    ids = torch.tensor([0, 3])  # the second token is not among them
    assert greedy_ranks(mine, table[ids], true, table, ids).tolist() == [[0, 2, 1]]


def test_a_chain_ends_at_its_first_wrong_token_and_at_the_end_of_the_text():
    right = torch.tensor([[[1, 1, 1, 0, 1, 1]], [[1, 1, 0, 1, 1, 1]]]).bool()
    judged = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    # From 0 both are right; from 1 the first only; from 2 both; from 3 none; from 4 one, then the text ends.
    assert chain_tau(right, judged) == pytest.approx(1 + (2 + 1 + 2 + 0 + 1) / 5)


def test_bf16_arithmetic_gives_nearly_the_same_loss():
    from tests.training.test_trainer import LESSONS

    target = tiny_model(seed=4, std=0.2)
    ids = torch.randint(3, 320, (6, 24), generator=torch.Generator().manual_seed(0))
    learn = torch.ones(6, 24, dtype=torch.bool)
    for make in LESSONS.values():
        losses_ = []
        for dtype in (torch.float32, torch.bfloat16):
            lesson = make(target, dtype=dtype)
            loss, _ = lesson.loss(ids, learn, torch.Generator())
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in lesson.module.parameters())
            lesson.evaluate(ids, learn)
            losses_.append(float(loss.detach()))
        assert losses_[1] == pytest.approx(losses_[0], rel=0.02)
