"""Write a report: REPORT.md with tables and plots, CSV files, and an index of the runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from subspec.records.summary_table import FROM_NOISE, ON_CPU, PLANTED_DRAFT, PLANTED_WEIGHTS, SAMPLE_PROMPTS
from subspec.report.collect import RunData, State, collect, sweep_notes
from subspec.report.plots import DRAWINGS, MISSING, save
from subspec.report.rows import Row, make_rows
from subspec.report.tables import (
    METHODS,
    METHODS_RIGHT,
    acceptance_cells,
    csv_text,
    markdown_table,
    method_cells,
    method_text,
    number,
    run_cells,
)
from subspec.utils.files import write_atomic, write_error

REPORT = "REPORT.md"
PLOTS = "plots"

CAPTIONS = {
    "speed": "Decoding speed: all tokens over all seconds; whiskers are 95 % bootstrap intervals over samples.",
    "tau_by_method": "Tokens per target pass, the bonus token included.",
    "acceptance": "Of the passes that drafted a depth, the share that accepted it.",
    "tau_by_bits": "Tokens per target pass against the bits of the substitute.",
    "time_split": "What an iteration's time goes into, prefill excluded.",
    "roofline": "Speed against tau, under tau / (streamed bytes / measured link bandwidth).",
}


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
    tables: tuple[Path, ...]
    plots: dict[str, tuple[Path, ...]]
    rows: tuple[Row, ...]
    runs: tuple[RunData, ...]
    notes: tuple[str, ...]


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
        plots: dict[str, tuple[Path, ...]] = {}
        for name, draw in DRAWINGS.items():
            figure = draw(rows)
            stem = out / PLOTS / name
            if figure is not None:
                plots[name] = tuple(save(figure, stem))
            else:  # files of an earlier report
                for suffix in (".png", ".svg"):
                    stem.with_suffix(suffix).unlink(missing_ok=True)
        page = out / REPORT
        write_atomic(page, _page(rows, runs, notes, plots).encode("utf-8", "replace"))
    except OSError as error:
        raise write_error(error, Path(error.filename or out), "choose another folder with --out") from error
    return Report(out, page, tuple(tables), plots, tuple(rows), tuple(runs), tuple(notes))


def _write_tables(rows: Sequence[Row], runs: Sequence[RunData], out: Path) -> list[Path]:
    contents = {
        "methods.csv": csv_text([method_cells(row) for row in rows]),
        "acceptance.csv": csv_text([cells for row in rows for cells in acceptance_cells(row)]),
        "runs.csv": csv_text([run_cells(run) for run in runs]),
    }
    for name, text in contents.items():
        write_atomic(out / name, text.encode("utf-8", "replace"))
    return [out / name for name in contents]


def _run_notes(runs: Sequence[RunData]) -> list[str]:
    """Notes about unfinished, empty and damaged runs."""
    notes = []
    states = Counter(run.state for run in runs)
    if states[State.unfinished]:
        notes.append(f"{states[State.unfinished]} of {len(runs)} runs are unfinished: their rows may change")
    if states[State.empty]:
        notes.append(
            f"{states[State.empty]} of {len(runs)} runs have generated nothing yet, and are in no table"
        )
    damaged = sum(run.damaged for run in runs)
    if damaged:
        notes.append(f"{damaged} damaged record line(s) are left out")
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return notes


# ------------------------------------------------------------------------------------------------- page


def _page(
    rows: Sequence[Row], runs: Sequence[RunData], notes: Sequence[str], plots: dict[str, tuple[Path, ...]]
) -> str:
    parts = [f"# {_title(rows)}", *_warnings(rows), _overview(rows, runs)]
    if notes:
        parts.append("**Read this first.**\n\n" + "\n".join(f"- {note}" for note in notes))
    parts.append("## Results")
    parts += _tables(rows) or ["No run has generated anything yet."]
    parts.append(LEGEND)
    parts.append("## Pictures")
    parts += [
        f"![{CAPTIONS[name]}]({PLOTS}/{name}.png)\n\n{CAPTIONS[name]} ([SVG]({PLOTS}/{name}.svg))"
        for name in plots
    ]
    absent = [f"- {name}: {MISSING[name]}" for name in DRAWINGS if name not in plots]
    if absent:
        parts.append("Not drawn:\n\n" + "\n".join(absent))
    parts += ["## Runs", *_index(runs)]
    return "\n\n".join(parts) + "\n"


LEGEND = """\
*tokens/s*: decoding speed, all tokens over all seconds, prefill and warm-up excluded; in brackets a 95 % percentile
bootstrap over samples (2000 draws, seed 0). *tau*: tokens per target pass, the bonus token included. *speed-up*: over
the row marked "baseline"; samples that both have are resampled together, and then it is of those alone. *share of
roofline*: of the speed at this tau of a run that did nothing but stream. Full precision, and more columns:
[methods.csv](methods.csv), [acceptance.csv](acceptance.csv), [runs.csv](runs.csv)."""


def _title(rows: Sequence[Row]) -> str:
    labels = []
    if any(row.planted for row in rows):
        labels.append("planted weights")
    if any(row.sample for row in rows):
        labels.append("sample prompts")
    if not labels:
        return "Report"
    extent = "" if all(row.planted or row.sample for row in rows) else "in part "
    return f"Report ({extent}{' and '.join(labels)})"


def _warnings(rows: Sequence[Row]) -> list[str]:
    def bold(text: str) -> str:
        text = text.removeprefix("note: ")
        return f"> **{text[0].upper()}{text[1:]}.**"

    planted = [row for row in rows if row.planted]
    sample = [row for row in rows if row.sample]
    lines = []
    if planted:
        names = ", ".join(sorted({row.target for row in planted}))
        lines.append(f"{bold(PLANTED_WEIGHTS)} These rows: target {names}.")
        others = ", ".join(sorted({row.draft for row in planted} - FROM_NOISE))
        if others:
            lines.append(f"{bold(PLANTED_DRAFT)} These of them: draft {others}.")
    if sample:
        names = ", ".join(sorted({row.benchmark for row in sample}))
        lines.append(f"{bold(SAMPLE_PROMPTS)} These rows: benchmark {names}.")
    if any(row.on_cpu and row.draft != "none" for row in rows):
        lines.append(bold(ON_CPU))
    failed = [row for row in rows if (row.summary["audit"] or {}).get("mismatch")]
    if failed:
        lines.append(f"> **AUDIT FAILED** in {len(failed)} row(s): their output is not the target's own.")
    return lines


def _overview(rows: Sequence[Row], runs: Sequence[RunData]) -> str:
    states = Counter(run.state for run in runs)
    told = ", ".join(f"{count} {state.value}" for state, count in states.items())
    return f"{len(runs)} runs ({told}) in {len(rows)} rows."


def _tables(rows: Sequence[Row]) -> list[str]:
    """One table per target, benchmark, experiment and device."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        planted = " (planted weights)" if row.planted else ""
        sample = "sample prompts" if row.sample else row.source
        experiment = f", experiment {row.experiment}" if row.experiment else ""
        heading = f"### {row.target}{planted}, {row.benchmark} ({sample}){experiment}\n\nOn {row.device}."
        parts.setdefault(heading, []).append(row)
    blocks = []
    for heading, members in parts.items():
        repeats = [
            f"Repeats of {row.method}: {len(row.runs)} runs, {number(row.repeats[0])} to "
            f"{number(row.repeats[1])} tokens/s."
            for row in members
            if row.repeats
        ]
        table = markdown_table(METHODS, [method_text(row) for row in members], METHODS_RIGHT)
        blocks.append("\n\n".join([heading, table, *repeats]))
    return blocks


def _index(runs: Sequence[RunData]) -> list[str]:
    cells = [run_cells(run) for run in runs]
    for one in cells:
        if one["overrides"] is not None:
            one["overrides"] = f"`{one['overrides']}`"
        marks = [("planted", one["planted_weights"]), ("sample prompts", one["sample_prompts"])]
        one["marks"] = ", ".join(name for name, there in marks if there) or "-"
    headings = {
        "folder": "folder",
        "state": "state",
        "method": "method",
        "marks": "marks",
        "turns": "turns",
        "overrides": "overrides",
        "notes": "notes",
    }
    blocks = [markdown_table(headings, cells, right=("turns",))]
    places: dict[tuple[str, str, str], list[str]] = {}
    for run, one in zip(runs, cells, strict=True):
        key = (one["device"], one["versions"] or "unknown versions", one["commit"] or "unknown revision")
        places.setdefault(key, []).append(run.name)
    for (device, versions, commit), names in places.items():
        which = "All runs" if len(places) == 1 else f"Runs {', '.join(names)}"
        blocks.append(f"{which}: {device}; {versions}; revision {commit}.")
    return blocks
