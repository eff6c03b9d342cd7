"""``hydra/launcher=process``: every job in a fresh process, one at a time on each GPU.

Speed is only comparable when nothing leaks from one job into the next: allocator peaks, compiled and captured
graphs, caches. And a sweep of days must survive the job that runs out of memory. So each job is
``python -m subspec.run`` with its overrides, with its own folder and log; the launcher only watches.
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
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from subspec.errors import ConfigError, SubspecError
from subspec.records.outcome import FAILED, OK, Outcome
from subspec.sweeps.process import JobProcess, JobSpec, QuietReturn, failure, job_spec, word
from subspec.sweeps.progress import SweepProgress

POLL_S = 0.2


class ProcessLauncher(Launcher):
    """Runs jobs as processes of their own.

    Args:
        jobs: how many at a time; None: one per GPU, one on a machine without.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs
        self.labels: Mapping[str, str] = {}
        self.expected: int | None = None
        self._progress: SweepProgress | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra.

        Raises:
            ConfigError: ``jobs`` is no number of jobs (Hydra would wrap this up, had the constructor raised it).
        """
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs={self.jobs} must be at least 1 (null: one per GPU)")
        self.hydra_context = hydra_context
        self.config = config

    def expect(self, total: int, labels: Mapping[str, str], finished: int = 0) -> None:
        """What the progress shows.

        Args:
            total: jobs of the whole sweep.
            labels: what to call a job, by the name of its folder.
            finished: those of ``total`` that need not be run.
        """
        self.labels = labels
        if self._progress is None:
            self._progress = SweepProgress(total, finished)
        else:
            self._progress.total, self._progress.finished_before = total, finished

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; one result each, in their order. A job that fails ends no other.

        Raises:
            KeyboardInterrupt: the sweep was interrupted (Ctrl-C or SIGTERM); its running jobs have ended.
        """
        setup_globals()
        configs = [self._compose(i, texts) for i, texts in enumerate(job_overrides, start=initial_job_idx)]
        if self._progress is None:
            self._progress = SweepProgress(len(configs))
        specs = [job_spec(config.hydra, config) for config in configs]
        jobs = [(spec, self._label(config)) for spec, config in zip(specs, configs, strict=True)]
        with _terminated_as_interrupted(), self._progress.shown() as progress:
            done = _Queue(jobs, self._slots(all(spec.device == "cpu" for spec in specs)), progress).run()
        return [_job_return(config, *done[index]) for index, config in enumerate(configs)]

    def _compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            # The folder of the sweep as a whole: a file that a job does not compose may have chosen it.
            config.hydra.sweep.dir = str(self.config.hydra.sweep.dir)
        HydraConfig.instance().set_config(config)
        return config

    def _label(self, config: DictConfig) -> str:
        name = str(config.hydra.sweep.subdir)
        return self.labels.get(name) or " ".join(map(str, config.hydra.overrides.task))

    def width(self) -> int:
        """How many jobs run at the same time."""
        return len(self._slots(word(OmegaConf.select(self.config, "device")) == "cpu"))

    def _slots(self, cpu: bool) -> list[str | None]:
        """The GPU of every job that may run at the same time; None: nothing to choose. ``cpu``: asked for."""
        if cpu:
            return [None] * (self.jobs or 1)
        gpus: list[str | None] = list(visible_gpus()) or [None]
        count = self.jobs or len(gpus)
        return [gpus[index % len(gpus)] for index in range(count)]


class _Queue:
    """Jobs that wait, jobs that run, and what came of the others."""

    def __init__(
        self, jobs: Sequence[tuple[JobSpec, str]], slots: Sequence[str | None], progress: SweepProgress
    ) -> None:
        self.waiting = deque((index, spec, label) for index, (spec, label) in enumerate(jobs))
        self.free = deque(slots)
        self.running: dict[int, JobProcess] = {}
        self.done: dict[int, tuple[Outcome, JobProcess]] = {}
        self.progress = progress

    def run(self) -> dict[int, tuple[Outcome, JobProcess]]:
        try:
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self._start(*self.waiting.popleft())
                for index, job in list(self.running.items()):
                    if (outcome := job.poll()) is not None:
                        self._finish(index, outcome)
                self.progress.update(list(self.running.values()))
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
            self.done[index] = (Outcome(FAILED, error.exit_code, str(error)), job)
            self.progress.finished(job, self.done[index][0])
            return
        self.free.popleft()
        self.running[index] = job
        self.progress.started(job)

    def _finish(self, index: int, outcome: Outcome) -> None:
        job = self.running.pop(index)
        self.free.append(job.gpu)
        self.done[index] = (outcome, job)
        self.progress.finished(job, outcome)

    def _stop(self, interrupted: bool) -> None:
        """End what runs: gently, or, asked a second time, at once."""
        for job in self.running.values():
            job.interrupt()
        if interrupted and self.running:
            self.progress.note(
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
    """The GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; empty on a machine without."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


def _job_return(config: DictConfig, outcome: Outcome, job: JobProcess) -> JobReturn:
    result = QuietReturn(overrides=list(config.hydra.overrides.task), cfg=config, hydra_cfg=config)
    result.working_dir = os.getcwd()
    result.status = JobStatus.COMPLETED if outcome.status == OK else JobStatus.FAILED
    result.return_value = job.value() if outcome.status == OK else failure(outcome, job.folder)
    return result


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A batch system ends a sweep with SIGTERM: the jobs end as they do after Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before: Any = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
