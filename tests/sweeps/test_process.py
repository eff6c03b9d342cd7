"""A job as a process: how far it is, how it ended, and what stays when something goes wrong."""

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from subspec.errors import SubspecError
from subspec.records import outcome as outcomes
from subspec.records.outcome import is_finished, objective, read_outcome
from subspec.records.run_folder import RunFolder
from subspec.sweeps.process import JobFailed, end_reason, job_result, run_in_process
from subspec.sweeps.progress import ForeignJob, watched
from tests.helpers.cli import ROOT

from .fakes import fake_job, started, sweep_progress


def wait_for_sample(job):
    deadline = time.monotonic() + 30
    while job.poll() is None and job.done == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_is_followed_to_its_end(tmp_path):
    job = started(tmp_path / "0", samples=3)
    outcome = job.wait()
    assert (outcome.status, outcome.exit_code, outcome.reason) == ("ok", 0, "")
    assert (job.done, job.total) == (3, 3)
    assert job.tokens_per_s == pytest.approx(15.0)
    assert job.tau == pytest.approx(10.0)
    assert job_result([], outcome, job.folder, job.optimise).return_value == 10.0
    assert read_outcome(tmp_path / "0") == outcome
    assert "[3/3] s2" in (tmp_path / "0" / "job.log").read_text()


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        ("refused", 2, "offload.vram_gib=1 cannot hold this run"),
        ("bug", 1, "ValueError: an unexpected thing"),
        ("killed", -9, "killed by SIGKILL (by hand, or by the system when memory ran out)"),
    ],
)
def test_why_a_job_failed_in_one_line(tmp_path, ending, code, reason):
    outcome = started(tmp_path, ending=ending).wait()
    assert (outcome.status, outcome.exit_code, outcome.reason) == ("failed", code, reason)


def test_an_earlier_attempt_does_not_explain_the_next(tmp_path):
    assert started(tmp_path, ending="refused").wait().reason
    outcome = started(tmp_path).wait()
    assert (outcome.status, outcome.reason, outcome.attempts) == ("ok", "", 2)
    assert "cannot hold this run" in (tmp_path / "job.log").read_text()  # both attempts


def test_an_interrupted_job_can_be_continued(tmp_path):
    job = started(tmp_path, seconds=60)
    wait_for_sample(job)
    assert read_outcome(tmp_path).status == "running"
    job.interrupt()
    outcome = job.wait()
    assert (outcome.status, outcome.exit_code) == ("interrupted", 130)
    assert not is_finished(tmp_path, 2, plan_only=False)


def test_a_job_that_the_sweep_had_to_kill_was_interrupted(tmp_path):
    """A second Ctrl-C: nobody else killed it, and no memory ran out."""
    job = started(tmp_path, seconds=60)
    wait_for_sample(job)
    job.kill()
    outcome = job.wait()
    assert (outcome.status, outcome.exit_code) == ("interrupted", -9)
    assert "memory" not in outcome.reason


def test_a_reason_where_nothing_was_said():
    assert end_reason(1, "\n") == "ended with status 1 and no word"
    assert end_reason(-11, "") == "killed by SIGSEGV"
    assert end_reason(-63, "") == "killed by signal 63"


def test_a_finished_job_needs_its_files_and_as_many_samples(tmp_path):
    started(tmp_path).wait()
    assert is_finished(tmp_path, 2, plan_only=False)
    assert not is_finished(tmp_path, 5, plan_only=False)
    assert not is_finished(tmp_path, 2, plan_only=True)
    (tmp_path / "records.jsonl").unlink()
    assert not is_finished(tmp_path, 2, plan_only=False)


def test_a_damaged_record_is_a_turn_to_run_again(tmp_path):
    started(tmp_path, samples=3).wait()
    file = tmp_path / "records.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"sample_id": "s2", "tu')  # nothing is missing
    assert is_finished(tmp_path, 3, plan_only=False)
    first, rest = whole.split(b"\n", 1)
    file.write_bytes(first[:20] + b"\n" + rest)
    assert not is_finished(tmp_path, 3, plan_only=False)


def test_outcomes_that_cannot_be_read_are_none(tmp_path):
    for text in ("{", "[]", '{"unknown": 1}'):
        (tmp_path / "job.json").write_text(text)
        assert read_outcome(tmp_path) is None


