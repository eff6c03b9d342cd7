import pytest
import torch

from subspec.decoding.adaptive import Adaptive, Calibration
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import IterationOutcome, level_masses


def grow_until_it_stops(policy, per_level):
    """Levels drafted when every level keeps the share ``per_level`` of the last one's mass in its best node."""
    tree = Tree(policy.capacity, torch.device("cpu"))
    frontier = tree.plant(torch.tensor([0]))
    vocab = 8
    odds = torch.full((vocab,), (1 - per_level) / (vocab - 1))
    odds[0] = per_level
    while policy.wants_level(tree):
        frontier = policy.grow(tree, frontier, odds.log().expand(frontier.numel(), vocab), 1.0)
    return tree


def taught(policy, accepted, levels=6, draft_s=0.0, verify_s=1.0, times=5):
    for _ in range(times):
        policy.learn(IterationOutcome(levels, levels + 1, (accepted,), draft_s, verify_s))
    return policy


def adaptive(**options):
    return Adaptive(20, 1, **{"level_cost": 0.1, "check_every": 1, "min_depth": 1, **options})


def test_a_confident_draft_goes_deeper_than_an_unsure_one():
    sure = grow_until_it_stops(taught(adaptive(), accepted=4), 0.99).levels
    unsure = grow_until_it_stops(taught(adaptive(), accepted=4), 0.5).levels
    assert unsure < sure
    assert unsure <= 4


def test_dear_levels_make_shallow_trees():
    cheap = grow_until_it_stops(taught(adaptive(level_cost=0.01), accepted=4), 0.8).levels
    dear = grow_until_it_stops(taught(adaptive(level_cost=0.5), accepted=4), 0.8).levels
    assert dear < cheap


def test_depth_limits_hold():
    assert grow_until_it_stops(taught(adaptive(level_cost=1e-9), accepted=4), 1.0).levels == 20
    assert grow_until_it_stops(taught(adaptive(level_cost=100.0, min_depth=7), accepted=4), 0.5).levels == 7


def test_measured_times_count_when_no_cost_is_given():
    slow = taught(adaptive(level_cost=None), accepted=4, draft_s=6.0)
    fast = taught(adaptive(level_cost=None), accepted=4, draft_s=0.06)
    assert grow_until_it_stops(slow, 0.8).levels < grow_until_it_stops(fast, 0.8).levels


def test_a_draft_that_yields_no_numbers_is_not_trusted():
    assert grow_until_it_stops(taught(adaptive(), accepted=4), torch.nan).levels <= 2


def test_a_chain_does_not_sharpen_the_probabilities_that_stop_it():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    for width in (1, 2):
        tree = Tree(5, torch.device("cpu"))
        frontier = Adaptive(2, width).grow(tree, tree.plant(torch.tensor([0])), logits, temperature=0.2)
        expected = logits if width == 1 else logits / 0.2
        assert torch.allclose(tree.scores[frontier], expected.log_softmax(-1)[0, :width], atol=1e-5)


def test_the_first_tree_is_drafted_whole_to_learn_from():
    assert grow_until_it_stops(adaptive(), 0.5).levels == 20


@pytest.mark.parametrize(("accepted", "least", "most"), [(1, 0.7, 1), (4, 0, 0.06)])
def test_nothing_is_drafted_while_plain_decoding_is_faster(accepted, least, most):
    policy, alone = Adaptive(6, 1, level_cost=0.5, min_depth=0), 0
    for _ in range(400):
        policy.begin_tree()
        drafting = policy.wants_level(Tree(policy.capacity, torch.device("cpu")))
        alone += not drafting
        levels, got = (6, (accepted,)) if drafting else (0, (0,))
        policy.learn(IterationOutcome(levels, levels + 1, got, 0.0, 1.0))
    assert least <= alone / 400 <= most


def test_calibration_learns_an_overconfident_draft():
    calibration = Calibration()
    trusting = calibration.probability(0.1)
    assert trusting > 0.8
    for _ in range(50):
        calibration.observe(0.1, accepted=False)
    assert calibration.probability(0.1) < 0.1
    assert calibration.probability(1e9) < trusting  # the last bin takes everything beyond


def test_several_texts_draft_on_while_their_levels_pay_together():
    trees = {text: Tree.several(text, 21, torch.device("cpu")) for text in (1, 3)}
    for own in trees.values():
        for tree, score in zip(own, (0.2, 0.9, 0.9), strict=False):
            tree.plant(torch.tensor([0]))
            tree.append(torch.tensor([1]), torch.tensor([0]), torch.tensor([score]).log())
    policy = taught(adaptive(level_cost=0.12), accepted=1)
    assert not policy.wants_level(*trees[1])
    assert policy.wants_level(*trees[3])
    assert [round(mass, 3) for mass in level_masses(trees[3])] == [0.2, 0.9, 0.9]
    policy.learn(IterationOutcome(1, 6, (0, 1, 1), 0.0, 1.0))
    alone = taught(adaptive(), accepted=2)
    together = adaptive()
    for _ in range(5):
        together.learn(IterationOutcome(6, 28, (2, 1, 3, 2), 0.0, 1.0))
    assert alone._tokens == pytest.approx(together._tokens)  # of a text


@pytest.mark.parametrize(
    ("width", "texts", "breadth"), [(6, 1, 6), (6, 5, 6), (6, 8, 4), (2, 8, 2), (40, 1, 40), (40, 2, 16), (6, 64, 1)]
)
def test_trees_beside_many_others_are_narrower(width, texts, breadth):
    policy = Adaptive(3, width)
    policy.begin_tree(texts)
    tree = Tree(policy.capacity, torch.device("cpu"))
    frontier = policy.grow(tree, tree.plant(torch.tensor([0])), torch.randn(1, 50), 1.0)
    assert policy.grow(tree, frontier, torch.randn(breadth, 50), 1.0).numel() == frontier.numel() == breadth
    policy.begin_tree()
    assert policy.breadth == width


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"min_depth in 0\.\.20"):
        adaptive(min_depth=21)
    with pytest.raises(ValueError, match="check_every"):
        adaptive(check_every=0)
