import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.decoding.verify import verify

CPU = torch.device("cpu")


@st.composite
def trees(draw, vocab=6):
    """A random tree with distinct tokens among siblings, as (Tree, parents, tokens)."""
    tree = Tree(40, CPU)
    tree.plant(torch.tensor([draw(st.integers(0, vocab - 1))]))
    parents, tokens, level = [0], [int(tree.tokens[0])], [0]
    for _ in range(draw(st.integers(0, 5))):
        children = []
        for parent in level:
            for token in sorted(draw(st.sets(st.integers(0, vocab - 1), max_size=2))):
                children.append((parent, token))
        if not children:
            break
        slots = tree.append(
            torch.tensor([t for _, t in children]), torch.tensor([p for p, _ in children]), torch.zeros(len(children))
        )
        level = slots.tolist()
        parents += [p for p, _ in children]
        tokens += [t for _, t in children]
        if tree.size > 30:
            break
    return tree, parents, tokens


def path_to(parents, node):
    path = [node]
    while node:
        node = parents[node]
        path.insert(0, node)
    return path


def walked(parents, tokens, chosen):
    """Accepted nodes and emitted tokens when a walk from the root follows what the target has ``chosen``."""
    path, emitted = [0], []
    while True:
        emitted.append(int(chosen[path[-1]]))
        edges = zip(parents[1:], tokens[1:], strict=True)
        child = next((n for n, edge in enumerate(edges, 1) if edge == (path[-1], emitted[-1])), None)
        if child is None:
            return path, emitted
        path.append(child)


@given(trees())
def test_ancestors_and_depths_match_walking_the_parents(made):
    tree, parents, _ = made
    for node in range(tree.size):
        path = path_to(parents, node)
        assert tree.ancestors[node].nonzero()[:, 0].tolist() == path
        assert int(tree.depths[node]) == len(path) - 1


@given(trees(), st.integers(0, 2**32 - 1))
def test_verify_follows_the_targets_choices_like_a_walk(made, seed):
    tree, parents, tokens = made
    chosen = torch.randint(0, 6, (tree.size,), generator=torch.Generator().manual_seed(seed))
    path, emitted = walked(parents, tokens, chosen)
    acceptance = verify(tree, chosen)
    assert acceptance.read()[:2] == (path, emitted)
    assert acceptance.bonus.tolist() == emitted[-1:]
    assert acceptance.path(len(path)).tolist() == path


def test_tree_refuses_more_nodes_than_it_has_room_for():
    tree = Tree(2, CPU)
    tree.plant(torch.tensor([1]))
    with pytest.raises(ValueError, match="capacity of 2"):
        tree.append(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.zeros(2))


def test_planting_again_leaves_nothing_of_the_old_tree():
    tree = Tree(5, CPU)
    tree.plant(torch.tensor([1]))
    tree.append(torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([-1.0, -2.0]))
    tree.append(torch.tensor([3, 4]), torch.tensor([1, 2]), torch.tensor([-1.0, -2.0]))
    tree.plant(torch.tensor([9]))
    slots = tree.append(torch.tensor([7]), torch.tensor([0]), torch.tensor([-0.5]))
    assert slots.tolist() == [1]
    assert tree.ancestors[:2].nonzero().tolist() == [[0, 0], [1, 0], [1, 1]]
    assert tree.depths[:2].tolist() == [0, 1]
    assert tree.scores[0] == 0


@given(trees(), trees(), st.integers(0, 24), st.booleans())
def test_a_copy_is_the_tree_that_was_copied(made, earlier, room, pruned):
    """In a tree with more room, which held another one."""
    tree, copy = made[0], Tree(made[0].capacity + room, CPU)
    copy.copy_from(earlier[0])
    if pruned:
        tree.keep(torch.tensor([0, *path_to(made[1], tree.size - 1)[1:]]))
    copy.copy_from(tree)
    assert (copy.size, copy.levels, copy.level_size) == (tree.size, tree.levels, tree.level_size)
    for name in ("tokens", "parents", "depths", "scores"):
        assert torch.equal(getattr(copy, name)[: tree.size], getattr(tree, name)[: tree.size])
    seen = copy.ancestors[: tree.size]
    assert torch.equal(seen[:, : tree.capacity], tree.ancestors[: tree.size])
    assert not seen[:, tree.capacity :].any()
    nodes = torch.arange(tree.size)
    assert torch.equal(copy.drafted_number(nodes), tree.drafted_number(nodes))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31), width=st.integers(1, 5), depth=st.integers(1, 4), temperature=st.sampled_from([0.2, 1])
)
def test_beam_keeps_the_best_of_all_children(seed, width, depth, temperature):
    generator = torch.Generator().manual_seed(seed)
    policy, vocab = Beam(depth, width), 7
    tree = Tree(policy.capacity, CPU)
    frontier = tree.plant(torch.tensor([0]))
    for _ in range(depth):
        logits = torch.randn(frontier.numel(), vocab, generator=generator) * 2
        log_probs = (logits / temperature).log_softmax(-1)
        every = {
            (int(node), token): float(tree.scores[node] + log_probs[row, token])
            for row, node in enumerate(frontier)
            for token in range(vocab)
        }
        best = sorted(every.values(), reverse=True)[:width]
        frontier = policy.grow(tree, frontier, logits, temperature)
        got = [(int(tree.parents[n]), int(tree.tokens[n])) for n in frontier]
        assert len(set(got)) == width
        torch.testing.assert_close(tree.scores[frontier], torch.tensor(best), rtol=1e-5, atol=1e-5)
        for key, score in zip(got, tree.scores[frontier].tolist(), strict=True):
            assert every[key] == pytest.approx(score, abs=1e-4)
    assert tree.size == policy.capacity
    assert not policy.wants_level(tree)


def test_scores_survive_depths_where_half_precision_would_underflow():
    policy = Beam(48, 2)
    tree = Tree(policy.capacity, CPU)
    frontier = tree.plant(torch.tensor([0]))
    while policy.wants_level(tree):
        frontier = policy.grow(tree, frontier, torch.zeros(frontier.numel(), 50), 1.0)
    expected = torch.full((2,), -48 * torch.tensor(50.0).log().item())
    torch.testing.assert_close(tree.scores[frontier], expected)
