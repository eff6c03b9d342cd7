"""Write a report: REPORT.md with tables and plots, CSV files, and an index of the runs."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from subspec.records.summary_table import banners
from subspec.report.baseline import make_rows
from subspec.report.layout import save
from subspec.report.plots import DRAWINGS
from subspec.report.rows import Row, grouped
from subspec.report.run_data import RunData, State, collect, sweep_notes
from subspec.report.tables import (
    acceptance_cells,
    acceptance_tables,
    category_cells,
    category_tables,
    markdown_table,
    method_cells,
    methods_table,
    number,
    run_cells,
    setup_text,
    texts_note,
)
from subspec.utils.files import write_atomic, write_error

REPORT = "REPORT.md"
PLOTS = "plots"


@dataclass(frozen=True)
class Report:
    """The written files and their content.

    Attributes:
        folder: folder of the report. page: REPORT.md. tables: CSV files. plots: PNG and SVG files by name.
        rows: one per configuration. runs: all runs found.
        notes: missing and damaged data, one line each; also on the page.
    """

    folder: Path
    page: Path
    tables: Sequence[Path]
    plots: Mapping[str, Sequence[Path]]
    rows: Sequence[Row]
    runs: Sequence[RunData]
    notes: Sequence[str]


def write_report(folders: Sequence[Path], out: Path, baseline: str | None = None) -> Report:
    """Write a report about all runs in and below ``folders`` to ``out``.

    Unfinished runs count with their finished turns, and the page says so.

    Args:
        folders: run folders, sweep folders, or folders above them.
        out: created if missing; files of an earlier report are replaced.
        baseline: baseline of speed-ups: a draft, a method's label, an experiment, a run's name or folder; None: plain
            decoding (draft=none) of the same target and prompts.

    Raises:
        SubspecError: there is no run, no such baseline, or ``out`` cannot be written.
    """
    runs = collect(folders)
    rows, notes = make_rows(runs, baseline)
    notes = [*_run_notes(runs), *sweep_notes(folders), *notes]
    out = Path(out)
    try:
        (out / PLOTS).mkdir(parents=True, exist_ok=True)
        tables = _write_tables(rows, runs, out)
        plots: dict[str, Sequence[Path]] = {}
        for draw in DRAWINGS:
            stem = out / PLOTS / draw.__name__
            if (figure := draw(rows)) is not None:
                plots[draw.__name__] = save(figure, stem)
            else:  # files of an earlier report
                for suffix in (".png", ".svg"):
                    stem.with_suffix(suffix).unlink(missing_ok=True)
        page = out / REPORT
        write_atomic(page, _page(rows, runs, notes, plots).encode("utf-8", "replace"))
    except OSError as error:
        raise write_error(error, Path(error.filename or out), "choose another folder with --out") from error
    return Report(out, page, tables, plots, rows, runs, notes)


def _write_tables(rows: Sequence[Row], runs: Sequence[RunData], out: Path) -> list[Path]:
    tables = {
        "methods.csv": [method_cells(row) for row in rows],
        "acceptance.csv": [cells for row in rows for cells in acceptance_cells(row)],
        "runs.csv": [run_cells(run) for run in runs],
        "categories.csv": [cells for row in rows for cells in category_cells(row)],
    }
    if not tables["categories.csv"]:  # a file of an earlier report
        (out / "categories.csv").unlink(missing_ok=True)
        del tables["categories.csv"]
    for name, cells in tables.items():
        text = pd.DataFrame(cells, dtype=object).to_csv(index=False) if cells else ""
        write_atomic(out / name, text.encode("utf-8", "replace"))
    return [out / name for name in tables]


def _run_notes(runs: Sequence[RunData]) -> list[str]:
    """Notes about unfinished, empty and damaged runs."""
    states, damaged = Counter(run.state for run in runs), sum(run.damaged for run in runs)
    notes = []
    if states[State.unfinished]:
        notes.append(f"{states[State.unfinished]} of {len(runs)} runs are unfinished: their rows may change")
    if states[State.empty]:
        notes.append(f"{states[State.empty]} of {len(runs)} runs have generated nothing yet, and are in no table")
    if damaged:
        notes.append(f"{damaged} damaged record line(s) are left out")
    return notes + [f"{run.name}: {note}" for run in runs for note in run.notes]


# ------------------------------------------------------------------------------------------------- page

LEGEND = """\
*tokens/s*: decoding speed, all tokens over all seconds, prefill and warm-up excluded; in brackets a 95 % percentile
bootstrap over samples (2000 draws, seed 0). *tau*: tokens per target pass, the bonus token included. *speed-up*: over
the row marked "baseline"; samples that both have are resampled together, and then it is of those alone. *correct*: of
the answers that were checked; "cut" texts reached the length limit before an answer. *first token*: mean time to it.
*between blocks*: time from one emitted block of tokens to the next, all turns together. *share of roofline*: of the
speed at this tau of a run that did nothing but stream. *texts at a time*: other speeds and times are of one text beside
the others, *tokens/s together* is of all, prefill included; a speed-up needs a baseline of the same number. Full
precision, and more columns: [methods.csv](methods.csv), [acceptance.csv](acceptance.csv), [runs.csv](runs.csv)."""


def _page(
    rows: Sequence[Row], runs: Sequence[RunData], notes: Sequence[str], plots: Mapping[str, Sequence[Path]]
) -> str:
    states = Counter(run.state for run in runs)
    told = ", ".join(f"{count} {state.value}" for state, count in states.items())
    parts = [f"# {_title(rows)}", *_warnings(rows), f"{len(runs)} runs ({told}) in {len(rows)} rows."]
    if notes:
        parts.append("**Read this first.**\n\n" + "\n".join(f"- {note}" for note in notes))
    parts += ["## Results", *(_tables(rows) or ["No run has generated anything yet."]), LEGEND, "## Pictures"]
    absent = []
    for draw, why_not in DRAWINGS.items():
        name, caption = draw.__name__, " ".join(str(draw.__doc__).split())
        if name in plots:
            parts.append(f"![{caption}]({PLOTS}/{name}.png)\n\n{caption} ([SVG]({PLOTS}/{name}.svg))")
        else:
            absent.append(f"- {name}: {why_not}")
    if absent:
        parts.append("Not drawn:\n\n" + "\n".join(absent))
    return "\n\n".join([*parts, "## Runs", *_index(runs)]) + "\n"


def _title(rows: Sequence[Row]) -> str:
    marks = {"planted weights": any(row.planted for row in rows), "sample prompts": any(row.sample for row in rows)}
    labels = [label for label, there in marks.items() if there]
    if not labels:
        return "Report"
    extent = "" if all(row.planted or row.sample for row in rows) else "in part "
    return f"Report ({extent}{' and '.join(labels)})"


def _warnings(rows: Sequence[Row]) -> list[str]:
    """Warnings about the figures, and the rows to which each applies."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for text in banners(row.summary):
            found[text.removeprefix("note: ")][f"{row.target} with draft {row.draft}"] = None
    return [f"> **{text[0].upper()}{text[1:]}.** Rows: {', '.join(where)}." for text, where in found.items()]


