"""The queue of jobs: one at a time per GPU, failures recorded, interrupts passed on, and what a person sees."""

import io
import os
import re
import signal
import threading
import time

import pytest

from subspec.errors import ConfigError
from subspec.records.outcome import Outcome, read_outcome
from subspec.runs.console import RunConsole
from subspec.sweeps.follow import FollowedJob
from subspec.sweeps.launcher import ProcessLauncher, _Queue, _terminated_as_interrupted, visible_gpus
from subspec.sweeps.progress import SweepProgress

from .fakes import fake_job, seen


def run(jobs, slots, total=None):
    """(outcomes by index, what was printed)."""
    out = io.StringIO()
    progress = SweepProgress(total or len(jobs), console=RunConsole(file=out))
    named = [(spec, f"n={index}") for index, spec in enumerate(jobs)]
    with progress.shown():
        done = _Queue(named, slots, progress).run()
    return done, out.getvalue()


def test_a_job_that_fails_keeps_no_other_from_running(tmp_path):
    endings = ["ok", "killed", "refused", "ok"]
    outcomes, text = run([fake_job(tmp_path / str(i), ending) for i, ending in enumerate(endings)], [None])
    assert [outcomes[i].status for i in range(4)] == ["ok", "failed", "failed", "ok"]
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == [
        word for status in ("ok", "failed", "failed", "ok") for word in ("start", status)
    ]
    assert "[1/4] ok       job 0: n=0  2/2 samples  15.00 tokens/s  tau 10.00" in lines[1]
    assert "killed by SIGKILL" in lines[3]
    assert "offload.vram_gib=1 cannot hold this run" in lines[5]
    assert "left 0:00:00" in lines[-1]


def test_several_gpus_share_the_queue_one_job_each(tmp_path):
    jobs = [fake_job(tmp_path / str(i), seconds=0.3) for i in range(4)]
    running = []
    poll = time.sleep

    class Watched(SweepProgress):
        def update(self, jobs, waiting=()):
            running.append([job.gpu for job in jobs])
            super().update(jobs, waiting)

    progress = Watched(4, console=RunConsole(file=io.StringIO()))
    done = _Queue([(spec, "") for spec in jobs], ["2", "GPU-abc"], progress).run()
    assert len(done) == 4
    assert {seen(spec.folder)["gpu"] for spec in jobs} == {"2", "GPU-abc"}
    assert max(map(len, running)) == 2
    assert all(len(set(gpus)) == len(gpus) for gpus in running)
    assert time.sleep is poll


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


def test_how_many_at_a_time(monkeypatch):
    monkeypatch.setattr("subspec.sweeps.launcher.visible_gpus", lambda: ["0", "1"])
    assert ProcessLauncher()._slots(cpu=False) == ["0", "1"]
    assert ProcessLauncher(jobs=1)._slots(cpu=False) == ["0"]
    assert ProcessLauncher(jobs=3)._slots(cpu=False) == ["0", "1", "0"]
    assert ProcessLauncher()._slots(cpu=True) == [None]
    assert ProcessLauncher(jobs=2)._slots(cpu=True) == [None, None]
    monkeypatch.setattr("subspec.sweeps.launcher.visible_gpus", list)
    assert ProcessLauncher()._slots(cpu=False) == [None]
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
        run(jobs, [None])
    thread.join()
    assert read_outcome(tmp_path / "0").status == "interrupted"
    assert not (tmp_path / "1").exists()


def test_what_is_left_is_told_by_the_jobs_most_alike(tmp_path):
    progress = SweepProgress(10, finished=4, console=RunConsole(file=io.StringIO()))
    assert progress.remaining_s is None
    for label, seconds in (("draft=none quant.bits=4", 10.0), ("draft=eagle2 quant.bits=4", 40.0)):
        progress.finished(FollowedJob(tmp_path, label), Outcome("ok", 0, seconds=seconds))
    waiting = ["draft=none quant.bits=3", "draft=eagle2 quant.bits=3", "draft=subspec quant.bits=4"]
    progress.update([], waiting)
    assert progress.remaining_s == pytest.approx(10 + 40 + 25 + 25)  # one more is unknown
    job = FollowedJob(tmp_path, "draft=subspec quant.bits=3", done=1, total=4)
    job._sums, job._at_done = {"loop_s": 10.0}, 15.0  # 5 s of start, 10 s a sample
    job._started = time.monotonic() - 20
    progress.update([job], waiting)
    assert job.expected_s == 45.0
    assert progress.remaining_s == pytest.approx(10 + 40 + 45 + 25, abs=0.1)


def test_running_jobs_are_spoken_of_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("subspec.sweeps.progress.QUIET_S", 0.0)
    _, text = run([fake_job(tmp_path / "0", samples=2, seconds=0.6)], [None], total=3)
    lines = [line for line in text.splitlines() if " running " in line]
    assert len(lines) in (1, 2)  # each state once
    assert "2/2 samples  15.00 tokens/s  tau 10.00" in lines[-1]


def test_a_terminal_gets_a_bar_with_the_running_jobs(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    progress = SweepProgress(4, finished=1, console=RunConsole(file=Terminal(), width=100))
    job = FollowedJob(tmp_path / "7", "draft=none", gpu="1", done=1, total=2, tokens_per_s=3.0, tau=1.0)
    job._started = time.monotonic()
    progress._running = [job]
    head, line = (str(text) for text in progress._block().renderables)
    assert "1/4 jobs" in head
    assert head.count("█") == 9  # one and a half of four, of 24
    assert "job 7 on GPU 1: draft=none  1/2 samples  3.00 tokens/s  tau 1.00" in line


def test_a_narrow_terminal_keeps_the_figures(tmp_path):

    progress = SweepProgress(4, console=RunConsole(file=io.StringIO(), width=80))
    label = "draft=subspec quant.bits=4 tree.depth=48 tree.width=6 benchmark=livecodebench"
    job = FollowedJob(tmp_path / "7", label, done=1, total=2, tokens_per_s=3.0, tau=1.0)
    job._started = time.monotonic()
    progress._running = [job]
    _, line = (str(text) for text in progress._block().renderables)
    assert re.fullmatch(r"  job 7: draft=subspec.*…  1/2 samples  3\.00 tokens/s  tau 1\.00  0:00:00", line)
    assert len(line) < 80
