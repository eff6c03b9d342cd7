"""A tree that goes on where it was drafted ahead: same text, and node for node what a fresh schedule expects."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.decoding.decoder import Decoder
from subspec.decoding.engine import Engine
from subspec.decoding.growth import Beam
from subspec.decoding.reroot import level_start, reroot
from subspec.decoding.tree import Tree
from tests.kernels.test_fused_level import PROMPT, fused_draft, model_of

CPU = torch.device("cpu")
WIDTH = 3


def random_tree(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    growth = Beam(levels, WIDTH)
    tree = Tree(growth.capacity, CPU)
    frontier = tree.plant(torch.tensor([0]))
    for _ in range(levels):
        frontier = growth.grow(tree, frontier, torch.randn(frontier.numel(), 11, generator=generator), 1.0)
    return tree


def path_tokens(tree, node):
    """Tokens from the root to a node."""
    nodes = tree.ancestors[node, : tree.size].nonzero()[:, 0]
    return tree.tokens[nodes].tolist()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("level", [1, 2, 4])
def test_the_subtree_survives_and_nothing_else(seed, level):
    tree, old = random_tree(6, seed), random_tree(6, seed)
    child = level_start(level, WIDTH) + seed % WIDTH
    leaf = old.parents[child].view(1)
    kept = {
        tuple(path_tokens(old, node)[level:])
        for node in range(1, old.size)
        if old.ancestors[node, child] and node != child
    }
    result = reroot(tree, leaf, old.tokens[child].view(1), level, WIDTH)
    if not kept:
        assert result is None
        assert torch.equal(tree.tokens, old.tokens)
        return
    assert int(result) == child
    assert tree.size == 1 + tree.levels * WIDTH
    alive = [node for node in range(1, tree.size) if tree.alive[node]]
    assert {tuple(path_tokens(tree, node)) for node in alive} == kept
    for node in alive:
        assert tree.ancestors[node, 0]
        assert int(tree.depths[node]) == len(path_tokens(tree, node)) - 1
        assert tree.tokens[tree.parents[node]] == path_tokens(tree, node)[-2]
        assert tree.scores[node] <= 1e-5
    for node in range(1, tree.size):
        if not tree.alive[node]:
            assert tree.scores[node] == -torch.inf
    assert tree.alive[tree.size - WIDTH : tree.size].any()


def test_an_undrafted_bonus_keeps_nothing():
    tree = random_tree(4, 0)
    assert reroot(tree, tree.parents[4].view(1), torch.tensor([99]), 2, WIDTH) is None
    assert (
        reroot(tree, tree.parents[10].view(1), tree.tokens[10].view(1), 4, WIDTH) is None
    )  # no levels below
    assert tree.levels == 4


@pytest.mark.parametrize("seed", range(6))
def test_growing_on_never_builds_on_dead_nodes(seed):
    tree = random_tree(5, seed)
    start = level_start(2, WIDTH)
    child = start + int(tree.ancestors[: tree.size, start : start + WIDTH].sum(0).argmax())
    assert reroot(tree, tree.parents[child].view(1), tree.tokens[child].view(1), 2, WIDTH) is not None
    growth = Beam(6, WIDTH)
    before = tree.size
    logits = torch.randn(WIDTH, 11, generator=torch.Generator().manual_seed(seed))
    new = growth.grow(tree, tree.last_level, logits, 1.0)
    assert tree.alive[tree.parents[new]].all()
    assert tree.alive[new].all()
    assert new.tolist() == list(range(before, before + WIDTH))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("depth", "ahead"), [(2, 2)])
def test_text_is_the_same_with_levels_drafted_ahead(device, depth, ahead):
    device = torch.device(device)
    model = model_of("llama", device, vocab_size=640)
    count = 40 if device.type == "cuda" else 14
    plain = Engine(Decoder(model), max_length=96).generate(PROMPT, max_new_tokens=count)
    engine = Engine(Decoder(model), fused_draft(model, device), Beam(depth, 2, ahead), max_length=96)
    rerooted = []
    move = engine.draft.reroot
    engine.draft.reroot = lambda *place: (rerooted.append(place), move(*place))
    result = engine.generate(PROMPT, max_new_tokens=count)
    from subspec.decoding.audit import Auditor

    assert Auditor(Decoder(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert len(result.token_ids) == len(plain.token_ids)
    assert rerooted  # otherwise this shows nothing


@pytest.mark.parametrize("device", DEVICES)
def test_a_rerooted_trees_rows_are_where_its_schedule_has_them(device):
    """Drafting on after re-rooting must see the same rows as drafting the same tree afresh."""
    device = torch.device(device)
    model = model_of("qwen2", device, vocab_size=640)
    engine = Engine(Decoder(model), fused_draft(model, device), Beam(4, 2, 4), max_length=96)
    with torch.inference_mode():
        root = engine._prefill(PROMPT)[0]
        engine.draft_whole_tree(root)
        tree, rows = engine.tree, engine.cache.rows
        end = engine.cache.draft_rows - 1
        for level in (1, 3):
            engine.draft_whole_tree(root)
            start = level_start(level, 2)
            counts = tree.ancestors[: tree.size, start : start + 2].sum(0)
            child = start + int(counts.argmax())
            places = {}
            for node in range(tree.size - 2):
                if tree.ancestors[node, child]:
                    key = tuple(path_tokens(tree, node)[level:])
                    depth, offset = int(tree.depths[node]), 0
                    offset = node - level_start(depth, 2)
                    row = end if depth == 0 else end - depth * 2 + offset
                    places[key] = rows[:, :, :, row].clone()
            found = reroot(tree, tree.parents[child].view(1), tree.tokens[child].view(1), level, 2)
            assert found is not None
            engine.draft.reroot(found, level, tree.levels, 2)
            for node in range(tree.size - 2):
                if not tree.alive[node]:
                    continue
                depth = int(tree.depths[node])
                row = end if depth == 0 else end - depth * 2 + node - level_start(depth, 2)
                assert torch.equal(rows[:, :, :, row], places[tuple(path_tokens(tree, node))])


def test_levels_appended_after_shortening_live():
    tree = random_tree(4, 1)
    tree.alive[5:] = False
    tree.shorten(1, WIDTH)
    logits = torch.randn(WIDTH, 11, generator=torch.Generator().manual_seed(0))
    new = Beam(4, WIDTH).grow(tree, tree.last_level, logits, 1.0)
    assert tree.alive[new].all()
