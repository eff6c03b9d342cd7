"""EAGLE-2's tree against naive references: expansion, re-ranking, and verification of what was kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.decoding.eagle2 import Eagle2, drafted_nodes
from subspec.decoding.engine import Engine
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.decoding.verify import verify
from tests.decoding.test_tree import path_to, walked
from tests.helpers.drafts import RandomDraft, engine_for
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
VOCAB = 9


def grow(policy, tree, seed, logits_of=None):
    """Grows ``tree`` from random logits (or from ``logits_of(rows)``), without re-ranking; the last frontier."""
    generator = torch.Generator().manual_seed(seed)
    frontier = tree.plant(torch.tensor([seed % VOCAB]))
    while policy.wants_level(tree):
        rows = frontier.numel()
        logits = logits_of(rows) if logits_of else torch.randn(rows, VOCAB, generator=generator) * 2
        frontier = policy.grow(tree, frontier, logits, 1.0)
    return frontier


def expanded(policy, seed, logits_of=None):
    tree = Tree(policy.capacity, CPU)
    grow(policy, tree, seed, logits_of)
    return tree


def described(tree):
    """Path of tokens -> cumulative log-probability, for every node."""
    parents = tree.parents[: tree.size].tolist()
    tokens = tree.tokens[: tree.size].tolist()
    return {
        tuple(tokens[step] for step in path_to(parents, node)): float(tree.scores[node]) for node in range(tree.size)
    }


shapes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 40), st.integers(0, 2**31))


@settings(max_examples=25)
@given(shapes)
def test_every_frontier_node_gets_its_best_children_and_the_best_of_these_go_on(made):
    depth, width, total, seed = made
    policy = Eagle2(depth, width, total)
    generator = torch.Generator().manual_seed(seed)
    tree = Tree(policy.capacity, CPU)
    frontier = tree.plant(torch.tensor([0]))
    rows = 0
    for level in range(depth):
        logits = torch.randn(frontier.numel(), VOCAB, generator=generator) * 2
        rows += frontier.numel()
        log_probs = logits.double().log_softmax(-1)
        expected = {
            (int(node), token): float(tree.scores[node].double() + log_probs[row, token])
            for row, node in enumerate(frontier)
            for token in log_probs[row].topk(width).indices.tolist()
        }
        frontier = policy.grow(tree, frontier, logits, 1.0)
        new = range(tree.size - len(expected), tree.size)
        got = {(int(tree.parents[n]), int(tree.tokens[n])): float(tree.scores[n]) for n in new}
        assert got.keys() == expected.keys()
        for key, score in got.items():
            assert score == pytest.approx(expected[key], abs=1e-4)
        best = sorted((float(tree.scores[n]) for n in new), reverse=True)[:width]
        assert tree.scores[frontier].tolist() == best
        assert tree.depths[frontier].tolist() == [level + 1] * width
    assert tree.size == policy.capacity == drafted_nodes(depth, width)
    assert rows == policy.draft_rows
    assert not policy.wants_level(tree)


@settings(max_examples=30)
@given(shapes)
def test_re_ranking_keeps_the_best_nodes_and_renumbers_them(made):
    depth, width, total, seed = made
    policy = Eagle2(depth, width, total)
    tree = expanded(policy, seed)
    before, size = described(tree), tree.size
    tokens, parents = tree.tokens[:size].clone(), tree.parents[:size].tolist()
    policy.finish(tree)
    # The root scores 0, every other node less or as much with a larger number.
    best = sorted(range(size), key=lambda node: (-list(before.values())[node], node))[:total]
    kept = sorted(best)
    assert tree.size == len(kept) == min(total, size) == policy.pass_nodes
    assert tree.tokens[: tree.size].tolist() == tokens[kept].tolist()
    assert tree.drafted_number(torch.arange(tree.size)).tolist() == kept
    assert [kept[parent] for parent in tree.parents[: tree.size].tolist()] == [parents[node] for node in kept]
    after = described(tree)
    assert after.items() <= before.items()
    rows = tree.ancestors[: tree.size]  # leftovers behind the kept nodes, which padded passes take along, are not seen
    for node in range(tree.size):
        path = path_to(tree.parents.tolist(), node)
        assert rows[node].nonzero()[:, 0].tolist() == path
        assert int(tree.depths[node]) == len(path) - 1
    assert tree.last_level.numel() == (0 if total < size else width ** min(depth, 2))


@pytest.mark.parametrize("logit", [0.0, 60.0])
@pytest.mark.parametrize("total", range(2, 20))
def test_between_equal_scores_ancestors_are_kept(total, logit):
    """One certain token (60: a probability of 1 in float32, so a chain of equal scores), or none preferred at all."""
    policy = Eagle2(4, 3, total)

    def logits_of(rows):
        logits = torch.zeros(rows, VOCAB)
        logits[:, 4] = logit
        return logits

    tree = expanded(policy, 0, logits_of)
    if logit:
        assert float(tree.scores.max()) == 0 == float(tree.scores[tree.size - 9 : tree.size].max())
    policy.finish(tree)
    assert tree.size == total
    kept = tree.drafted_number(torch.arange(tree.size)).tolist()
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    parents = tree.parents[:total].tolist()
    assert all(parents[node] < node for node in range(1, total))
    for node in range(total):
        assert int(tree.depths[node]) == len(path_to(parents, node)) - 1


def test_no_child_scores_higher_than_its_parent_however_it_is_rounded():
    policy = Eagle2(5, 3, 30)
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 30.0, 1e4):
        tree = expanded(policy, 0, lambda rows, s=scale: torch.randn(rows, VOCAB, generator=generator) * s)
        assert (tree.scores[: tree.size] <= tree.scores[tree.parents[: tree.size]]).all()


@settings(max_examples=25)
@given(shapes, st.integers(0, 2**31))
def test_verification_of_what_was_kept_is_a_walk_through_it(made, choice_seed):
    depth, width, total, seed = made
    policy = Eagle2(depth, width, total)
    tree = expanded(policy, seed)
    levels = tree.levels
    policy.finish(tree)
    parents, tokens = tree.parents[: tree.size].tolist(), tree.tokens[: tree.size].tolist()
    chosen = torch.randint(0, VOCAB, (tree.size,), generator=torch.Generator().manual_seed(choice_seed))
    path, emitted = walked(parents, tokens, chosen)
    acceptance = verify(tree, chosen, levels)
    deepest = max(len(path_to(parents, n)) - 1 for n in range(tree.size))
    assert acceptance.read() == (path, emitted, deepest)
    assert acceptance.bonus.tolist() == emitted[-1:]
    assert acceptance.path(len(path)).tolist() == path


def test_a_new_tree_has_nothing_of_one_that_was_re_ranked():
    policy = Eagle2(3, 3, 6)
    tree = expanded(policy, 1)
    policy.finish(tree)
    fresh, frontier = expanded(policy, 2), grow(policy, tree, 2)
    for name in ("tokens", "parents", "depths", "scores", "ancestors"):
        assert torch.equal(getattr(tree, name), getattr(fresh, name))
    assert torch.equal(tree.drafted_number(frontier), frontier)


def test_levels_that_were_re_ranked_away_are_not_counted_as_drafted():
    model = tiny_model("llama")

    class Flat(RandomDraft):
        """Nothing is likelier than anything else: deep nodes never make it."""

        def expand(self, tree, frontier):
            return torch.zeros(frontier.numel(), 320)

    engine = Engine(engine_for(model).target, Flat(320), Eagle2(5, 4, 5), max_length=64)
    stats = engine.generate([1, 2, 3], max_new_tokens=10).stats
    # The last pass wants one token, so the root alone.
    assert stats.drafted_by_depth == [stats.iterations - 1]
    assert stats.drafted_nodes == 4 * (stats.iterations - 1)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 2, 5), "depth"), ((2, 0, 5), "width"), ((2, 2, 1), "total_tokens")]
)
def test_shapes_that_make_no_tree_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Eagle2(*arguments)


def test_a_draft_of_captured_levels_refuses_a_part_of_one():
    pytest.importorskip("triton")
    from tests.levels.test_captured_draft import fused_draft, model_of

    model = model_of("qwen2", CPU, vocab_size=640)
    tree = expanded(Beam(3, 3), 0)
    with pytest.raises(ValueError, match="1 of 3 nodes"):
        fused_draft(model, CPU).expand(tree, tree.last_level[:1])


def test_a_draft_that_yields_no_numbers_still_makes_a_tree():
    """What is kept has its parents, so nothing but a whole path can be accepted."""
    policy = Eagle2(4, 3, 9)
    tree = Tree(policy.capacity, CPU)
    frontier = tree.plant(torch.tensor([0]))
    for level in range(4):
        logits = torch.randn(frontier.numel(), VOCAB, generator=torch.Generator().manual_seed(level))
        if level:
            logits[-1, level] = torch.nan
        frontier = policy.grow(tree, frontier, logits, 1.0)
    policy.finish(tree)
    assert not tree.scores[: tree.size].isnan().any()
    for node in range(1, tree.size):
        parent = int(tree.parents[node])
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.ancestors[node].sum() == tree.depths[node] + 1
