"""The loss without logits against the one with them, and the measures."""

import pytest
import torch
from training import losses, measures
from training.losses import soft_cross_entropy
from training.measures import chain_tau, greedy_ranks

from tests.helpers.tiny import tiny_model


def plain(hidden, weight, teacher, teacher_weight):
    wanted = torch.softmax(teacher @ teacher_weight.T, -1)
    return torch.stack([-(wanted * torch.log_softmax(h @ weight.T, -1)).sum(-1).mean() for h in hidden])


@pytest.mark.parametrize("chunk", [3, 100])
def test_gradients_are_those_of_autograd(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    torch.manual_seed(0)
    weight, teacher, table = torch.randn(20, 6), torch.randn(8, 5), torch.randn(20, 5)
    hidden = torch.randn(3, 8, 6, requires_grad=True)
    scale = torch.tensor([1.0, 0.5, 0.25])
    (plain(hidden, weight, teacher, table) * scale).sum().backward()
    expected, hidden.grad = hidden.grad, None
    loss, right = soft_cross_entropy(hidden, weight, teacher, table, torch.float32)
    (loss * scale).sum().backward()
    torch.testing.assert_close(loss, plain(hidden, weight, teacher, table))
    torch.testing.assert_close(hidden.grad, expected)
    best = (teacher @ table.T).argmax(-1)
    torch.testing.assert_close(right, ((hidden @ weight.T).argmax(-1) == best).float().mean(-1))


def test_a_single_pass_trains_the_head_too():
    torch.manual_seed(0)
    teacher, table = torch.randn(8, 5), torch.randn(20, 5)
    weight, hidden = torch.randn(20, 6, requires_grad=True), torch.randn(1, 8, 6, requires_grad=True)
    (3 * plain(hidden, weight, teacher, table)[0]).backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    (3 * soft_cross_entropy(hidden, weight, teacher, table, torch.float32)[0][0]).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)
    with pytest.raises(ValueError, match="one pass"):
        soft_cross_entropy(hidden.expand(2, -1, -1), weight, teacher, table, torch.float32)


def test_ranks(monkeypatch):
    monkeypatch.setattr(measures, "CHUNK", 2)
    table = torch.eye(4)
    mine = torch.tensor([[[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 4, 3, 2]]])
    true = torch.tensor([[[9.0, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0]]])
    assert greedy_ranks(mine, table, true, table).tolist() == [[0, 2, 3]]


def test_a_chain_ends_at_its_first_wrong_token_and_at_the_end_of_the_text():
    right = torch.tensor([[[1, 1, 1, 0, 1, 1]], [[1, 1, 0, 1, 1, 1]]]).bool()
    judged = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    # From 0 both are right; from 1 the first only; from 2 both; from 3 none; from 4 one, then the text ends.
    assert chain_tau(right, judged) == pytest.approx(1 + (2 + 1 + 2 + 0 + 1) / 5)


def test_bf16_arithmetic_gives_nearly_the_same_loss():
    from tests.training.test_trainer import eagle, student

    target = tiny_model(seed=4, std=0.2)
    ids = torch.randint(3, 320, (6, 24), generator=torch.Generator().manual_seed(0))
    learn = torch.ones(6, 24, dtype=torch.bool)
    for make in (eagle, student):
        losses_ = []
        for dtype in (torch.float32, torch.bfloat16):
            lesson = make(target, dtype=dtype)
            loss, _ = lesson.loss(ids, learn, torch.Generator())
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in lesson.module.parameters())
            lesson.evaluate(ids, learn)
            losses_.append(float(loss.detach()))
        assert losses_[1] == pytest.approx(losses_[0], rel=0.02)
