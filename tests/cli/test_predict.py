"""The command of predictions, and what it takes from finished runs."""

import json
import re
from dataclasses import replace

import pytest
import torch

from subspec.cli.predict import main
from subspec.cli.predict_measured import read_measured
from subspec.config.enums import Codec, Proposer
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
from subspec.planning.gpu_specs import GpuSpec, find_gpu
from tests.helpers.planning import settings
from tests.helpers.tiny import tiny_checkpoint
from tests.report.runs import config_of, plain_run, turns, write_run

# ---------------------------------------------------------------------------------------------- measured


def test_acceptance_of_a_run(tmp_path):
    folder = write_run(tmp_path / "run", turns([30.0, 20.0, 24.0]))
    for place in (folder, folder / "records.jsonl", tmp_path):
        found = read_measured(place)
        assert [found.acceptance.survival(depth) for depth in (1, 2, 3)] == pytest.approx([1.0, 27 / 33, 16 / 33])
        assert found.level_s is None, "a CPU's levels say nothing about a GPU's"
        assert "of subspec hqq4, beam 3x2 of some_target: 1 run(s)" in found.acceptance.source


def predicted(target="x", width=2, draft=None, quant=None):
    """What a level's time is wanted for; as the runs of ``tests/report/runs.py``, whose modules are the usual ones."""
    return replace(
        settings(tree=(3, width), codec=Codec.auto),
        target=PlantedTargetConfig(name=target),
        draft=draft or SubstituteDraftConfig(name="subspec"),
        quant=quant or HqqConfig(name="hqq", modules=["attention", "mlp"]),
    )


@pytest.mark.parametrize(("codec", "same"), [(Codec.auto, False), (Codec.none, True)])
def test_a_head_that_a_plan_may_add_is_no_exact_one(tmp_path, codec, same):
    """The run has `quant.modules=[attention,mlp]`; null is that where nothing is coded."""
    records = turns([30.0, 20.0], device="cuda", target="x")
    found = read_measured(write_run(tmp_path / "run", records, config_of({"name": "subspec"}), gpu="NVIDIA H200"))
    wanted = predicted(quant=HqqConfig(name="hqq"))
    wanted = replace(wanted, offload=replace(wanted.offload, codec=codec))
    assert found.fits(wanted, find_gpu("H200")) == same


def test_passes_of_a_run_with_a_proposer(tmp_path):
    """Its time is that of a pass, and counts for the same proposer."""
    draft = {"name": "subspec", "proposer": "prompt_lookup", "proposed": 16}
    records = turns([30.0, 20.0], device="cuda", target="x", draft_passes=21)
    found = read_measured(write_run(tmp_path / "run", records, config_of(draft), gpu="NVIDIA H200"))
    assert found.acceptance.passes == pytest.approx(2 * 21 / (3 * 10 + 3 * 11))
    assert found.level_s == pytest.approx(0.25 * (30 / 30.0 + 33 / 20.0) / 42)
    same = SubstituteDraftConfig(name="subspec", proposer=Proposer.prompt_lookup, proposed=16)
    assert found.fits(predicted(draft=same), find_gpu("H200"))
    for other in (replace(same, proposed=8), replace(same, proposer=Proposer.eagle2), replace(same, proposer="none")):
        assert not found.fits(predicted(draft=other), find_gpu("H200"))


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
        {"quant": HiggsConfig(name="higgs", modules=["attention", "mlp"])},
        {"quant": HqqConfig(name="hqq", bits=8, modules=["attention", "mlp"])},
        {"quant": HqqConfig(name="hqq", modules=["attention"])},
        {"quant": HqqConfig(name="hqq", bits_by=BitsByModule(mlp=3), modules=["attention", "mlp"])},
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


@pytest.mark.parametrize("measured", [False, True])
def test_a_cascade_names_the_source_of_its_passes(tmp_path, capsys, monkeypatch, measured):
    monkeypatch.setenv("COLUMNS", "300")
    asked = ["target=planted_qwen2_5_7b", "offload.vram_gib=8", "card=rtx_4090", "depths=16", "tree.depth=8"]
    asked += ["draft.proposer=prompt_lookup", "draft.proposed=10", f"--json={tmp_path / 'found.json'}"]
    if measured:
        draft = {"name": "subspec", "proposer": "prompt_lookup", "proposed": 10}
        asked += ["--from", write_run(tmp_path / "run", turns([30.0, 20.0], draft_passes=21), config_of(draft))]
    else:
        asked += ["tau=4", "passes=0.6", "proposals_ms=1.5"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == 16
    assert found["acceptance"]["passes"] == pytest.approx(42 / 63 if measured else 0.6)
    source = "0.67 passes per level, measured by that run" if measured else "0.60 passes per level, set by hand"
    assert source in out
    assert "pass of the substitute, 16 rows" in out
    assert ("the host's work is left out" if measured else "1.50 ms (proposals_ms, set by hand)") in out


@pytest.mark.parametrize(("card", "waits"), [("rtx_4090", False), ("rtx_3060", True)])
def test_a_pass_that_waits_for_the_gpu_is_said(capsys, card, waits):
    code, out, err = run(
        capsys, "target=planted_qwen2_5_7b", "offload.vram_gib=8", f"card={card}", "tau=26", "depths=8"
    )
    assert code == 0, err
    assert ("a pass waits for the GPU" in out) == waits


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
    assert "acceptance: measured by depth, of subspec hqq4" in out
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
        (["card=rtx_4090", "tau=3", "draft.proposer=prompt_lookup"], "passes is not set"),
        (["card=rtx_4090", "tau=3", "draft.proposer=prompt_lookup", "passes=1.5"], "passes=1.5: expected"),
        (["card=rtx_4090", "tau=3", "passes=0.5"], "passes and proposals_ms are for draft.proposer"),
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
    for key in ("card=NAME", "tau=NUMBER", "--from RUN", "depths=", "level_ms=", "passes="):
        assert key in out
