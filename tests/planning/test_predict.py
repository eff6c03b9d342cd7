"""Predictions: the arithmetic by hand, the committed measurements, and the command."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from subspec.cli.predict import main
from subspec.cli.predict_measured import read_measured
from subspec.config.enums import Codec
from subspec.config.schema import (
    BitsByModule,
    HiggsConfig,
    HqqConfig,
    NoQuantConfig,
    PlantedTargetConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.errors import ConfigError
from subspec.planning.acceptance import Acceptance, constant_survival
from subspec.planning.gpu_specs import GpuSpec, find_gpu
from subspec.planning.predict_timing import (
    EFFICIENCY,
    LEVEL_LAYER_S,
    OTHER_S,
    Machine,
    Sizes,
    level_seconds,
    pass_seconds,
    plain,
    serial,
)
from tests.helpers.planning import settings
from tests.helpers.tiny import tiny_checkpoint
from tests.report.runs import config_of, plain_run, turns, write_run

ROOT = Path(__file__).parents[2]

SIZES = Sizes(
    streamed=10_000_000_000, ring=1_000_000_000, level=4_000_000_000, target=12_000_000_000, head=0, layers=20
)
MACHINE = Machine(link_gb_per_s=50.0, memory_gb_per_s=1000.0)


@pytest.fixture(scope="module")
def check():
    """``experiments/predict/check.py`` as a module."""
    file = ROOT / "experiments" / "predict" / "check.py"
    spec = importlib.util.spec_from_file_location("predict_check", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
    # The link needs 0.2 s; while the draft works it fills the ring, 0.02 s of it.
    assert pass_seconds(SIZES, MACHINE, draft_s=1.0) == pytest.approx(0.18 + OTHER_S)
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


# --------------------------------------------------------------------------------- committed measurements


def test_the_constants_are_the_fit(check):
    layer, share = check.fitted()
    assert layer == pytest.approx(LEVEL_LAYER_S, rel=0.02)
    assert share == pytest.approx(EFFICIENCY, rel=0.01)


def test_the_errors_are_those_the_page_states(check):
    page = (ROOT / "experiments" / "predict" / "README.md").read_text(encoding="utf-8")
    lines = check.lines()
    assert "\n".join(lines) in page, "run experiments/predict/check.py and put its table into the README"
    errors = {(one.run, one.note): one.error for one in check.compare()}
    exact_head = [e for (run, _), e in errors.items() if "own" not in run]
    assert len(exact_head) == 7
    assert all(abs(error) < 0.035 for error in exact_head)
    own_head = [e for (run, _), e in errors.items() if "own" in run]
    assert all(abs(error) < 0.085 for error in own_head)
    (streaming,) = [e for (run, _), e in errors.items() if "plain streaming" in run]
    assert abs(streaming) < 0.01


# ---------------------------------------------------------------------------------------------- measured


def test_acceptance_of_a_run(tmp_path):
    folder = write_run(tmp_path / "run", turns([30.0, 20.0, 24.0]))
    for place in (folder, folder / "records.jsonl", tmp_path):
        found = read_measured(place)
        assert [found.acceptance.survival(depth) for depth in (1, 2, 3)] == pytest.approx([1.0, 27 / 33, 16 / 33])
        assert found.level_s is None, "a CPU's levels say nothing about a GPU's"
        assert "of subspec hqq4, beam 3x2 of some_target: 1 run(s)" in found.acceptance.source


def predicted(target="x", width=2, draft=None, quant=None):
    """What a level's time is wanted for; as the runs of ``tests/report/runs.py``, which name no modules."""
    return replace(
        settings(tree=(3, width), codec=Codec.auto),
        target=PlantedTargetConfig(name=target),
        draft=draft or SubstituteDraftConfig(name="subspec"),
        quant=quant or HqqConfig(name="hqq", modules=[]),
    )


def test_acceptance_of_an_adaptive_run_is_for_adaptive_trees(tmp_path):
    config = config_of(tree={"name": "adaptive", "depth": 3, "width": 2})
    found = read_measured(write_run(tmp_path / "run", turns([30.0]), config))
    assert found.acceptance.drafted
    (note,) = found.check(predicted(target="some_target"))
    assert "tree=adaptive, and this prediction has beam" in note


def test_a_level_of_a_gpu_run_counts_on_its_own_card_only(tmp_path):
    records = turns([30.0, 20.0], device="cuda", target="planted_x", planted=True)
    found = read_measured(write_run(tmp_path / "run", records, gpu="NVIDIA H200"))
    drafting = 0.25 * (30 / 30.0 + 33 / 20.0)
    assert found.level_s == pytest.approx(drafting / (3 * 10 + 3 * 11))
    assert found.planted
    assert found.fits(predicted(), find_gpu("H200"))
    assert not found.fits(predicted(width=6), find_gpu("H200"))
    assert not found.fits(predicted(target="y"), find_gpu("H200"))
    assert not found.fits(predicted(), find_gpu("RTX 4090"))
    assert not found.fits(predicted(), None)


