import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspec.decoding.kv_cache import KVCache


def make(draft_rows=6, max_length=12, target_rows=8):
    return KVCache(
        layers=2, kv_heads=3, head_dim=4, max_length=max_length, draft_rows=draft_rows, target_rows=target_rows,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def write(view, value):
    new = view.write[1] - view.write[0]
    for layer in range(2):
        key = torch.full((1, 3, new, 4), float(value)) + torch.arange(new)[None, None, :, None]
        read_key, read_value = view.update(key, -key, layer)
    return read_key, read_value


def test_views_are_contiguous_slices_around_the_prefix():
    cache = make()
    write(cache.target_view(3), 10)
    cache.extend(3)
    target = cache.target_view(2)
    assert target.read == (6, 6 + 3 + 2)
    assert target.write == (9, 11)
    draft = cache.draft_view(used=1, new=2)
    assert draft.write == (3, 5)
    assert draft.read == (3, 9)


def test_update_returns_what_the_view_reads():
    cache = make()
    write(cache.target_view(2), 10)
    cache.extend(2)
    key, value = write(cache.draft_view(0, 1), 50)
    assert key[0, 0, :, 0].tolist() == [50, 10, 11]
    assert torch.equal(value, -key)


@given(draft=st.lists(st.integers(1, 3), max_size=2), tree=st.integers(1, 8), prompt=st.integers(1, 4), data=st.data())
def test_draft_and_target_never_touch_each_others_rows(draft, tree, prompt, data):
    cache = make()
    write(cache.target_view(prompt), 100)
    cache.extend(prompt)
    prefix = cache.rows[:, :, :, 6 : 6 + prompt].clone()
    write(cache.target_view(tree), 200)
    target_rows = cache.rows[:, :, :, 6 + prompt :].clone()
    used = 0
    for new in draft:
        write(cache.draft_view(used, new), 300)
        used += new
    assert torch.equal(cache.rows[:, :, :, 6 + prompt :], target_rows)
    draft_rows = cache.rows[:, :, :, :6].clone()
    path = sorted(data.draw(st.sets(st.integers(1, tree - 1), max_size=tree - 1))) if tree > 1 else []
    path = [0, *path]
    cache.accept(torch.tensor(path))
    assert torch.equal(cache.rows[:, :, :, :6], draft_rows)
    assert torch.equal(cache.rows[:, :, :, 6 : 6 + prompt], prefix)
    assert cache.length == prompt + len(path)
    moved = cache.rows[:, :, :, 6 + prompt : 6 + cache.length]
    assert torch.equal(moved, target_rows[:, :, :, path])


def test_regions_refuse_what_does_not_fit():
    cache = make(draft_rows=2, max_length=3, target_rows=4)
    assert cache.target_view(7).read == (2, 9)  # a prompt
    with pytest.raises(ValueError, match="behind a prefix of 0 tokens"):
        cache.target_view(8)
    with pytest.raises(ValueError, match="draft region"):
        cache.draft_view(1, 2)
    with pytest.raises(ValueError, match="max_length"):
        cache.extend(4)
