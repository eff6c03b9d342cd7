"""One job as a process: command, log, progress and outcome."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from subspec.errors import SubspecError
from subspec.records.outcome import (
    FAILED,
    INTERRUPTED,
    LOG,
    OK,
    OUTCOME,
    RUNNING,
    Outcome,
    objective,
    read_outcome,
    read_summary,
    write_outcome,
)
from subspec.records.run_files import take_lock
from subspec.sweeps.progress import FollowedJob
from subspec.utils.files import RESUME_HINT, write_error
from subspec.utils.paths import PACKAGE

INTERRUPT_EXIT = 130
IN_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""``hydra/launcher=basic``: all jobs in the sweep's own process, one after another, for debugging."""

LOCK_WAIT_S = 60.0  # that a job waits for the orphan of a killed sweep to leave its folder
_OF_THE_SWEEP = re.compile(r"hydra[./](sweep|sweeper|launcher|mode)\b")


class JobFailed(SubspecError):
    """A job of a sweep failed; the others continue.

    Attributes:
        exit_code: of its process; negative for a signal.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class JobProcess(FollowedJob):
    """A job in a process of its own.

    Args:
        folder: run folder.
        command: command line.
        max_samples: ``benchmark.max_samples``.
        optimise: total that a search maximises; None outside a search.
        device: as configured: ``auto``, ``cpu`` or ``cuda``.
        label: name for people.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        max_samples: int | None,
        optimise: str | None,
        device: str = "auto",
        label: str = "",
    ) -> None:
        super().__init__(folder, label)
        self.command, self.max_samples, self.optimise, self.device = command, max_samples, optimise, device
        self.outcome: Outcome | None = None  # of this attempt
        self._log_start, self._ended_by_us = 0, False
        self._process: subprocess.Popen

    def start(self) -> None:
        """Start the process.

        Raises:
            SubspecError: its folder cannot be written, or another process is in it.
        """
        before = read_outcome(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.folder, LOCK_WAIT_S)
            if lock is None:
                raise SubspecError(f"run_dir={self.folder} is in use by another process: wait for it, or end it")
            lock.release()
            attempts = 1 + (before.attempts if before else 0)
            self.outcome = Outcome(RUNNING, attempts=attempts, samples=self.max_samples)
            write_outcome(self.folder, self.outcome)
            self.log.skip()
            self._log_start, self.started_s = self.log.position, time.monotonic()
            with self.log.path.open("ab") as log:
                self._process = self._spawn(log)
        except OSError as error:
            remedy = RESUME_HINT.format(run_dir=self.folder)
            raise write_error(error, Path(error.filename or self.folder), remedy) from error

    def _spawn(self, log: BinaryIO) -> subprocess.Popen:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,  # open while the sweep lives, see subspec.cli.job
            stdout=log,
            stderr=subprocess.STDOUT,
            env=job_environment(self.gpu),
            start_new_session=True,  # the sweep forwards Ctrl-C once
        )

    def poll(self) -> Outcome | None:
        """Update the progress; returns the outcome once the process has ended."""
        code = self._process.poll()
        self.follow()
        return None if code is None else self._ended(code)

    def interrupt(self) -> None:
        """Send SIGINT: the job ends and remains resumable."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL; finished turns remain."""
        self._ended_by_us = True
        self._process.send_signal(signal.SIGKILL)

    def wait(self) -> Outcome:
        """Wait for the end and return the outcome."""
        while (outcome := self.poll()) is None:
            time.sleep(0.1)
        return outcome

    def _ended(self, code: int) -> Outcome:
        if self.total is None:  # the run had been finished before
            self.done = self.total = len(self.samples)
        self._process.stdin.close()
        if code == 0:
            status, reason = OK, ""
        elif self._ended_by_us or code in (INTERRUPT_EXIT, -signal.SIGINT):
            # -SIGINT: interrupted during interpreter shutdown.
            status, reason = INTERRUPTED, "interrupted; it continues when the sweep is run again"
        else:
            status, reason = FAILED, end_reason(code, self._log_text())
        self.outcome = replace(self.outcome, status=status, exit_code=code, reason=reason, seconds=self.seconds)
        try:
            write_outcome(self.folder, self.outcome)
        except OSError as error:  # the records are kept; without job.json the job is checked again
            failure = write_error(error, self.folder / OUTCOME, "free some space and run the sweep again")
            self.outcome = replace(self.outcome, status=FAILED, exit_code=code or 1, reason=str(failure))
        return self.outcome

    def _log_text(self) -> str:
        try:
            return self.log.path.read_bytes()[self._log_start :].decode("utf-8", "replace")
        except OSError:
            return ""