def test_a_measured_card_is_the_one_that_a_run_was_on(tmp_path):
    """``card=auto`` has the driver's name, be the card in the table or not."""
    for name in ("NVIDIA H200", "NVIDIA Something New"):
        records = turns([30.0, 20.0], device="cuda", target="x")
        found = read_measured(write_run(tmp_path / name, records, gpu=name))
        assert found.fits(predicted(), GpuSpec(name, 150.3, 4800, (4, 16), measured_link=55.0))
        assert not found.fits(predicted(), GpuSpec("NVIDIA L4", 24.0, 300, (4, 16), measured_link=20.0))


@pytest.mark.parametrize(
    "other",
    [
        {"draft": SmallModelDraftConfig(name="small_model")},
        {"quant": HiggsConfig(name="higgs", modules=[])},
        {"quant": HqqConfig(name="hqq", bits=8, modules=[])},
        {"quant": HqqConfig(name="hqq", modules=["attention"])},
        {"quant": HqqConfig(name="hqq", bits_by=BitsByModule(mlp=3), modules=[])},
    ],
)
def test_a_level_of_another_draft_or_of_other_bits_does_not_count(tmp_path, other):
    records = turns([30.0, 20.0], device="cuda", target="x")
    found = read_measured(write_run(tmp_path / "run", records, gpu="NVIDIA H200"))
    assert found.fits(predicted(), find_gpu("H200"))
    assert found.check(predicted()) == []
    assert not found.fits(predicted(**other), find_gpu("H200"))
    if "draft" in other:
        with pytest.raises(ConfigError, match=r"--from: .*draft=subspec.*draft=small_model"):
            found.check(predicted(**other))
    else:  # acceptance of other bits is a guess, and the prediction says so
        assert found.check(predicted(**other))[0].startswith("acceptance was measured with quant.")


def test_a_draft_that_is_not_quantized_has_no_bits_to_compare(tmp_path):
    records = turns([30.0, 20.0], device="cuda", target="x", draft="small_model")
    run = config_of({"name": "small_model", "path": "a/b", "temperature": 0.5})
    found = read_measured(write_run(tmp_path / "run", records, run, facts={"substitute": None}, gpu="H200"))
    same = predicted(draft=SmallModelDraftConfig(name="small_model", path="a/b"), quant=NoQuantConfig("none"))
    assert found.fits(same, find_gpu("H200"))
    assert not found.fits(replace(same, draft=SmallModelDraftConfig(name="small_model", path="a/c")), find_gpu("H200"))


def test_runs_that_cannot_tell(tmp_path):
    plain_run(tmp_path / "plain")
    with pytest.raises(ConfigError, match="no run there drafts"):
        read_measured(tmp_path / "plain")
    write_run(tmp_path / "a", turns([10.0]))
    write_run(tmp_path / "b", turns([10.0]), config_of(quant={"name": "hqq", "bits": 3}))
    with pytest.raises(ConfigError, match="runs of several methods"):
        read_measured(tmp_path)


# ------------------------------------------------------------------------------------------- the command


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return stop.value.code, output.out, output.err


def test_the_question_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    asked = ["target=planted_qwen2_5_7b", "offload.vram_gib=8", "card=rtx_4090", "tau=26", "depths=[16]"]
    files = [f"--json={tmp_path / 'found.json'}", f"--plot={tmp_path / 'new' / 'found.png'}"]
    code, out, err = run(capsys, *asked, *files)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["planted"] is True
    assert "no language model" in out
    assert [one["depth"] for one in found["depths"]] == [16, 48]
    assert found["depths"][1]["iteration"]["tau"] == pytest.approx(26)
    assert found["plan"]["card"]["name"] == "RTX 4090"
    assert found["plan"]["budget"] == 8 * 2**30
    plain = found["plan"]["plain_bytes_per_pass"] / (found["machine"]["link_gb_per_s"] * 1e9)
    assert found["plain"]["tokens_per_s"] == pytest.approx(1 / plain, rel=1e-3)
    shown = re.search(r"best: depth (\d+).*?, ([\d.]+) tokens/s", out)
    assert found["plan"]["codec"] == "substitute"
    best = max(one["iteration"]["tokens_per_s"] for one in found["depths"])
    assert float(shown[2]) == pytest.approx(best, abs=0.05)
    assert "pass s: what is left of a pass after drafting" in out
    assert (tmp_path / "new" / "found.png").read_bytes().startswith(b"\x89PNG")