def test_the_objective_is_a_total_or_nothing():
    assert objective({"totals": {"tau": 3}}, "tau") == 3.0
    assert objective({"totals": {"tau": None}}, "tau") is None
    assert objective(None, "tau") is None
    assert objective({"totals": {"tau": 3}}, None) is None


def test_a_worker_of_another_launcher_runs_the_job_in_a_process(tmp_path):
    assert run_in_process(fake_job(tmp_path / "0")) == 10.0
    with pytest.raises(JobFailed, match=r"cannot hold this run \(.*1/job\.log\)") as caught:
        run_in_process(fake_job(tmp_path / "1", ending="refused"))
    assert caught.value.exit_code == 2


def test_a_full_disk_before_the_job_starts(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "job.json"))

    monkeypatch.setattr("subspec.sweeps.process.write_outcome", full)
    with pytest.raises(SubspecError, match=r"job\.json: the disk is full"):
        started(tmp_path)


def test_a_full_disk_when_the_job_ends(tmp_path, monkeypatch):
    """Its records are there; that it ended well could not be written, so it is looked at again."""
    job = started(tmp_path)
    write = outcomes.write_outcome

    def full(folder, outcome):
        if outcome.status != "running":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, outcome)

    monkeypatch.setattr("subspec.sweeps.process.write_outcome", full)
    outcome = job.wait()
    assert outcome.status == "failed"
    assert "disk is full" in outcome.reason
    assert not is_finished(tmp_path, 2, plan_only=False)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2


def test_a_folder_in_use_is_waited_for_then_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("subspec.sweeps.process.LOCK_WAIT_S", 0.1)
    with (
        RunFolder.open(tmp_path, resume=False, config={}),
        pytest.raises(SubspecError, match="in use by another process"),
    ):
        started(tmp_path)
    assert started(tmp_path).wait().status == "ok"


ORPHAN = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from subspec.cli import job
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=job._end_with_parent, daemon=True).start()
print("ready", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""
SWEEP = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, start_new_session=True)
assert child.stdout.readline() == b"ready\\n"
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_job_does_not_outlive_a_sweep_that_is_killed():
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP, ORPHAN, str(ROOT)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(sweep.stdout.readline()))
    assert child.status() != psutil.STATUS_ZOMBIE
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_outcome_is_plain_json(tmp_path):
    started(tmp_path, ending="refused").wait()
    found = json.loads((tmp_path / "job.json").read_text())
    assert {"status", "exit_code", "reason", "seconds", "attempts", "samples"} == set(found)


def test_jobs_that_others_run_are_watched(tmp_path, monkeypatch):
    """The launcher runs them one after another and tells nothing before the last has ended."""
    monkeypatch.setattr("subspec.sweeps.progress.WATCH_S", 0.02)
    started(tmp_path / "1", "refused").wait()  # an earlier session's: its outcome is not this one's
    progress, out = sweep_progress(3, finished=1)
    seen = []
    monkeypatch.setattr(progress, "update", lambda jobs, waiting: seen.extend((job.label, job.done) for job in jobs))
    jobs = [ForeignJob(tmp_path / name, f"number {name}") for name in "01"]
    with watched(progress, jobs):
        assert not out.getvalue()
        for job in (fake_job(tmp_path / "0", seconds=0.5), fake_job(tmp_path / "1", "refused", seconds=0.2)):
            with contextlib.suppress(JobFailed):
                run_in_process(job)
    lines = [line.split("  (elapsed")[0] for line in out.getvalue().splitlines()]
    assert lines[0] == f"[1/3] start    job 0: number 0, log: {tmp_path / '0' / 'job.log'}"
    assert lines[1].startswith("[2/3] ok       job 0: number 0  2/2 samples  15.00 tokens/s  tau 10.00  0:00:0")
    assert lines[2].startswith("[2/3] start    job 1: number 1")
    assert lines[3] == "[3/3] failed   job 1: number 1  offload.vram_gib=1 cannot hold this run"
    assert len(lines) == 4
    assert ("number 0", 2) in seen
    assert not any(thread.name.startswith("watch") for thread in threading.enumerate())


def test_watching_ends_with_what_it_watches(tmp_path):
    """An interrupt of the launcher is passed on, and a job that nobody started is no line."""
    progress, out = sweep_progress()
    with pytest.raises(KeyboardInterrupt), watched(progress, [ForeignJob(tmp_path / "0", "never")]):
        raise KeyboardInterrupt
    assert not out.getvalue()
    assert not any(thread.name.startswith("watch") for thread in threading.enumerate())
