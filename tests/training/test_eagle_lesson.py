"""Unrolled passes against a draft that really is fed its own features, one token at a time."""

import torch
from training.eagle import EagleLesson, balance_inputs, pass_mask, shape_for, target_states, unroll

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.drafts.eagle_head import EagleHead
from tests.drafts.test_eagle3 import plain_head
from tests.helpers.eagle import SHAPES3, causal, random_head
from tests.helpers.tiny import tiny_model


def head_of(model, seed=0):
    head = EagleHead(shape_for(model), seed=seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(8)  # strong enough that a wrong input shows
    return head


def test_the_mask_of_the_third_pass():
    seen = pass_mask(4, 3, torch.float32, torch.device("cpu")) == 0
    assert seen.int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1],
    ]


@torch.no_grad()
def test_passes_are_what_a_draft_computes_level_by_level():
    model = tiny_model(seed=1)
    head = head_of(model)
    torch.manual_seed(0)
    rows, passes, width = 9, 4, model.config.hidden_size
    embeddings, features = torch.randn(1, rows, width), torch.randn(1, rows, width)
    unrolled = unroll(head, embeddings, features, passes)
    torch.testing.assert_close(unrolled[0], causal(head, embeddings, features))
    for root in range(rows - passes + 1):
        # Rows before the root have true features; the root too; deeper levels their parent's prediction.
        shape = {"layers": 1, "kv_heads": head.shape.kv_heads, "head_dim": head.shape.head_dim, "draft_rows": 0}
        options = {"dtype": torch.float32, "device": torch.device("cpu")}
        cache = KVCache(max_length=rows, target_rows=rows, **shape, **options)
        fed = features[0, : root + 1]
        start = 0
        for level in range(passes):
            count = len(fed)
            positions = torch.arange(start, start + count)
            visible = torch.zeros(count, start + count).masked_fill(
                torch.arange(start + count)[None] > positions[:, None], -torch.inf
            )
            out = head(embeddings[0, start : start + count], fed, positions, visible, cache.target_view(count))
            cache.extend(count)
            torch.testing.assert_close(out[-1], unrolled[level][0, root + level], rtol=1e-3, atol=1e-3)
            start, fed = start + count, out[-1:]


@torch.no_grad()
def test_passes_of_an_eagle3_head_are_the_papers():
    model, head = tiny_model("qwen3", layers=8), random_head(SHAPES3["official"])
    lesson = EagleLesson(model, head)
    ids = torch.randint(3, 319, (1, 9), generator=torch.Generator().manual_seed(0))
    passes = lesson._predict(ids, target_states(model, ids, lesson.wants)[1], 3)
    text, own, target = ids[0].tolist(), lesson._own_ids(), TargetModel(model)
    for number, out in enumerate(passes):
        for row in (2, 6):
            start = row + 1 - number
            expected = plain_head(head.state_dict(), head.shape, model, text[:start], text[start : row + 2])
            found = head.logits(out[0, row : row + 1], target)[0]
            torch.testing.assert_close(found, expected[own], rtol=1e-3, atol=1e-4)


def test_inputs_are_balanced():
    model = tiny_model(seed=1)
    head = EagleHead(shape_for(model))
    torch.manual_seed(0)
    table, features = 0.1 * torch.randn(5000, 64), 7 * torch.randn(5000, 64)
    balance_inputs(head, (table, features))
    by_embedding, by_feature = (
        (half @ x.T).var() for half, x in zip(head.fc.weight.chunk(2, 1), (table, features), strict=True)
    )
    torch.testing.assert_close(torch.stack([by_embedding, by_feature]), torch.full((2,), 0.5), rtol=0.1, atol=0)


def test_only_answers_are_judged():
    model = tiny_model(seed=1)
    lesson = EagleLesson(model, head_of(model), passes=2)
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 12))
    learn = torch.zeros(2, 12, dtype=torch.bool)
    learn[0, 6] = learn[1, 9] = True
    generator = torch.Generator()
    loss, _ = lesson.loss(ids, learn, generator)
    # Token 6 of a text is judged by tokens up to 5 and by the target alone: what follows changes nothing.
    changed = ids.clone()
    changed[0, 7:] = 5
    changed[1, 10:] = 5
    torch.testing.assert_close(lesson.loss(changed, learn, generator)[0], loss)
    changed = ids.clone()
    changed[0, 5] += 1
    assert not torch.allclose(lesson.loss(changed, learn, generator)[0], loss)
