"""``hydra/sweeper=grid``: every combination of the values given, or every row of a table experiment.

A *table experiment* is a file in ``conf/experiment/`` with ``hydra.sweeper.params``: its rows are other experiments
(``experiment: paper/a,paper/b``), crossed with benchmarks or whatever else it lists. What the command line says about
the same keys wins, except for ``experiment=`` itself, which named the table.
"""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from subspec.errors import SubspecError
from subspec.records.outcome import INTERRUPTED, OK, read_outcome, read_summary
from subspec.records.sweep_folder import SweepFolder
from subspec.records.table import banners
from subspec.runs.console import RunConsole
from subspec.sweeps.resumable import ResumableLauncher
from subspec.sweeps.table import Row, job_rows, print_rows, write_rows

TABLE = "sweep"
REPORT = "report"


class SweepFailed(SubspecError):
    """At least one job of a sweep did not end well.

    Attributes:
        exit_code: the jobs' own where they agree, else 1.
    """

    def __init__(self, message: str, codes: Sequence[int]) -> None:
        super().__init__(message)
        self.exit_code = codes[0] if len(set(codes)) == 1 and codes[0] > 0 else 1


class GridSweeper(Sweeper):
    """Runs every combination.

    Args:
        params: values of a table experiment by key, in the grammar of the command line.
    """

    def __init__(self, params: dict[str, str] | None = None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run what is missing, then print and write the table.

        Raises:
            SweepFailed: a job did not end well.
        """
        jobs = combinations(
            [*(f"{k}={v}" for k, v in self.params.items()), *task_arguments(arguments, self.params)],
            self.hydra_context,
        )
        console = RunConsole()
        with SweepFolder.open(str(self.config.hydra.sweep.dir), command_of(arguments)) as folder:
            launcher = ResumableLauncher(self.launcher, self.hydra_context, self.config, folder)
            try:
                try:
                    launcher.launch(jobs, initial_job_idx=0)
                finally:
                    # A misspelt value is refused before there is a job, and there is nothing to show.
                    rows = show(console, folder, launcher) if launcher.jobs else []
            except KeyboardInterrupt as stop:  # of the jobs, or of the report
                raise KeyboardInterrupt(continued_by(folder)) from stop
            folder.write(finished=all(row.status == OK for row in rows))
            raise_failures(folder, rows)


def combinations(overrides: Sequence[str], context: HydraContext) -> list[list[str]]:
    """One list of overrides per job; a later override of a key replaces an earlier one."""
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(list(overrides))
    batches = BasicSweeper.split_arguments(parsed, None)
    return list(itertools.chain.from_iterable(batches))


def task_arguments(arguments: Sequence[str], params: dict[str, Any]) -> list[str]:
    """The arguments that the jobs get: the table's name as their ``study``, and no word about resuming."""
    kept = [text for text in arguments if not text.startswith("resume=")]
    if "experiment" not in params:
        return kept
    table = [text.partition("=")[2] for text in kept if text.startswith("experiment=")]
    kept = [text for text in kept if not text.startswith("experiment=")]
    return [*(f"study={name}" for name in table[-1:]), *kept]  # what the user says wins


def command_of(arguments: Sequence[str]) -> list[str]:
    """What the same sweep is found again by."""
    return [text for text in arguments if not text.startswith("resume=")]


def continued_by(folder: SweepFolder) -> str:
    """What to say to somebody who has stopped a sweep."""
    again = shlex.quote(f"sweep_dir={folder.path}")
    return f"finished samples are kept; continue with the same command and {again}"


def show(console: RunConsole, folder: SweepFolder, launcher: ResumableLauncher) -> list[Row]:
    """Print and write the table of a sweep, finished or not, and the report."""
    rows = job_rows(folder, launcher.jobs)
    if launcher.finished_before:
        console.note(f"{launcher.finished_before} of {len(rows)} job(s) had been finished before")
    paths = [folder.job_folder(job) for job in launcher.jobs]
    summaries = [summary for summary in map(read_summary, paths) if summary is not None]
    notes = list(dict.fromkeys(line for summary in summaries for line in banners(summary)))
    print_rows(console, rows, summaries)
    try:
        files = write_rows(folder.path / TABLE, rows, "Jobs of this sweep", notes)
        console.note(f"table: {files[0]}, {files[1]}")
    except SubspecError as error:
        console.warn(str(error))
    if any((path / "records.jsonl").exists() for path in paths):  # the report also names the jobs that failed
        write_report([path for path in paths if path.is_dir()], folder.path / REPORT, console)
    return rows


def write_report(folders: list[Path], out: Path, console: RunConsole) -> None:
    """Tables and plots over the jobs' records. A report that fails costs the sweep nothing but a warning."""
    try:
        from subspec.report import write_report as write
    except ImportError:
        return
    if not folders:
        return
    try:
        report = write(folders, out)
    except Exception as error:
        console.warn(f"no report ({error}); the records are whole: python -m subspec.report {out.parent}/*")
    else:
        console.note(f"report: {report.page}")


def raise_failures(folder: SweepFolder, rows: Sequence[Row]) -> None:
    """End a sweep with failed jobs as such.

    Raises:
        SweepFailed: a job did not end well.
    """
    failed = [row for row in rows if row.status != OK]
    if not failed:
        return
    outcomes = [read_outcome(folder.path / str(row.job)) for row in failed]
    codes = [o.exit_code if o is not None and o.exit_code is not None else 1 for o in outcomes]
    stopped = sum(row.status == INTERRUPTED for row in failed)
    what = f"{len(failed)} of {len(rows)} jobs did not end well" + (
        f" ({stopped} interrupted)" if stopped else ""
    )
    again = shlex.quote(f"sweep_dir={folder.path}")
    raise SweepFailed(
        f"{what}: see the table above; the same command with {again} runs only what is missing",
        codes,
    )