def test_all_of_a_cards_memory_is_the_default(tmp_path, capsys):
    file = tmp_path / "found.json"
    asked = ["target=planted_qwen2_5_32b", "card=RTX 3090", "tau=10", "depths=8"]
    code, _, err = run(capsys, *asked, f"--json={file}")
    assert code == 0, err
    budget = json.loads(file.read_text())["plan"]["budget"] / 2**30
    assert budget == pytest.approx(21.4, abs=0.01)  # 0.93 x 24, less 0.9 for CUDA


def test_a_local_folder_needs_no_weights_and_a_run_its_tau(tmp_path, capsys):
    tiny_checkpoint(tmp_path / "model", "qwen2")
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    measured = write_run(tmp_path / "run", turns([30.0, 20.0]))
    asked = ["target=hub", f"target.path={tmp_path / 'model'}", "memory_gb_per_s=500", "quant.group_size=32"]
    asked += ["offload.link_gb_per_s=20", "offload.vram_gib=1", "tree.depth=3", "tree.width=2", "depths=2"]
    code, out, err = run(capsys, *asked, "decoding.max_length=256", "--from", measured)
    assert code == 0, err
    assert "acceptance: by depth, of subspec hqq4" in out
    assert "planted" not in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tau=3"], "card is not set: give card=NAME"),
        (["card=rtx_4090"], "tau is not set"),
        (["card=foo", "tau=3"], "card=foo: unknown card; known are T4.*memory_gb_per_s"),
        (["card=a100", "tau=3"], "card=a100 could be any of A100 40GB"),
        (["card=rtx_4090", "tau=abc"], "tau=abc: expected a positive number"),
        (["card=rtx_4090", "tau=-1"], "tau=-1: expected a positive number"),
        (["card=rtx_4090", "tau=99"], "tau=99: a tree of depth 48 gives 1 to 49"),
        (["card=rtx_4090", "tau=3", "tau_depth=2.5"], "tau_depth=2.5: expected a number of levels"),
        (["card=rtx_4090", "tau=3", "--from", "x"], "tau= and --from both"),
        (["card=rtx_4090", "--from", "missing"], "--from missing: no such folder"),
        (["card=rtx_4090", "tau=3", "draft=none"], "draft=none: plain streaming is predicted in any case"),
        (["card=rtx_4090", "tau=3", "target.dtype=float32"], "in float32, and captured levels .* bfloat16"),
        (["card=rtx_4090", "tau=3", "offload=none"], "offload=none: predictions are for offload=stream"),
        (["card=rtx_4090", "tau=3", "offload.vram_gib=3"], "offload.vram_gib=3 cannot hold this run"),
        (["card=rtx_4070", "tau=3", "offload.vram_gib=30"], "more than the 12 GiB free on RTX 4070"),
        (
            ["memory_gb_per_s=500", "offload.link_gb_per_s=20", "offload.vram_gib=auto", "tau=3"],
            "offload.vram_gib=auto needs a CUDA device",
        ),
        (["card=rtx_4090", "tau=3", "offload.card=L4"], "here the card is given as card=NAME"),
        (["card=rtx_4090", "tau=3", "targt=x"], r"targt: no such key or group \(did you mean target"),
        (["card=rtx_4090", "tau=3", "tree.depht=4"], r"tree.depht: no such key \(did you mean depth"),
        (["card=rtx_4090", "tau=3", "depths=[a]"], "depths=.*expected numbers of levels"),
        (["card=rtx_4090", "tau=3", "--plot", "x.foo"], "the name must end in .png"),
        (["card=rtx_4090", "tau=3", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_failures_are_one_line(capsys, arguments, line):
    code, out, err = run(capsys, "target=planted_qwen2_5_7b", *arguments)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert re.search(f"^error: .*{line}", err), err
    assert "Traceback" not in out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card to measure")
def test_a_card_that_is_not_there_cannot_be_measured(capsys):
    code, _, err = run(capsys, "card=auto", "tau=3")
    assert code == 2
    assert "card=auto measures a CUDA device, and there is none here" in err


@pytest.mark.gpu
def test_this_machines_card_is_measured(tmp_path, capsys):
    file = tmp_path / "found.json"
    asked = ["target=planted_qwen2_5_7b", "offload.vram_gib=8", "card=auto", "tau=20"]
    code, out, err = run(capsys, *asked, f"--json={file}")
    assert code == 0, err
    machine = json.loads(file.read_text())["machine"]
    assert 1 < machine["link_gb_per_s"] < 500
    assert 100 < machine["memory_gb_per_s"] < 20_000
    assert "best: depth" in out


def test_help_is_in_the_users_words(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for key in ("card=NAME", "tau=NUMBER", "--from RUN", "depths=", "level_ms="):
        assert key in out