def _tables(rows: Sequence[Row]) -> list[str]:
    """One table per target, benchmark, experiment and device, and what belongs to it."""
    parts = []
    for heading, members in grouped(rows, _heading).items():
        parts += [heading, methods_table(members)]
        if remarks := _remarks(members):
            parts.append("\n".join(f"- {line}" for line in remarks))
        for title, tables in (("By category", category_tables(members)), ("Acceptance", acceptance_tables(members))):
            parts += [f"#### {title}", *tables] if tables else []
    return parts


def _heading(row: Row) -> str:
    planted = " (planted weights)" if row.planted else ""
    sample = "sample prompts" if row.sample else row.source
    experiment = f", experiment {row.experiment}" if row.experiment else ""
    return f"### {row.target}{planted}, {row.benchmark} ({sample}){experiment}\n\nOn {row.device}."


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a table needs beside it: the baselines, whether texts are equal, and repeats."""
    bases = {row.baseline.label: row.baseline.row for row in rows if row.baseline}
    lines = [f"Baseline {label}: {setup_text(base.runs[0]) or 'no facts recorded'}." for label, base in bases.items()]
    lines += [note for row in rows if (note := texts_note(row))]
    lines += [
        f"Repeats of {row.method}: {len(row.runs)} runs, {number(row.repeats[0])} to {number(row.repeats[1])} tokens/s."
        for row in rows
        if row.repeats
    ]
    return lines


def _index(runs: Sequence[RunData]) -> list[str]:
    """The table of runs, and the machines and versions that they ran on."""
    cells = [run_cells(run) for run in runs]
    for one in cells:
        if one["overrides"] is not None:
            one["overrides"] = f"`{one['overrides']}`"
        marks = [("planted", one["planted_weights"]), ("sample prompts", one["sample_prompts"])]
        one["marks"] = ", ".join(name for name, there in marks if there)
    table = pd.DataFrame(cells, dtype=object)
    names = ["folder", "state", "method", "marks", "turns", "overrides", "notes"]
    blocks = [markdown_table(table[names], left=[name for name in names if name != "turns"])]
    machines = table.fillna({"versions": "unknown versions", "commit": "unknown revision"})
    for (device, versions, commit), there in machines.groupby(["device", "versions", "commit"], sort=False):
        which = "All runs" if len(there) == len(runs) else f"Runs {', '.join(there['run'])}"
        blocks.append(f"{which}: {device}; {versions}; revision {commit}.")
    return blocks
