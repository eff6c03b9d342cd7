"""A launcher around another launcher that runs only the missing jobs, each in its folder.

It makes every sweep resumable, with any launcher and any sweeper.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce
from operator import mul
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
from subspec.sweeps.job_table import labels
from subspec.sweeps.launcher import ProcessLauncher
from subspec.sweeps.process import IN_PROCESS, job_result
from subspec.sweeps.progress import ForeignJob, SweepProgress, watched

Entry = tuple[Job, list[str], dict[str, Any]]  # a job, its overrides, and its resolved configuration
ALIASES = {"resume", "run_dir", "experiment", "hparams_search", "study"}  # name or place a job, and do not vary it


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
        progress: display of the whole sweep.
    """

    inner: Launcher
    context: HydraContext
    config: DictConfig
    folder: SweepFolder
    total: int | None = None
    keys: Collection[str] | None = None
    jobs: list[Job] = field(default_factory=list, init=False)
    progress: SweepProgress = field(default_factory=SweepProgress, init=False)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the missing jobs; returns one result per list of overrides, in order."""
        setup_globals()
        note = self.progress.console.note
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
            note(f"{len(jobs)} combinations make {len(wanted)} runs: the others differ in keys without effect")
        self.jobs += [job for job, _, _ in wanted.values() if job not in self.jobs]
        missing = [
            (job, texts, config)
            for job, texts, config in wanted.values()
            if not is_finished(self.folder.job_folder(job), config["benchmark"]["max_samples"], config["plan_only"])
        ]
        self.progress.total = self.total or len(self.jobs)
        self.progress.finished_before += len(wanted) - len(missing)
        if self.total is None and len(missing) > 1:
            note(_work([config for _, _, config in missing]))
        error = self._run(missing, initial_job_idx) if missing else None
        results = []
        for job, config in zip(jobs, configs, strict=True):
            folder = self.folder.job_folder(job)
            results.append(job_result(job.overrides, read_outcome(folder), folder, config["optimise"], error))
        return results

    def _compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(config)
        return to_plain(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))

    def _run(self, missing: Sequence[Entry], first: int) -> Exception | None:
        """Launch the jobs and keep their outcomes; returns the error of a launcher that ended before all of them."""
        place = str(self.config.hydra.sweep.dir).replace("\\", "\\\\").replace('"', '\\"')
        lists = [
            [*texts, f'hydra.sweep.dir="{place}"', f"hydra.sweep.subdir='{job.number}'", "resume=true"]
            for job, texts, _ in missing
        ]
        folders = [self.folder.job_folder(job) for job, _, _ in missing]
        named = {str(number): text for number, text in labels(self.jobs, self.keys).items()}
        before, began = [read_outcome(folder) for folder in folders], time.time()
        display = nullcontext()
        if isinstance(self.inner, ProcessLauncher):
            self.inner.progress, self.inner.labels = self.progress, named
        elif self.config.hydra.launcher._target_ != IN_PROCESS:  # another project's
            display = watched(self.progress, [ForeignJob(folder, named[folder.name]) for folder in folders])
        try:
            with display:
                results = self.inner.launch(lists, initial_job_idx=first)
        except Exception as error:
            if any(map(read_outcome, folders)):
                return error  # other projects' launchers stop at the first worker that dies
            if isinstance(self.inner, ProcessLauncher) or isinstance(error, (SubspecError, *CONFIG_EXCEPTIONS)):
                raise
            launcher = self.config.hydra.runtime.choices["hydra/launcher"]
            raise SubspecError(
                f"hydra/launcher={launcher} could not start a job ({str(error) or type(error).__name__}): see "
                f"conf/hydra/launcher/{launcher}.yaml, or hydra/launcher=process runs the jobs on this machine"
            ) from error
        for folder, (_, _, config), result, old in zip(folders, missing, results, before, strict=True):
            found = read_outcome(folder)
            if found is None or found == old or found.status == RUNNING:  # it ran in this process
                samples = config["benchmark"]["max_samples"]
                write_outcome(folder, _outcome(result, samples, time.time() - began, 1 + (old.attempts if old else 0)))
        return None


def _outcome(result: JobReturn, samples: int | None, seconds: float, attempts: int) -> Outcome:
    """The outcome of a job that ran in this process."""
    if result.status is JobStatus.COMPLETED:
        return Outcome(OK, 0, "", seconds, attempts, samples)
    error = result._return_value  # the property prints
    reason = explain(error) if isinstance(error, CONFIG_EXCEPTIONS) else str(error)
    return Outcome(FAILED, getattr(error, "exit_code", 1), reason, seconds, attempts, samples)
