"""``hydra/launcher=process``: every job in a fresh process, one at a time on each GPU.

A fresh process keeps allocator peaks, captured graphs and caches of one job out of the next, so that speeds are
comparable, and a sweep survives a job that runs out of memory. A job is ``python -m subspec.run`` with its overrides,
its folder and its log.
"""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from subspec.errors import ConfigError, SubspecError
from subspec.records.outcome import FAILED, Outcome
from subspec.sweeps.process import JobProcess, JobSpec, job_result, job_spec, word
from subspec.sweeps.progress import SweepProgress

POLL_S = 0.2


class ProcessLauncher(Launcher):
    """Runs jobs as processes of their own.

    Args:
        jobs: number of jobs at a time; None: one per GPU, one without a GPU.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs
        self.labels: Mapping[str, str] = {}
        self.expected: int | None = None
        self._progress: SweepProgress | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra.

        Raises:
            ConfigError: ``jobs`` is below 1. (Hydra would wrap an exception of the constructor.)
        """
        if self.jobs is not None and not (isinstance(self.jobs, int) and self.jobs >= 1):
            raise ConfigError(f"hydra.launcher.jobs={self.jobs} must be at least 1 (null: one per GPU)")
        self.hydra_context = hydra_context
        self.config = config

    def expect(self, total: int, labels: Mapping[str, str], finished: int = 0) -> None:
        """Set the content of the progress display.

        Args:
            total: jobs of the whole sweep.
            labels: labels of jobs by the name of their folder.
            finished: jobs of ``total`` that earlier sessions finished.
        """
        self.labels = labels
        if self._progress is None:
            self._progress = SweepProgress(total, finished)
        else:
            self._progress.total, self._progress.finished_before = total, finished

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their results in order. A failed job does not affect the others.

        Raises:
            KeyboardInterrupt: the sweep was interrupted (Ctrl-C or SIGTERM) and its running jobs have ended.
        """
        setup_globals()
        configs = [self._compose(i, texts) for i, texts in enumerate(job_overrides, start=initial_job_idx)]
        if self._progress is None:
            self._progress = SweepProgress(len(configs))
        specs = [job_spec(config.hydra, config) for config in configs]
        jobs = [(spec, self._label(config)) for spec, config in zip(specs, configs, strict=True)]
        with _terminated_as_interrupted(), self._progress.shown() as progress:
            done = _Queue(jobs, self._slots(all(spec.device == "cpu" for spec in specs)), progress).run()
        return [
            job_result(config.hydra.overrides.task, done[index], spec.folder, spec.optimise)
            for index, (config, spec) in enumerate(zip(configs, specs, strict=True))
        ]

    def _compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            # The folder of the whole sweep: a file that a job does not compose may have set it.
            config.hydra.sweep.dir = str(self.config.hydra.sweep.dir)
        HydraConfig.instance().set_config(config)
        return config

    def _label(self, config: DictConfig) -> str:
        name = str(config.hydra.sweep.subdir)
        return self.labels.get(name) or " ".join(map(str, config.hydra.overrides.task))

    def width(self) -> int:
        """Number of jobs that run at the same time."""
        return len(self._slots(word(OmegaConf.select(self.config, "device")) == "cpu"))

    def _slots(self, cpu: bool) -> list[str | None]:
        """The GPU of every job that may run at the same time; None: nothing to choose. ``cpu``: asked for."""
        if cpu:
            return [None] * (self.jobs or 1)
        gpus: list[str | None] = list(visible_gpus()) or [None]
        count = self.jobs or len(gpus)
        return [gpus[index % len(gpus)] for index in range(count)]


class _Queue:
    """Waiting and running jobs, and the outcomes of the others."""

    def __init__(
        self, jobs: Sequence[tuple[JobSpec, str]], slots: Sequence[str | None], progress: SweepProgress
    ) -> None:
        self.waiting = deque((index, spec, label) for index, (spec, label) in enumerate(jobs))
        self.free = deque(slots)
        self.running: dict[int, JobProcess] = {}
        self.done: dict[int, Outcome] = {}
        self.progress = progress

    def run(self) -> dict[int, Outcome]:
        try:
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self._start(*self.waiting.popleft())
                for index, job in list(self.running.items()):
                    if (outcome := job.poll()) is not None:
                        self._finish(index, outcome)
                self.progress.update(list(self.running.values()), [label for _, _, label in self.waiting])
                if self.running:
                    time.sleep(POLL_S)
        except BaseException as stop:
            self._stop(interrupted=isinstance(stop, KeyboardInterrupt))
            raise
        return self.done

    def _start(self, index: int, spec: JobSpec, label: str) -> None:
        job = JobProcess(spec, label, gpu=self.free[0])
        try:
            job.start()
        except SubspecError as error:
            self.done[index] = Outcome(FAILED, error.exit_code, str(error))
            self.progress.finished(job, self.done[index])
            return
        self.free.popleft()
        self.running[index] = job
        self.progress.started(job)

    def _finish(self, index: int, outcome: Outcome) -> None:
        job = self.running.pop(index)
        self.free.append(job.gpu)
        self.done[index] = outcome
        self.progress.finished(job, outcome)

    def _stop(self, interrupted: bool) -> None:
        """Interrupt the running jobs; a second interrupt kills them."""
        for job in self.running.values():
            job.interrupt()
        if interrupted and self.running:
            self.progress.console.note(
                "interrupted: waiting for the running job(s) to end; once more ends them at once"
            )
        try:
            for index, job in list(self.running.items()):
                self._finish(index, job.wait())
        except KeyboardInterrupt:
            for job in self.running.values():
                job.kill()
            for index, job in list(self.running.items()):
                self._finish(index, job.wait())


def visible_gpus() -> list[str]:
    """GPUs of this process in the naming of ``CUDA_VISIBLE_DEVICES``; empty without any."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before: Any = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, so signals are handled elsewhere
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
