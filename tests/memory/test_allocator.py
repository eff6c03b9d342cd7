"""The allocator's rounding, and the part of a budget that stays free."""

import pytest

from subspec.memory.allocator import GIB, MIB, Allocation, headroom, least_budget, rounded


@pytest.mark.parametrize("used", [0, 5 * GIB, 99 * 64 * MIB, 99 * 64 * MIB + 1, 7_987_654_321, 140 * GIB])
def test_the_least_budget_leaves_its_headroom_and_no_more(used):
    budget = least_budget(used)
    assert budget - headroom(budget) >= used
    assert budget - 1 - headroom(budget - 1) < used


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        (0, 0),
        (1, 512),
        (MIB, MIB),
        (2 * MIB, 2 * MIB),
        (2 * MIB + 2**15, -(-20 * MIB // 9)),
        (9 * MIB, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (466_115_584, 446 * MIB),
    ],
)
def test_the_allocator_rounds_up(size, taken):
    assert rounded(size) == taken
    assert Allocation("x", ((size, 3), (512, 2))).bytes == 3 * size + 1024
    assert Allocation("x", ((size, 3), (512, 2))).rounding == 3 * (taken - size)
