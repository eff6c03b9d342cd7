"""The choice of tile shapes: measured once, kept, and of no consequence for bits."""

import pytest
import torch

from subspec.errors import SubspecError
from subspec.kernels.choose_tiling import MOST_COLUMNS, choose_tilings
from subspec.kernels.invariant_linear import CANDIDATES, REFERENCE

CPU = torch.device("cpu")
SHAPES = {"out": (3584, 3584), "head": (152064, 3584)}


class Card:
    """Stands in for the device: the candidate number ``best`` is the fastest, those in ``fails`` do not run."""

    def __init__(self, best=2, fails=()):
        self.best, self.fails, self.asked = best, fails, []

    def __call__(self, tiling, role, n, k):
        self.asked.append((str(tiling), role, n, k))
        number = CANDIDATES.index(tiling)
        if number in self.fails:
            raise RuntimeError("out of resource: shared memory")
        return 1e-6 * (1 + abs(number - self.best))


def choose(folder, card, shapes=SHAPES, notes=None):
    note = (notes if notes is not None else []).append
    return choose_tilings(shapes, torch.bfloat16, CPU, note=note, folder=folder, timer=card)


def test_the_fastest_is_taken_and_kept(tmp_path):
    card, notes = Card(best=3), []
    tilings = choose(tmp_path, card, notes=notes)
    assert tilings == {"out": CANDIDATES[3], "head": CANDIDATES[3]}
    assert {role for _, role, _, _ in card.asked} == {"out", "head"}
    assert len(notes) == 1
    assert max(n for _, _, n, _ in card.asked) == MOST_COLUMNS  # a head is timed in part
    again, notes = Card(best=0), []
    assert choose(tmp_path, again, notes=notes) == tilings
    assert not again.asked
    assert not notes


def test_only_what_is_missing_is_measured(tmp_path):
    choose(tmp_path, Card())
    card = Card()
    choose(tmp_path, card, {**SHAPES, "down": (3584, 18944)})
    assert {role for _, role, _, _ in card.asked} == {"down"}


def test_shapes_that_a_card_has_no_room_for_are_passed_over(tmp_path):
    card = Card(best=0, fails=(0, 1))
    assert choose(tmp_path, card)["out"] == CANDIDATES[2]


def test_a_card_that_runs_none_is_named(tmp_path):
    with pytest.raises(SubspecError, match=r"decoding\.bitwise.*shared memory"):
        choose(tmp_path, Card(fails=range(len(CANDIDATES))))
    assert choose(tmp_path, Card())["out"] == CANDIDATES[2]  # a failure is not kept


def test_on_a_cpu_a_small_shape_stands_in():
    assert set(choose_tilings(SHAPES, torch.bfloat16, CPU).values()) == {REFERENCE}