def job_process(hydra: DictConfig, task: DictConfig) -> JobProcess:
    """The job of a composed configuration: its ``hydra`` node, and the remaining keys."""
    folder = Path(str(hydra.sweep.dir)) / str(hydra.sweep.subdir)
    sources = hydra.runtime.config_sources
    flags = [] if hydra.job.config_name == "config" else [f"--config-name={hydra.job.config_name}"]
    flags += [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    ours = [text for text in hydra.overrides.hydra if not _OF_THE_SWEEP.match(text.lstrip("+~"))]
    given = [text for text in hydra.overrides.task if not re.match(r"\+*(resume|run_dir)=", text)]
    end = ["hydra.mode=RUN", f"run_dir={folder}", "resume=true"]
    return JobProcess(
        folder,
        [sys.executable, "-m", "subspec.cli.job", *flags, *given, *ours, *end],
        OmegaConf.select(task, "benchmark.max_samples"),
        word(OmegaConf.select(task, "optimise")),
        word(OmegaConf.select(task, "device")) or "auto",
        label=" ".join(map(str, hydra.overrides.task)),
    )


def word(value: Any) -> str | None:
    """A configured word, given as a string or as an enum of the schema."""
    return None if value is None else str(getattr(value, "value", value))


def job_environment(gpu: str | None) -> dict[str, str]:
    """Environment of a job's process. ``gpu``: the visible one, in CUDA's naming; None: unchanged."""
    # The same package as here, also from a checkout or an unpacked wheel that is on sys.path only.
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    # Unbuffered: the log of a killed job is complete.
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **visible}


def end_reason(code: int, log: str) -> str:
    """Why a process failed, in one line. ``code``: negative for a signal. ``log``: its output."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        memory = " (by hand, or by the system when memory ran out)" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [f"ended with status {code} and no word", *lines[-1:], *errors[-1:]][-1]


class QuietReturn(JobReturn):
    """A job's result for Hydra, whose own class prints a line when the value of a failed job is read."""

    @property
    def return_value(self) -> Any:
        """The job's value; raises its exception if it failed."""
        if self.status is JobStatus.COMPLETED:
            return self._return_value
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def job_result(
    overrides: Sequence[str], outcome: Outcome | None, folder: Path, optimise: str | None, error: object = None
) -> QuietReturn:
    """Hydra's result of a job. ``error``: of its launcher, if the folder tells no outcome."""
    result = QuietReturn(overrides=list(overrides), working_dir=os.getcwd(), status=JobStatus.FAILED)
    if outcome is not None and outcome.status == OK:
        result.status, result.return_value = JobStatus.COMPLETED, objective(read_summary(folder), optimise)
    elif outcome is not None and outcome.reason:
        result.return_value = _failure(outcome, folder)
    else:
        result.return_value = JobFailed(f"its worker ended: {error}", 1)
    return result


def _failure(outcome: Outcome, folder: Path) -> JobFailed:
    return JobFailed(f"{outcome.reason} ({folder / LOG})", outcome.exit_code or 1)


def run_in_process(job: JobProcess) -> float | None:
    """Run a job and wait for it, on a worker of another project's launcher.

    Returns:
        The figure that a search maximises, if there is one.

    Raises:
        JobFailed: it failed.
        KeyboardInterrupt: it was interrupted.
    """
    job.start()
    try:
        outcome = job.wait()
    except BaseException:
        job.interrupt()
        job.wait()
        raise
    if outcome.status == INTERRUPTED:
        raise KeyboardInterrupt
    if outcome.status != OK:
        raise _failure(outcome, job.folder)
    return objective(read_summary(job.folder), job.optimise)
