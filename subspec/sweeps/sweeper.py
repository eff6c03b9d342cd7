"""``hydra/sweeper=grid``: every combination of the given values, or every row of a table experiment.

A *table experiment* is a file in ``conf/experiment/`` with ``hydra.sweeper.params``: its rows are other experiments
(``experiment: paper/a,paper/b``), crossed with benchmarks or whatever else it lists. What the command line says about
the same keys wins, except for ``experiment=`` itself, which named the table.
"""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from subspec.errors import ConfigError, SubspecError
from subspec.records.outcome import INTERRUPTED, OK, read_outcome
from subspec.records.run_files import RECORDS
from subspec.records.sweep_folder import SweepFolder
from subspec.runs.console import RunConsole
from subspec.sweeps.command_line import is_table
from subspec.sweeps.job_table import Row, job_rows, show_rows
from subspec.sweeps.resumable import ResumableLauncher

TABLE = "sweep"
REPORT = "report"


class SweepFailed(SubspecError):
    """At least one job of a sweep failed.

    Attributes:
        exit_code: the common one of the failed jobs, else 1.
    """

    def __init__(self, message: str, codes: Sequence[int]) -> None:
        super().__init__(message)
        self.exit_code = codes[0] if len(set(codes)) == 1 and codes[0] > 0 else 1


class GridSweeper(Sweeper):
    """Runs every combination.

    Args:
        params: values of a table experiment by key, in the grammar of the command line.
    """

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the missing jobs, then print and write the table.

        Raises:
            SweepFailed: a job failed.
        """
        jobs = combinations(
            [*(f"{k}={v}" for k, v in self.params.items()), *task_arguments(arguments, self.params)], self.hydra_context
        )
        self._check_tables(jobs)
        console = RunConsole()
        with SweepFolder.open(str(self.config.hydra.sweep.dir), without_resume(arguments)) as folder:
            launcher = ResumableLauncher(self.launcher, self.hydra_context, self.config, folder)
            with interrupts_explained(folder):  # of the jobs, or of the report
                try:
                    launcher.launch(jobs, initial_job_idx=0)
                finally:
                    # A misspelt value is refused before there is any job.
                    rows = show(console, folder, launcher) if launcher.jobs else []
            folder.write(finished=all(row.status == OK for row in rows))
            raise_failures(folder, rows)

    def _check_tables(self, jobs: Sequence[Sequence[str]]) -> None:
        sources = self.config.hydra.runtime.config_sources
        own = next((source.path for source in sources if source.provider == "command-line"), None)
        for name in {text.partition("=")[2] for texts in jobs for text in texts if text.startswith("experiment=")}:
            if is_table(name, own):
                raise ConfigError(f"experiment={name} is a table, a sweep of its own: give one table at a time")


def combinations(overrides: Sequence[str], context: HydraContext) -> list[list[str]]:
    """Overrides of every job; a later override of a key replaces an earlier one.

    Raises:
        ConfigError: an override that has no value, such as a glob that matches nothing.
    """
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(list(overrides))
    for override in parsed:
        problem = "an interval is for a search (hparams_search=NAME)" if override.is_interval_sweep() else None
        if override.is_discrete_sweep() and not list(override.sweep_iterator()):
            problem = "matches nothing (a glob sees no subfolders)"
        if problem:
            raise ConfigError(f"{override.input_line}: {problem}; list the values, {override.key_or_group}=A,B")
    return list(itertools.chain.from_iterable(BasicSweeper.split_arguments(parsed, None)))


def without_resume(arguments: Sequence[str]) -> list[str]:
    """The overrides by which the same sweep is found again."""
    return [text for text in arguments if not text.startswith("resume=")]


def task_arguments(arguments: Sequence[str], params: Mapping[str, str]) -> list[str]:
    """Arguments of the jobs: with the table's name as their ``study``, without ``resume``."""
    kept = without_resume(arguments)
    if "experiment" not in params:
        return kept
    table = [text.partition("=")[2] for text in kept if text.startswith("experiment=")]
    kept = [text for text in kept if not text.startswith("experiment=")]
    return [*(f"study={name}" for name in table[-1:]), *kept]  # the user's own study takes precedence


@contextmanager
def interrupts_explained(folder: SweepFolder) -> Iterator[None]:
    """Tell with an interrupt how the sweep is continued."""
    try:
        yield
    except KeyboardInterrupt as stop:
        how = f"continue with the same command and {_named(folder)}"
        raise KeyboardInterrupt(f"finished samples are kept; {how}") from stop


def _named(folder: SweepFolder) -> str:
    return shlex.quote(f"sweep_dir={folder.path}")


def show(console: RunConsole, folder: SweepFolder, launcher: ResumableLauncher) -> list[Row]:
    """Print and write the table of a sweep, and the report."""
    rows = job_rows(folder, launcher.jobs)
    if launcher.progress.finished_before:
        console.note(f"{launcher.progress.finished_before} of {len(rows)} job(s) had been finished before")
    paths = [folder.job_folder(job) for job in launcher.jobs]
    show_rows(console, rows, paths, folder.path / TABLE, "Jobs of this sweep", "table")
    if any((path / RECORDS).exists() for path in paths):  # the report also names failed jobs
        write_report([path for path in paths if path.is_dir()], folder.path / REPORT, console)
    return rows


def write_report(folders: list[Path], out: Path, console: RunConsole) -> None:
    """Write a report about the jobs. A failure is a warning."""
    try:
        from subspec.report import write_report as write  # matplotlib takes a second to import

        report = write(folders, out)
    except Exception as error:
        console.warn(f"no report ({error}); the records are whole: python -m subspec.report {out.parent}/*")
    else:
        console.note(f"report: {report.page}")


def raise_failures(folder: SweepFolder, rows: Sequence[Row]) -> None:
    """Raise an error if jobs failed.

    Raises:
        SweepFailed: a job failed.
    """
    failed = [row for row in rows if row.status != OK]
    if not failed:
        return
    outcomes = [read_outcome(folder.path / str(row.job)) for row in failed]
    codes = [o.exit_code if o is not None and o.exit_code is not None else 1 for o in outcomes]
    stopped = sum(row.status == INTERRUPTED for row in failed)
    what = f"{len(failed)} of {len(rows)} jobs did not end well" + (f" ({stopped} interrupted)" if stopped else "")
    remedy = f"see the table above; the same command with {_named(folder)} runs only what is missing"
    raise SweepFailed(f"{what}: {remedy}", codes)
