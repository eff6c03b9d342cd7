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

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from subspec.errors import ConfigError, SubspecError
from subspec.records.outcome import FAILED, Outcome
from subspec.sweeps.process import JobProcess, job_process, job_result, word
from subspec.sweeps.progress import SweepProgress

POLL_S = 0.2


class ProcessLauncher(Launcher):
    """Runs jobs as processes of their own.

    Args:
        jobs: number of jobs at a time; None: one per GPU, one without a GPU.

    Attributes:
        progress: display of the whole sweep; None: one of its own.
        labels: labels of jobs by the name of their folder; others are called by their overrides.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs
        self.labels: Mapping[str, str] = {}
        self.progress: SweepProgress | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra.

        Raises:
            ConfigError: ``jobs`` is below 1. (Hydra would wrap an exception of the constructor.)
        """
        if self.jobs is not None and not (isinstance(self.jobs, int) and self.jobs >= 1):
            raise ConfigError(f"hydra.launcher.jobs={self.jobs} must be at least 1 (null: one per GPU)")
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their results in order. A failed job does not affect the others.

        Raises:
            KeyboardInterrupt: the sweep was interrupted (Ctrl-C or SIGTERM) and its running jobs have ended.
        """
        setup_globals()
        configs = [self._compose(i, texts) for i, texts in enumerate(job_overrides, start=initial_job_idx)]
        jobs = [job_process(config.hydra, config) for config in configs]
        for job in jobs:
            job.label = self.labels.get(job.folder.name, job.label)
        self.progress = self.progress or SweepProgress(len(jobs))
        with _terminated_as_interrupted(), self.progress.shown() as progress:
            run_jobs(jobs, self.slots(all(job.device == "cpu" for job in jobs)), progress)
        return [
            job_result(config.hydra.overrides.task, job.outcome, job.folder, job.optimise)
            for config, job in zip(configs, jobs, strict=True)
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

    def width(self) -> int:
        """Number of jobs that run at the same time."""
        return len(self.slots(word(OmegaConf.select(self.config, "device")) == "cpu"))

    def slots(self, cpu: bool) -> list[str | None]:
        """The GPU of every job that may run at the same time; None: nothing to choose. ``cpu``: asked for."""
        gpus: list[str | None] = [None] if cpu else [*visible_gpus()] or [None]
        return [gpus[index % len(gpus)] for index in range(self.jobs or len(gpus))]


def run_jobs(jobs: Sequence[JobProcess], slots: Sequence[str | None], progress: SweepProgress) -> None:
    """Run jobs in order, one per slot at a time; each has its outcome then.

    Args:
        slots: the visible GPU of a job that runs there.

    Raises:
        KeyboardInterrupt: interrupted; the running jobs have ended, and the waiting ones have no outcome.
    """
    waiting, free, running = deque(jobs), deque(slots), []

    def finish(job: JobProcess, outcome: Outcome) -> None:
        running.remove(job)
        free.append(job.gpu)
        progress.finished(job, outcome)

    try:
        while waiting or running:
            while waiting and free:
                job = waiting.popleft()
                job.gpu = free[0]
                try:
                    job.start()
                except SubspecError as error:
                    job.outcome = Outcome(FAILED, error.exit_code, str(error))
                    progress.finished(job, job.outcome)
                    continue
                free.popleft()
                running.append(job)
                progress.started(job)
            for job in list(running):
                if (outcome := job.poll()) is not None:
                    finish(job, outcome)
            progress.update(running, [job.label for job in waiting])
            if running:
                time.sleep(POLL_S)
    except BaseException as stop:
        for job in running:
            job.interrupt()
        if isinstance(stop, KeyboardInterrupt) and running:
            progress.console.note("interrupted: waiting for the running job(s) to end; once more ends them at once")
        try:
            for job in list(running):
                finish(job, job.wait())
        except KeyboardInterrupt:
            for job in running:
                job.kill()
            for job in list(running):
                finish(job, job.wait())
        raise


def visible_gpus() -> list[str]:
    """GPUs of this process in the naming of ``CUDA_VISIBLE_DEVICES``; empty without any."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, as Ctrl-C."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread, so signals are handled elsewhere
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
