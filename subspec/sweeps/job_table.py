"""The table of a sweep: one row per job, printed and written as Markdown and CSV."""

import csv
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from subspec.errors import SubspecError
from subspec.records.outcome import LOG, MISSING, OK, RUNNING, objective, read_outcome, read_summary
from subspec.records.run_folder import read_records
from subspec.records.summary_table import banners, decimals
from subspec.records.sweep_folder import Job, SweepFolder
from subspec.runs.console import RunConsole, clock
from subspec.utils.files import write_atomic, write_error
from subspec.utils.terminal import one_line

UNFINISHED = "unfinished"
"""Status of a job that was killed together with the sweep."""


@dataclass
class Row:
    """A job and its outcome. Figures that were not measured are None."""

    job: int
    label: str
    status: str
    samples: int | None = None
    tokens_per_s: float | None = None
    tau: float | None = None
    seconds: float | None = None
    reason: str = ""
    value: float | None = None
    parameters: dict[str, str] = field(default_factory=dict)


def labels(jobs: Sequence[Job], keys: Collection[str] | None = None) -> dict[int, str]:
    """Labels of the jobs of a sweep by job number. ``keys``: as for :func:`varying`."""
    return {
        number: " ".join(f"{key}={value}" for key, value in parameters.items()) or "(as configured)"
        for number, parameters in varying(jobs, keys).items()
    }


def varying(jobs: Sequence[Job], keys: Collection[str] | None = None) -> dict[int, dict[str, str]]:
    """Overrides that distinguish the jobs of a sweep, by job number.

    Args:
        keys: overrides to use; None: those in which the jobs differ, or all of a single job.
    """
    parsed = {job.number: dict(text.partition("=")[::2] for text in job.overrides) for job in jobs}
    known = dict.fromkeys(key for values in parsed.values() for key in values)
    if keys is not None:
        kept = sorted(key for key in known if key in keys)  # a search proposes them in no fixed order
    else:
        kept = [key for key in known if len(jobs) == 1 or len({values.get(key) for values in parsed.values()}) > 1]
    return {
        number: {key.lstrip("+"): _bare(values[key]) for key in kept if key in values}
        for number, values in parsed.items()
    }


def job_rows(
    folder: SweepFolder, jobs: Sequence[Job], optimise: str | None = None, keys: Collection[str] | None = None
) -> list[Row]:
    """Rows of all jobs, read from their folders. ``keys``: as for :func:`varying`."""
    named, parameters = labels(jobs, keys), varying(jobs, keys)
    return [
        _row(folder.job_folder(job), job.number, named[job.number], parameters[job.number], optimise) for job in jobs
    ]


def _row(folder: Path, job: int, label: str, parameters: dict[str, str], optimise: str | None) -> Row:
    outcome = read_outcome(folder)
    row = Row(job, label, MISSING, parameters=parameters)
    if outcome is not None:
        row.status = UNFINISHED if outcome.status == RUNNING else outcome.status
        row.seconds, row.reason = outcome.seconds, outcome.reason
    summary = read_summary(folder)
    if summary is not None:
        row.tokens_per_s, row.tau = (summary["totals"].get(name) for name in ("tokens_per_s", "tau"))
        row.value = objective(summary, optimise)
    try:
        row.samples = len({record["sample_id"] for record in read_records(folder)[0]})
    except SubspecError:
        row.samples = None
    return row


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows of a search: best value first, rows without a value last."""
    return sorted(rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.job))


def show_rows(
    console: RunConsole, rows: Sequence[Row], jobs: Sequence[Path], path: Path, title: str, word: str
) -> None:
    """Print the table and write its files, each with the warnings of the jobs' summaries.

    Args:
        jobs: run folders.
        path: files to write, without suffix.
        title, word: heading of the Markdown file; name of the table on the console.
    """
    summaries = filter(None, map(read_summary, jobs))
    notes = list(dict.fromkeys(line for summary in summaries for line in banners(summary)))
    print_rows(console, rows, notes)
    try:
        files = write_rows(path, rows, title, notes)
        console.note(f"{word}: {files[0]}, {files[1]}")
    except SubspecError as error:
        console.warn(str(error))


def print_rows(console: RunConsole, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Print the table, the reasons of failures, and ``notes``."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("job", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("status")
    for name in ("samples", "tokens/s", "tau", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        style = None if row.status == OK else "yellow"
        table.add_row(*(one_line(cell) for cell in _cells(row)), style=style)
    console.rich.print(table)
    for row in rows:
        if row.reason and row.status != OK:
            console.warn(f"job {row.job} {row.status}: {row.reason} (log: {row.job}/{LOG})")
    for line in notes:
        console.note(line)


def write_rows(path: Path, rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> list[Path]:
    """Write ``path`` with the suffixes ``.md`` and ``.csv``.

    Raises:
        SubspecError: they cannot be written.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row.parameters))
    heads = ["job", *keys, "status", "samples", "tokens/s", "tau", "seconds", "why"]
    body = [
        [
            str(row.job),
            *(row.parameters.get(key, "") for key in keys),
            row.status,
            "" if row.samples is None else str(row.samples),
            *("" if value is None else f"{value:.4g}" for value in (row.tokens_per_s, row.tau)),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            one_line(row.reason),
        ]
        for row in rows
    ]
    lines = [f"# {title}", "", _markdown_row(heads), _markdown_row(["---"] * len(heads))]
    lines += [_markdown_row(cells) for cells in body]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *body])
    files = {path.with_suffix(".md"): "\n".join(lines) + "\n", path.with_suffix(".csv"): text.getvalue()}
    for file, content in files.items():
        try:
            write_atomic(file, content.encode("utf-8", "replace"))
        except OSError as error:
            raise write_error(error, file, "free some space and run the sweep again") from error
    return list(files)


def _cells(row: Row) -> list[str]:
    return [
        str(row.job),
        row.label,
        row.status,
        "-" if row.samples is None else str(row.samples),
        decimals(row.tokens_per_s),
        decimals(row.tau),
        clock(row.seconds),
    ]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"([|])", r"\\\1", cell) for cell in cells) + " |"


def _bare(value: str) -> str:
    """A value without quotes of Hydra's grammar."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
