"""A launcher around another launcher that runs only the missing jobs, each in its folder.

It makes every sweep resumable, with any launcher and any sweeper.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import mul
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from subspec.config.effective import effective
from subspec.config.errors import CONFIG_EXCEPTIONS, explain
from subspec.config.schema import to_plain
from subspec.errors import ConfigError, SubspecError
from subspec.records.outcome import FAILED, OK, RUNNING, Outcome, is_finished, read_outcome, write_outcome
from subspec.records.same_run import FREE_KEYS
from subspec.records.sweep_folder import Job, SweepFolder, config_digest
from subspec.runs.console import RunConsole
from subspec.sweeps.follow import ForeignJob, watched
from subspec.sweeps.job_table import labels
from subspec.sweeps.process import IN_PROCESS, job_result
from subspec.sweeps.progress import SweepProgress

Entry = tuple[Job, list[str], dict[str, Any]]
"""A job, its overrides, and its resolved configuration."""

ALIASES = {"resume", "run_dir", "experiment", "hparams_search", "study"}
"""Keys that name or place a job, and do not vary it."""


def _check_one_job(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Check that two configurations of one job agree in the keys that a sweep cannot vary.

    Raises:
        ConfigError: naming the key.
    """
    for key in sorted(FREE_KEYS - ALIASES):
        values = [reduce(dict.get, key.split("."), config) for config in (first, second)]
        if values[0] != values[1]:
            what = "" if isinstance(values[0], Mapping) else f"={values[0]},{values[1]}"
            raise ConfigError(f"{key}{what}: jobs that differ in this key alone are one job; give one value")


def _work(configs: Sequence[Mapping[str, Any]]) -> str:
    """The amount of work of some jobs, in one line."""
    samples = [config["benchmark"]["max_samples"] for config in configs]
    tokens = [config["decoding"]["max_new_tokens"] for config in configs]
    total = "" if None in samples + tokens else f", up to {sum(map(mul, samples, tokens)):,} tokens a turn each"
    known = "" if None in samples else f", {sum(samples)} samples"
    return f"{len(configs)} jobs{known}{total}; each loads its models anew, and the first sample tells the time left"


