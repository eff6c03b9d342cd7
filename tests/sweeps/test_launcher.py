"""The queue of jobs: one at a time per GPU, failures recorded, interrupts passed on, and what a person sees."""

import json
import os
import re
import signal
import threading
import time

import pytest

from subspec.errors import ConfigError
from subspec.records.outcome import Outcome, read_outcome
from subspec.sweeps.launcher import ProcessLauncher, _terminated_as_interrupted, run_jobs, visible_gpus
from subspec.sweeps.progress import FollowedJob

from .fakes import fake_job, sweep_progress


def test_a_job_that_fails_keeps_no_other_from_running(tmp_path):
    endings, wanted = ["ok", "killed", "refused", "ok"], ["ok", "failed", "failed", "ok"]
    jobs = [fake_job(tmp_path / str(i), ending, label=f"n={i}") for i, ending in enumerate(endings)]
    progress, out = sweep_progress(4)
    run_jobs(jobs, [None], progress)
    assert [job.outcome.status for job in jobs] == wanted
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [word for status in wanted for word in ("start", status)]
    assert "[1/4] ok       job 0: n=0  2/2 samples  15.00 tokens/s  tau 10.00" in lines[1]
    assert "killed by SIGKILL" in lines[3]
    assert "offload.vram_gib=1 cannot hold this run" in lines[5]
    assert "left 0:00:00" in lines[-1]


def test_several_gpus_share_the_queue_one_job_each(tmp_path, monkeypatch):
    jobs = [fake_job(tmp_path / str(i), seconds=0.3) for i in range(4)]
    progress, _ = sweep_progress(4)
    running = []
    monkeypatch.setattr(progress, "update", lambda now, waiting: running.append([job.gpu for job in now]))
    run_jobs(jobs, ["2", "GPU-abc"], progress)
    assert [job.outcome.status for job in jobs] == ["ok"] * 4
    assert {json.loads((job.folder / "env.json").read_text())["gpu"] for job in jobs} == {"2", "GPU-abc"}
    assert max(map(len, running)) == 2
    assert all(len(set(gpus)) == len(gpus) for gpus in running)


@pytest.mark.parametrize(
    ("devices", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-1, GPU-2", 2, ["GPU-1", "GPU-2"]), ("", 0, [])],
)
def test_the_gpus_are_those_that_are_visible(monkeypatch, devices, count, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("gpus", "jobs", "cpu", "slots"),
    [
        (["0", "1"], None, False, ["0", "1"]),
        (["0", "1"], 1, False, ["0"]),
        (["0", "1"], 3, False, ["0", "1", "0"]),
        (["0", "1"], None, True, [None]),
        (["0", "1"], 2, True, [None, None]),
        ([], None, False, [None]),
    ],
)
def test_how_many_at_a_time(monkeypatch, gpus, jobs, cpu, slots):
    monkeypatch.setattr("subspec.sweeps.launcher.visible_gpus", lambda: gpus)
    assert ProcessLauncher(jobs).slots(cpu=cpu) == slots


def test_less_than_one_at_a_time_is_refused():
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.jobs=0 must be at least 1"):
        ProcessLauncher(jobs=0).setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_running_job_gently(tmp_path, number):
    jobs = [fake_job(tmp_path / str(i), seconds=60) for i in range(2)]

    def send():
        while not (tmp_path / "0" / "records.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt), _terminated_as_interrupted():
        run_jobs(jobs, [None], sweep_progress(2)[0])
    thread.join()
    assert read_outcome(tmp_path / "0").status == "interrupted"
    assert not (tmp_path / "1").exists()


# -------------------------------------------------------------------------------------------- the display


def running_job(folder, label, done=1, **sums):
    """A job of which ``done`` of four samples are done."""
    job = FollowedJob(folder, label)
    job.done, job.total = done, 4
    job.sums.update({"verified_tokens": 30, "iterations": 30, "decode_s": 10.0} | sums)
    return job


def test_what_is_left_is_told_by_the_jobs_most_alike(tmp_path):
    progress, _ = sweep_progress(10, finished=4)
    assert progress.remaining_s is None
    for label, seconds in (("draft=none quant.bits=4", 10.0), ("draft=eagle2 quant.bits=4", 40.0)):
        progress.finished(FollowedJob(tmp_path, label), Outcome("ok", 0, seconds=seconds))
    waiting = ["draft=none quant.bits=3", "draft=eagle2 quant.bits=3", "draft=subspec quant.bits=4"]
    progress.update([], waiting)
    assert progress.remaining_s == pytest.approx(10 + 40 + 25 + 25)  # one more is unknown
    job = running_job(tmp_path, "draft=subspec quant.bits=3", loop_s=10.0)
    job.started_s, job.at_done_s = time.monotonic() - 20, 15.0  # 5 s of start, 10 s a sample
    progress.update([job], waiting)
    assert job.expected_s == 45.0
    assert progress.remaining_s == pytest.approx(10 + 40 + 45 + 25, abs=0.1)


def test_running_jobs_are_spoken_of_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("subspec.sweeps.progress.QUIET_S", 0.0)
    progress, out = sweep_progress(3)
    run_jobs([fake_job(tmp_path / "0", seconds=0.6)], [None], progress)
    lines = [line for line in out.getvalue().splitlines() if " running " in line]
    assert len(lines) in (1, 2)  # each state once
    assert "2/2 samples  15.00 tokens/s  tau 10.00" in lines[-1]


def test_a_terminal_gets_a_bar_with_the_running_jobs(tmp_path):
    progress, _ = sweep_progress(4, finished=1, width=100)
    job = running_job(tmp_path / "7", "draft=none", done=2)
    job.gpu = "1"
    progress.update([job])
    head, line = (str(text) for text in progress._block().renderables)
    assert "1/4 jobs" in head
    assert head.count("█") == 9  # one and a half of four, of 24
    assert "job 7 on GPU 1: draft=none  2/4 samples  3.00 tokens/s  tau 1.00" in line


def test_a_narrow_terminal_keeps_the_figures(tmp_path):
    progress, _ = sweep_progress(4, width=80)
    label = "draft=subspec quant.bits=4 tree.depth=48 tree.width=6 benchmark=livecodebench"
    progress.update([running_job(tmp_path / "7", label)])
    _, line = (str(text) for text in progress._block().renderables)
    assert re.fullmatch(r"  job 7: draft=subspec.*…  1/4 samples  3\.00 tokens/s  tau 1\.00  0:00:00", line)
    assert len(line) < 80
