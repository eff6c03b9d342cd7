"""Slots of the training against the paper, written out slot by slot."""

import pytest
import torch
from training.block import BlockLesson
from training.eagle import target_states

from tests.drafts.test_block_head import plain_block
from tests.helpers.blocks import BLOCKS
from tests.helpers.eagle import random_head
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def lesson():
    model = tiny_model("qwen3", layers=8)
    return BlockLesson(model, random_head(BLOCKS["bare dspark"], std=0.1), anchors=10)


@torch.no_grad()
def test_slots_are_the_papers(lesson):
    ids = torch.randint(3, 319, (2, 12), generator=torch.Generator().manual_seed(0))
    head, anchors = lesson.module, torch.tensor([1, 5, 11])
    states = target_states(lesson.target, ids, lesson.wants)[1]
    found = lesson._states(ids, states, anchors)
    for text in range(2):
        for number, anchor in enumerate(anchors.tolist()):
            before, root = ids[text, :anchor].tolist(), int(ids[text, anchor])
            expected = plain_block(head.state_dict(), head.shape, lesson.target, before, root)
            torch.testing.assert_close(found[text, number], torch.stack(expected), rtol=1e-3, atol=1e-4)


def test_only_answers_are_judged_and_a_block_ends_where_they_end(lesson):
    ids = torch.randint(3, 319, (1, 12), generator=torch.Generator().manual_seed(0))
    learn = torch.zeros(1, 12, dtype=torch.bool)
    learn[0, 4:7] = learn[0, 8] = True
    judged = lesson._judged(learn, torch.tensor([2, 3, 5, 7, 10]))
    assert judged[0].int().tolist() == [[0] * 4, [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0] * 4]
    loss = lesson.loss(ids, learn, torch.Generator())[0]
    # Token 8 is judged last, by the target's distribution behind token 7.
    changed = ids.clone()
    changed[0, 8:] += 1
    torch.testing.assert_close(lesson.loss(changed, learn, torch.Generator())[0], loss)
    changed[0, 7] += 1
    assert not torch.allclose(lesson.loss(changed, learn, torch.Generator())[0], loss)
