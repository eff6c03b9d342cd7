"""Runs as the runner really writes them: a plain one, a substitute, and one that was cut off."""

import json

import pytest
import torch

from subspec.cli.predict_measured import read_measured
from subspec.report import State, write_report
from tests.helpers.cli import cli, records_of, tiny_run
from tests.helpers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Three run folders below one."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("outputs")
    tiny_checkpoint(root / "model", max_positions=4096)
    runs = root / "runs"
    for name, overrides in {
        "plain": ["draft=none"],
        "ours": ["draft=subspec", "tree.depth=4", "quant.group_size=32", "audit=true"],
        "cut": ["draft=subspec", "tree.depth=2", "quant.group_size=32"],
    }.items():
        ran = cli(*tiny_run(root / "model", runs / name), *overrides)
        assert ran.code == 0, ran.err
    (runs / "cut" / "summary.json").unlink()
    with (runs / "cut" / "records.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    return runs


def test_what_the_runner_writes_is_what_the_report_reads(outputs, tmp_path):
    report = write_report([outputs], tmp_path / "report")
    rows = {row.runs[0].folder.name: row for row in report.rows}
    assert {name: row.runs[0].state for name, row in rows.items()} == {
        "plain": State.finished,
        "ours": State.finished,
        "cut": State.unfinished,
    }
    ours, summary = rows["ours"], json.loads((outputs / "ours" / "summary.json").read_text())
    for figure in ("tokens_per_s", "tau", "accept_rate_by_depth", "decode_s"):
        assert ours.totals[figure] == summary["totals"][figure], figure
    assert ours.method == "subspec hqq4, adaptive 4x1"
    assert ours.bits == summary["run"]["substitute"]["bits_per_weight"] > 4
    assert ours.sample
    assert not ours.planted
    assert ours.baseline.speedup.paired
    assert ours.baseline.speedup.samples == len(records_of(outputs / "ours"))
    assert ours.summary["audit"]["mismatch"] == 0
    page = report.page.read_text()
    assert "*sample prompts*" in page
    assert "1 damaged line(s)" in page
    assert ours.baseline.same_texts == len(records_of(outputs / "ours"))
    assert "the same text as plain decoding in all" in page
    curves = {"acceptance", "conditional_acceptance", "accepted_lengths"}
    assert set(report.plots) == {"speed", "tau_by_method", "time_split"} | curves


def test_acceptance_of_a_real_run_is_its_tau(outputs):
    found = read_measured(outputs / "ours").acceptance
    totals = json.loads((outputs / "ours" / "summary.json").read_text())["totals"]
    rates = [rate for rate in totals["accept_rate_by_depth"] if rate is not None]
    assert found.depth == len(rates)
    assert found.survival(1) == rates[0]