@dataclass
class ResumableLauncher:
    """Launches the missing jobs of a sweep.

    Args:
        inner: the launcher that runs the jobs.
        context: Hydra's context.
        config: configuration of the whole sweep, ``hydra`` node included.
        folder: folder of the sweep.
        total: jobs of the whole sweep, if :meth:`launch` gets them in several calls.
        keys: overrides that identify jobs in labels; None: those in which they differ.

    Attributes:
        jobs: the requested jobs in order, each once.
    """

    inner: Launcher
    context: HydraContext
    config: DictConfig
    folder: SweepFolder
    total: int | None = None
    keys: Collection[str] | None = None
    jobs: list[Job] = field(default_factory=list, init=False)
    finished_before: int = field(default=0, init=False)
    console: RunConsole = field(default_factory=RunConsole, init=False)
    _progress: SweepProgress | None = field(default=None, init=False)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the missing jobs; returns one result per list of overrides, in order."""
        setup_globals()
        overrides = [[t for t in texts if not t.startswith("resume=")] for texts in job_overrides]
        configs = [self._compose(texts) for texts in overrides]
        first: dict[str, dict[str, Any]] = {}
        for config in configs:
            _check_one_job(first.setdefault(config_digest(effective(config)), config), config)
        jobs = self.folder.assign(list(zip(overrides, configs, strict=True)))
        wanted: dict[int, Entry] = {}
        for entry in zip(jobs, overrides, configs, strict=True):
            wanted.setdefault(entry[0].number, entry)
        if len(wanted) < len(jobs) and self.total is None:
            self.console.note(
                f"{len(jobs)} combinations make {len(wanted)} runs: the others differ in keys without effect"
            )
        self.jobs += [job for job, _, _ in wanted.values() if job not in self.jobs]
        missing = [
            (job, texts, config)
            for job, texts, config in wanted.values()
            if not is_finished(self.folder.job_folder(job), config["benchmark"]["max_samples"], config["plan_only"])
        ]
        self.finished_before += len(wanted) - len(missing)
        if hasattr(self.inner, "expect"):
            self.inner.expect(self.total or len(self.jobs), self._labels(), self.finished_before)
        if self.total is None and len(missing) > 1:
            self.console.note(_work([config for _, _, config in missing]))
        error = self._run(missing, initial_job_idx)
        return [self._result(job, config, error) for job, config in zip(jobs, configs, strict=True)]

    def _labels(self) -> dict[str, str]:
        """Labels of the jobs by the name of their folder."""
        return {str(number): text for number, text in labels(self.jobs, self.keys).items()}

    def _watched(self, jobs: Sequence[Job]) -> AbstractContextManager[None]:
        """Progress for another project's launcher, from the files that its jobs write."""
        if hasattr(self.inner, "expect") or self.config.hydra.launcher._target_ == IN_PROCESS:
            return nullcontext()
        named = self._labels()
        foreign = [ForeignJob(self.folder.job_folder(job), named[str(job.number)]) for job in jobs]
        self._progress = self._progress or SweepProgress(0)
        self._progress.total = self.total or len(self.jobs)
        self._progress.finished_before = self.finished_before
        return watched(self._progress, foreign)

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(config)
        return to_plain(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))

    def _run(self, missing: Sequence[Entry], first: int) -> Exception | None:
        """Launch the jobs and keep their outcomes; returns the error of a launcher that ended before all of them."""
        if not missing:
            return None
        place = str(self.config.hydra.sweep.dir).replace("\\", "\\\\").replace('"', '\\"')
        lists = [
            [*texts, f'hydra.sweep.dir="{place}"', f"hydra.sweep.subdir='{job.number}'", "resume=true"]
            for job, texts, _ in missing
        ]
        folders = [self.folder.job_folder(job) for job, _, _ in missing]
        before, began = [read_outcome(folder) for folder in folders], time.time()
        try:
            with self._watched([job for job, _, _ in missing]):
                results = self.inner.launch(lists, initial_job_idx=first)
        except Exception as error:
            if not any(map(read_outcome, folders)):
                raise self._launcher_failed(error) from error
            return error  # other projects' launchers stop at the first worker that dies
        for folder, (_, _, config), result, old in zip(folders, missing, results, before, strict=True):
            self._keep(folder, config, result, time.time() - began, old)
        return None

    def _launcher_failed(self, error: Exception) -> Exception:
        """The error for a launcher that started no job."""
        if hasattr(self.inner, "expect") or isinstance(error, (SubspecError, *CONFIG_EXCEPTIONS)):
            return error
        launcher = self.config.hydra.runtime.choices["hydra/launcher"]
        return SubspecError(
            f"hydra/launcher={launcher} could not start a job ({str(error) or type(error).__name__}): see "
            f"conf/hydra/launcher/{launcher}.yaml, or hydra/launcher=process runs the jobs on this machine"
        )

    def _keep(
        self, folder: Path, config: Mapping[str, Any], result: JobReturn, seconds: float, before: Outcome | None
    ) -> None:
        """Write the outcome of a job that ran in this process.

        Args:
            before: the outcome in its folder before this attempt.
        """
        found = read_outcome(folder)
        if found != before and found is not None and found.status != RUNNING:
            return
        samples, attempts = config["benchmark"]["max_samples"], 1 + (before.attempts if before else 0)
        outcome = Outcome(OK, 0, seconds=seconds, attempts=attempts, samples=samples)
        if result.status is not JobStatus.COMPLETED:
            error = result._return_value  # the property prints
            reason = explain(error) if isinstance(error, CONFIG_EXCEPTIONS) else str(error)
            outcome = Outcome(FAILED, getattr(error, "exit_code", 1), reason, seconds, attempts, samples)
        write_outcome(folder, outcome)

    def _result(self, job: Job, config: Mapping[str, Any] | None, error: Exception | None = None) -> JobReturn:
        """The result of a job, read from its folder."""
        folder = self.folder.job_folder(job)
        return job_result(job.overrides, read_outcome(folder), folder, (config or {}).get("optimise"), error)
