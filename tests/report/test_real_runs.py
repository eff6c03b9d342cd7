"""Runs as the runner really writes them: reported, and compared text by text."""

import json
import subprocess
import sys

import pytest
import torch

from subspec.cli.predict_measured import read_measured
from subspec.report import State, write_report
from subspec.report.compare import compare
from tests.helpers.cli import cli, records_of, tiny_run
from tests.helpers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Plain decoding, its twin with a draft, a run that was cut off; beside them two runs that are no twins."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("outputs")
    tiny_checkpoint(root / "model", max_positions=4096)
    quick = ["benchmark=mt_bench", "decoding.max_length=1024"]
    for name, overrides in {
        "runs/plain": ["draft=none"],
        "runs/ours": ["draft=subspec", "tree.depth=4", "quant.group_size=32", "audit=true"],
        "runs/cut": ["draft=subspec", "tree.depth=2", "quant.group_size=32"],
        "shorter": ["draft=none", "decoding.max_new_tokens=5"],
        "sampled": ["draft=none", "decoding=sampling"],
    }.items():
        ran = cli(*tiny_run(root / "model", root / name), *quick, *overrides)
        assert ran.code == 0, ran.err
    cut = root / "runs" / "cut"
    (cut / "summary.json").unlink()
    with (cut / "records.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    return root


def test_what_the_runner_writes_is_what_the_report_reads(outputs, tmp_path):
    report = write_report([outputs / "runs"], tmp_path / "report")
    rows = {row.runs[0].folder.name: row for row in report.rows}
    states = {name: row.runs[0].state for name, row in rows.items()}
    assert states == {"plain": State.finished, "ours": State.finished, "cut": State.unfinished}
    ours, folder = rows["ours"], outputs / "runs" / "ours"
    summary, records = json.loads((folder / "summary.json").read_text()), records_of(folder)
    for figure in ("tokens_per_s", "tau", "accept_rate_by_depth", "decode_s"):
        assert ours.totals[figure] == summary["totals"][figure], figure
    assert ours.method == "subspec hqq4, adaptive 4x1"
    assert ours.bits == summary["run"]["substitute"]["bits_per_weight"] > 4
    assert (ours.sample, ours.planted) == (True, False)
    assert ours.baseline.speedup.paired
    assert ours.baseline.speedup.samples == len({record["sample_id"] for record in records})
    assert ours.baseline.same_texts == len(records)
    assert ours.summary["audit"]["mismatch"] == 0
    page = report.page.read_text()
    for said in ("*sample prompts*", "1 damaged line(s)", "the same text as plain decoding in all"):
        assert said in page
    curves = {"acceptance", "conditional_acceptance", "accepted_lengths"}
    bars = {"speed", "tau_by_method", "time_split", "tau_by_category", "speedup_by_category"}
    assert set(report.plots) == bars | curves


def test_acceptance_of_a_real_run_is_its_tau(outputs):
    found = read_measured(outputs / "runs" / "ours").acceptance
    totals = json.loads((outputs / "runs" / "ours" / "summary.json").read_text())["totals"]
    rates = [rate for rate in totals["accept_rate_by_depth"] if rate is not None]
    assert found.depth == len(rates)
    assert found.survival(1) == rates[0]


def test_a_draft_and_its_plain_twin(outputs):
    found = compare(outputs / "runs" / "plain", outputs / "runs" / "ours")
    assert len(found.turns["identical"]) == sum(map(len, found.turns.values())) == 4, "two samples of two turns"
    assert found.equal_tokens == found.a.tokens == found.b.tokens > 0
    assert found.not_twins == []


def test_a_shorter_run_is_a_prefix(outputs):
    found = compare(outputs / "runs" / "plain", outputs / "shorter")
    assert {(one.index, one.b) for one in found.differences} == {(5, None)}
    assert (len(found.differences), len(found.turns["other_prompt"])) == (2, 2)
    assert [line.partition(": ")[0] for line in found.not_twins] == ["decoding.max_new_tokens"]


def test_another_way_of_decoding_as_a_process(outputs):
    command = [sys.executable, "-m", "subspec.report", "compare", outputs / "runs" / "ours", outputs / "sampled"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "decoding.name" in ran.stdout
    assert "2 other prompt" in ran.stdout
