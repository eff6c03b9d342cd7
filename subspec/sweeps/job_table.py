"""The table of a sweep: one row per job, printed and written as Markdown and CSV."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich import box
from rich.table import Table

from subspec.errors import SubspecError
from subspec.records.outcome import LOG, MISSING, OK, RUNNING, objective, read_outcome, read_summary
from subspec.records.run_folder import read_records
from subspec.records.summary_table import banners, decimals
from subspec.records.sweep_folder import Job, SweepFolder
from subspec.runs.console import RunConsole, clock
from subspec.utils.files import write_atomic, writing
from subspec.utils.terminal import one_line

UNFINISHED = "unfinished"  # status of a job that was killed together with the sweep


@dataclass
class Row:
    """A job and its outcome. Figures that were not measured are None."""

    job: int
    parameters: dict[str, str] = field(default_factory=dict)
    status: str = MISSING
    samples: int | None = None
    tokens_per_s: float | None = None
    tau: float | None = None
    seconds: float | None = None
    reason: str = ""
    value: float | None = None

    @property
    def label(self) -> str:
        """Its parameters."""
        return _label(self.parameters)


def _label(parameters: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in parameters.items()) or "(as configured)"


def labels(jobs: Sequence[Job], keys: Collection[str] | None = None) -> dict[int, str]:
    """Labels of the jobs of a sweep by job number. ``keys``: as for :func:`varying`."""
    return {number: _label(parameters) for number, parameters in varying(jobs, keys).items()}


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


def _bare(value: str) -> str:
    """A value without quotes of Hydra's grammar."""
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def job_rows(
    folder: SweepFolder, jobs: Sequence[Job], optimise: str | None = None, keys: Collection[str] | None = None
) -> list[Row]:
    """Rows of all jobs, read from their folders. ``keys``: as for :func:`varying`."""
    rows = [Row(number, parameters) for number, parameters in varying(jobs, keys).items()]
    for row, place in zip(rows, map(folder.job_folder, jobs), strict=True):
        if (outcome := read_outcome(place)) is not None:
            row.status = UNFINISHED if outcome.status == RUNNING else outcome.status
            row.seconds, row.reason = outcome.seconds, outcome.reason
        if (summary := read_summary(place)) is not None:
            row.tokens_per_s, row.tau = (summary["totals"].get(name) for name in ("tokens_per_s", "tau"))
            row.value = objective(summary, optimise)
        try:
            row.samples = len({record["sample_id"] for record in read_records(place)[0]})
        except SubspecError:
            row.samples = None
    return rows


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows of a search: best value first, rows without a value last."""
    return sorted(rows, key=lambda row: (row.value is None, -(row.value or 0.0), row.job))


def show_rows(
    console: RunConsole, rows: Sequence[Row], jobs: Sequence[Path], path: Path, title: str, word: str
) -> None:
    """Print the table and write its files ``path``.*, each with the warnings of the summaries in the ``jobs``' folders.

    ``title``: heading of the Markdown file. ``word``: name of the table on the console.
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
        samples = "-" if row.samples is None else str(row.samples)
        figures = samples, decimals(row.tokens_per_s), decimals(row.tau), clock(row.seconds)
        style = None if row.status == OK else "yellow"
        table.add_row(str(row.job), one_line(row.label), row.status, *figures, style=style)
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
    keys = dict.fromkeys(key for row in rows for key in row.parameters)
    cells = [
        {
            "job": row.job,
            **{key: row.parameters.get(key, "") for key in keys},
            "status": row.status,
            "samples": row.samples,
            "tokens/s": None if row.tokens_per_s is None else f"{row.tokens_per_s:.4g}",
            "tau": None if row.tau is None else f"{row.tau:.4g}",
            "seconds": None if row.seconds is None else f"{row.seconds:.1f}",
            "why": one_line(row.reason),
        }
        for row in rows
    ]
    heads = ["job", *keys, "status", "samples", "tokens/s", "tau", "seconds", "why"]
    table = pd.DataFrame(cells, columns=heads, dtype=object).fillna("").map(str)
    lines = [f"# {title}", ""]
    for line in (heads, ["---"] * len(heads), *table.itertuples(index=False)):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    files = {path.with_suffix(".md"): "\n".join(lines) + "\n", path.with_suffix(".csv"): table.to_csv(index=False)}
    for file, content in files.items():
        with writing(file, "free some space and run the sweep again"):
            write_atomic(file, content.encode("utf-8", "replace"))
    return list(files)
