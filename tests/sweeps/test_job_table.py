"""The table at the end of a sweep, on the screen and in files."""

import csv
import io

import pytest

from subspec.errors import SubspecError
from subspec.records.sweep_folder import SweepFolder
from subspec.runs.console import RunConsole
from subspec.sweeps.job_table import Row, job_rows, print_rows, ranked, write_rows
from subspec.sweeps.sweeper import SweepFailed, raise_failures, write_report

from .fakes import started


@pytest.fixture
def sweep(tmp_path):
    """Four jobs: ok, refused, running when the sweep was killed, never started."""
    with SweepFolder.open(tmp_path, []) as folder:
        jobs = folder.assign([([f"n={i}", "x=|"], {"n": i}) for i in range(4)])
        for number, ending in enumerate(["ok", "refused"]):
            started(tmp_path / str(number), ending).wait()
        started(tmp_path / "2")._process.wait()
        yield folder, jobs


def test_a_row_per_job(sweep):
    folder, jobs = sweep
    rows = job_rows(folder, jobs, "tau")
    assert [row.status for row in rows] == ["ok", "failed", "unfinished", "missing"]
    assert [row.samples for row in rows] == [2, 2, 2, None]
    assert (rows[0].tokens_per_s, rows[0].tau, rows[0].value) == (15.0, 10.0, 10.0)
    assert rows[1].reason == "offload.vram_gib=1 cannot hold this run"
    assert [row.label for row in rows] == ["n=0", "n=1", "n=2", "n=3"]


def test_the_files_hold_every_row(sweep):
    folder, jobs = sweep
    markdown, table = write_rows(folder.path / "sweep", job_rows(folder, jobs), "Jobs", ["planted"])
    rows = list(csv.DictReader(table.open()))
    assert [row["status"] for row in rows] == ["ok", "failed", "unfinished", "missing"]
    assert (rows[0]["n"], rows[0]["tokens/s"], rows[0]["tau"], rows[3]["tau"]) == ("0", "15", "10", "")
    lines = markdown.read_text().splitlines()
    assert lines[0] == "# Jobs"
    assert lines[-1] == "- planted"
    assert len([line for line in lines if line.startswith("| ")]) == 6
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("| ")}) == 1


def test_the_screen_says_why_and_where_to_look(sweep):
    folder, jobs = sweep
    out = io.StringIO()
    print_rows(RunConsole(file=out, width=120), job_rows(folder, jobs), [])
    assert "warning: job 1 failed: offload.vram_gib=1 cannot hold this run (log: 1/job.log)" in out.getvalue()
    assert "unfinished" in out.getvalue()


def test_a_search_is_ranked_best_first():
    rows = [Row(job, value=value) for job, value in enumerate([2.0, None, 5.0, 2.0])]
    assert [row.job for row in ranked(rows)] == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok", "failed"], 2), (["failed", "unfinished", "missing"], 1), (["ok"], None)]
)
def test_the_sweeps_exit_status(sweep, statuses, code):
    folder, jobs = sweep
    rows = [row for row in job_rows(folder, jobs) if row.status in statuses]
    if code is None:
        raise_failures(folder, rows)
        return
    with pytest.raises(SweepFailed, match=r"of \d jobs did not end well.*sweep_dir=") as caught:
        raise_failures(folder, rows)
    assert caught.value.exit_code == code


def test_a_table_that_cannot_be_written(tmp_path):
    with pytest.raises(SubspecError, match="cannot write"):
        write_rows(tmp_path / "no" / "sweep", [], "Jobs")


def test_a_report_that_fails_costs_a_warning(tmp_path, monkeypatch):
    import sys
    import types

    def fail(folders, out):
        raise RuntimeError("no font")

    out = io.StringIO()
    monkeypatch.setitem(sys.modules, "subspec.report", types.SimpleNamespace(write_report=fail))
    write_report([tmp_path], tmp_path / "report", RunConsole(file=out, width=200))
    assert "warning: no report (no font); the records are whole" in out.getvalue()
