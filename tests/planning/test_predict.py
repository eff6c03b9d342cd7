"""Predictions: the arithmetic by hand, and the committed measurements."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from subspec.config.enums import Codec, Proposer
from subspec.config.schema import SubstituteDraftConfig
from subspec.errors import ConfigError
from subspec.planning.acceptance import Acceptance, constant_survival
from subspec.planning.gpu_specs import find_gpu
from subspec.planning.predict import guessed_levels, predict
from subspec.planning.predict_timing import (
    EFFICIENCY,
    LEVEL_LAYER_S,
    OTHER_S,
    ROW_RATE,
    TENSOR_EFFICIENCY,
    Machine,
    Sizes,
    level_seconds,
    pass_seconds,
    plain,
    serial,
)
from subspec.targets.planted import SHAPES
from tests.helpers.planning import settings

FOLDER = Path(__file__).parents[2] / "experiments" / "predict"

SIZES = Sizes(
    streamed=10_000_000_000, ring=1_000_000_000, level=4_000_000_000, target=12_000_000_000, head=0, layers=20
)
MACHINE = Machine(link_gb_per_s=50.0, memory_gb_per_s=1000.0)


PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


def script(name):
    """A script of ``experiments/predict`` as a module."""
    spec = importlib.util.spec_from_file_location(f"predict_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check():
    return script("check")


# ------------------------------------------------------------------------------------------- acceptance


def test_one_tau_becomes_a_curve():
    found = Acceptance.from_tau(1 + 0.5 + 0.25, 2)
    assert found.per_level == pytest.approx(0.5)
    assert [found.tau(depth) for depth in (0, 1, 2, 3)] == pytest.approx([1, 1.5, 1.75, 1.875])
    assert [found.extrapolated(depth) for depth in (1, 2, 3)] == [False, False, True]
    assert constant_survival(1.0, 5) == pytest.approx(0.0, abs=1e-9)
    assert constant_survival(6.0, 5) == pytest.approx(1.0)


@pytest.mark.parametrize(("tau", "depth"), [(0.9, 4), (5.1, 4), (2.0, 0)])
def test_a_tau_that_no_such_tree_has(tau, depth):
    with pytest.raises(ConfigError, match="set tau_depth"):
        Acceptance.from_tau(tau, depth)


def test_a_measured_curve_is_taken_as_it_is_and_continued_with_its_own_survival():
    found = Acceptance.from_counts([10, 10, 10], [9, 6, 3], "a run")
    assert [found.survival(depth) for depth in (0, 1, 2, 3)] == [1.0, 0.9, 0.6, 0.3]
    assert found.tau(3) == pytest.approx(2.8)
    p = constant_survival(2.8, 3)
    assert found.survival(5) == pytest.approx(0.3 * p**2)
    assert found.notes == ()


def test_an_adaptive_tree_is_predicted_by_the_levels_that_it_drafts():
    found = Acceptance.from_counts([10, 8, 4], [9, 6, 3], "a run", adaptive=True)
    assert found.tau(3) == pytest.approx(1 + 1.8)  # that run's own tau
    assert [found.levels(depth) for depth in (1, 2, 3, 5)] == pytest.approx([1, 1.8, 2.2, 3.0])
    way = serial(SIZES, replace(MACHINE, level_s=0.01), found, 3)
    assert (way.draft_s, way.tau) == pytest.approx((0.022, 2.8))


def test_a_rise_in_a_curve_is_noise_and_thin_levels_are_said():
    found = Acceptance.from_counts([10, 4, 2, 0], [8, 4, 1, 0], "a run")
    assert [found.survival(depth) for depth in (1, 2, 3)] == [0.8, 0.8, 0.5]
    assert found.depth == 3
    assert "only 2 of 10 passes drafted depth 3" in found.notes[0]


def test_nothing_drafted():
    with pytest.raises(ConfigError, match="no draft tree"):
        Acceptance.from_counts([], [], "a run")


# ----------------------------------------------------------------------------------------------- timing


def test_an_iteration_by_hand():
    level = 20 * LEVEL_LAYER_S + 4e9 / (1000e9 * EFFICIENCY)
    assert level_seconds(SIZES, MACHINE) == pytest.approx(level)
    assert level_seconds(SIZES, replace(MACHINE, level_s=0.002)) == 0.002
    # The link needs 0.2 s; while the draft works it fills the ring, 0.02 s of it. Then it waits for the first layer,
    # and the last one for it.
    layer = 12e9 / 20 / (1000e9 * EFFICIENCY)
    assert pass_seconds(SIZES, MACHINE, draft_s=1.0) == pytest.approx(0.18 + 2 * layer + OTHER_S)
    # Plainly the link never pauses: what the end of a pass takes is filled ahead.
    assert plain(SIZES, MACHINE).seconds == pytest.approx(0.2)
    assert plain(SIZES, MACHINE).tokens_per_s == pytest.approx(5.0)
    way = serial(SIZES, MACHINE, Acceptance.from_tau(4, 8), 8)
    assert way.draft_s == pytest.approx(8 * level)
    assert way.tokens_per_s == pytest.approx(4 / (8 * level + pass_seconds(SIZES, MACHINE, 8 * level)))
    assert way.ceiling == pytest.approx(4 * 5.0)
    assert way.tokens_per_s < way.ceiling


def test_with_everything_resident_the_device_is_the_limit():
    resident = replace(SIZES, streamed=0, ring=0)
    found = plain(resident, MACHINE)
    assert found.seconds == pytest.approx(12e9 / (1000e9 * EFFICIENCY) + OTHER_S)
    assert found.ceiling is None


@pytest.mark.parametrize(("rows", "tiles"), [(1, 0), (8, 0), (9, 1), (32, 3), (64, 7)])
@pytest.mark.parametrize(("operations", "rate"), [(512, 512 * TENSOR_EFFICIENCY), (4096, ROW_RATE)])
def test_rows_behind_the_first_eight_take_the_time_of_their_operations(rows, tiles, operations, rate):
    sizes, machine = replace(SIZES, rows=rows, row_operations=10**10), replace(MACHINE, tensor=(100.0, operations))
    more = level_seconds(sizes, machine) - level_seconds(SIZES, machine)
    assert more == pytest.approx(tiles * 8 * 1e10 / (100e9 * rate))
    assert level_seconds(sizes, MACHINE) == level_seconds(SIZES, MACHINE), "of an unknown GPU they take none"


def test_a_pass_waits_for_the_gpu_where_it_is_slower_than_the_link():
    """It restores coded layers, then computes them; a coded LM head is restored at the end."""
    machine = replace(MACHINE, tensor=(100.0, 1000))
    slow = replace(SIZES, restored=10**11, operations=TENSOR_EFFICIENCY * 10**14, restore_rate=0.5)
    memory = 1e12 * EFFICIENCY
    assert pass_seconds(slow, machine, 1.0) == pytest.approx(2.0 + 1.0 + OTHER_S)
    assert pass_seconds(replace(slow, restore_rate=50), machine, 1.0) == pytest.approx(3.5e11 / memory + 1.0 + OTHER_S)
    fast = replace(SIZES, restored=10**9, restore_rate=50, restored_head=10**9)
    layer = (3.5e9 / memory + 12e9 / memory) / 20
    assert pass_seconds(fast, machine, 1.0) == pytest.approx(0.18 + 2 * layer + 0.01 + OTHER_S)
    assert pass_seconds(slow, MACHINE, 1.0) == pass_seconds(SIZES, MACHINE, 1.0), "of an unknown GPU"


def test_a_cascade_by_hand():
    sizes = replace(SIZES, rows=32, row_operations=10**10, proposals=int(1e9 * EFFICIENCY))
    machine = replace(MACHINE, tensor=(100.0, 1000))
    cascade = replace(Acceptance.from_tau(4, 8), passes=0.5)
    level = level_seconds(sizes, machine)
    assert serial(sizes, machine, cascade, 8).draft_s == pytest.approx(4 * (level + 0.001))
    assert serial(sizes, replace(machine, proposals_s=0.02), cascade, 8).draft_s == pytest.approx(4 * (level + 0.02))
    assert serial(sizes, replace(machine, level_s=0.01), cascade, 8).draft_s == pytest.approx(0.04)
    assert serial(sizes, machine, cascade, 1).draft_s == pytest.approx(level + 0.001), "a tree takes a pass"


@pytest.mark.parametrize(("width", "proposed", "levels"), [(6, 32, 5), (1, 7, 7), (6, 6, 1), (6, 7, 2), (4, 64, 9)])
def test_guesses_reach_several_levels(width, proposed, levels):
    assert guessed_levels(width, proposed) == levels


def test_a_cascade_computes_more_rows_and_keeps_the_proposals():
    h200 = find_gpu("H200")
    machine = Machine(50.0, h200.memory_gb_per_s, tensor=h200.tensor)
    config, model = settings(8.0, codec=Codec.substitute), SHAPES["qwen2_5_7b"]()
    draft = SubstituteDraftConfig(name="subspec", proposer=Proposer.prompt_lookup, proposed=26)
    acceptance = replace(Acceptance.from_tau(24.0, 48), passes=0.5)
    alone = predict(config, model, machine, Acceptance.from_tau(24.0, 48), depths=())
    found = predict(replace(config, draft=draft), model, machine, acceptance, depths=())
    assert (alone.rows, found.rows, found.proposals_s) == (6, 32, 0.0)
    assert found.level_s > 1.5 * alone.level_s
    assert found.depths[0].iteration.draft_s == pytest.approx(24 * found.level_s)
    assert found.depths[0].resident <= alone.depths[0].resident
    few = predict(replace(config, draft=replace(draft, proposed=10)), model, machine, acceptance, depths=())
    assert (few.rows, few.proposals_s) == (16, 0.0)  # the draft has an LM head of its own, as without a proposer
    with pytest.raises(ConfigError, match="level_ms"):
        predict(replace(config, draft=draft), model, Machine(50.0, 4800.0), acceptance, depths=())


def test_layers_on_a_disk_are_read_at_its_bandwidth():
    config, model = settings(7.9, codec=Codec.substitute, ram_gib=4.5), SHAPES["qwen2_5_7b"]()
    machine, acceptance = Machine(50.0, 4000.0, level_s=0.001), Acceptance.from_tau(4.0, 8)
    with pytest.raises(ConfigError, match=r"offload\.ram_gib=4\.5.*set offload\.disk_gb_per_s"):
        predict(config, model, machine, acceptance)
    slow, fast = (
        predict(replace(config, offload=replace(config.offload, disk_gb_per_s=rate)), model, machine, acceptance, [8])
        for rate in (0.5, 100.0)
    )
    one, plan = slow.depths[0].iteration, slow.plan
    disk_s, drafted = plan.disk_bytes_per_pass / 0.5e9, 8 * 0.001
    assert one.ceiling == pytest.approx(4 / disk_s)
    assert disk_s - 2 * drafted < one.pass_s < disk_s + drafted, "its ring fills while the draft works"
    assert slow.plain.seconds > plan.plain_disk_bytes / 0.5e9 - 1e-3
    whole = settings(7.9, codec=Codec.substitute, ram_gib=64.0)
    assert fast.depths[0].iteration == predict(whole, model, machine, acceptance, [8]).depths[0].iteration


# --------------------------------------------------------------------------------- committed measurements


def test_the_constants_are_the_fit(check):
    layer, share = check.fitted()
    assert layer == pytest.approx(LEVEL_LAYER_S, rel=0.02)
    assert share == pytest.approx(EFFICIENCY, rel=0.01)


def test_the_errors_are_those_the_page_states(check):
    lines = check.lines()
    assert "\n".join(lines) in PAGE, "run experiments/predict/check.py and put its table into the README"
    errors = {(one.run, one.note): one.error for one in check.compare()}
    assert len(errors) == 5
    assert all(abs(error) < 0.035 for error in errors.values())
    (streaming,) = [e for (run, _), e in errors.items() if "plain streaming" in run]
    assert abs(streaming) < 0.01


def test_levels_are_predicted_on_the_card_they_were_fitted_on(check):
    errors = [(layers * LEVEL_LAYER_S + read / EFFICIENCY) / ms - 1 for _, layers, read, ms in check.levels()]
    assert len(errors) == 7
    assert all(abs(error) < 0.025 for error in errors)
    errors = {rows: predicted / measured - 1 for rows, measured, predicted in check.rows()}
    assert set(errors) == {6, 8, 12, 16, 24, 32, 64}
    assert all(abs(error) < 0.12 for error in errors.values())
    assert all(abs(errors[rows]) < 0.03 for rows in (24, 32, 64))


def test_the_page_has_the_figures_of_other_cards():
    cards = script("cards")
    name = "prompt_lookup, 10 nodes"
    for row in (cards.row("4-bit LM head"), cards.cascade_row(name, 0.5), cards.needed_row(name)):
        assert row in PAGE, "run experiments/predict/cards.py and put its tables into the README"
