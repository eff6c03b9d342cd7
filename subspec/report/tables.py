"""Cells of the report's tables: CSV with full precision, Markdown with rounded figures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspec.records.method import config_group, group_name, method_label
from subspec.records.sweep_folder import config_digest
from subspec.report.bootstrap import Interval
from subspec.report.collect import RunData, State
from subspec.report.rows import Row, audit_text, device_name

Cells = dict[str, Any]


def method_cells(row: Row) -> Cells:
    """A row of ``methods.csv``. Speeds are tokens per second, memory GiB, times seconds."""
    totals, summary = row.totals, row.summary
    speed, base = row.speed, row.baseline
    gain = base.speedup if base else None
    iteration = row.iteration or {}
    per_turn = summary["per_turn"]["tokens_per_s"]
    return {
        "experiment": row.experiment,
        "target": row.target,
        "benchmark": row.benchmark,
        "source": row.source,
        "method": row.method,
        "draft": row.draft,
        "bits_per_weight": row.bits,
        "planted_weights": row.planted,
        "sample_prompts": row.sample,
        "device": row.device,
        "repeats": len(row.runs),
        "unfinished_runs": sum(run.state is not State.finished for run in row.runs),
        "samples": summary["counts"]["samples"],
        "turns": summary["counts"]["turns"],
        "skipped": sum(summary["counts"]["skipped"].values()),
        "tokens_per_s": totals["tokens_per_s"],
        "tokens_per_s_low": speed.low if speed else None,
        "tokens_per_s_high": speed.high if speed else None,
        "tokens_per_s_mean": per_turn["mean"],
        "tokens_per_s_sd": per_turn["sd"],
        "tokens_per_s_slowest_repeat": row.repeats[0] if row.repeats else None,
        "tokens_per_s_fastest_repeat": row.repeats[1] if row.repeats else None,
        "tokens_per_s_with_prefill": totals["tokens_per_s_total"],
        "tau": totals["tau"],
        "tau_mean": summary["per_turn"]["tau"]["mean"],
        "tau_sd": summary["per_turn"]["tau"]["sd"],
        "tau_published": totals["tau_published"],
        "speedup": gain.value if gain else None,
        "speedup_low": gain.low if gain else None,
        "speedup_high": gain.high if gain else None,
        "speedup_paired": gain.paired if gain else None,
        "speedup_samples": gain.samples if gain else None,
        "baseline": base.label if base else None,
        "baseline_differences": "; ".join(base.differences) if base else None,
        "roofline_tokens_per_s": totals["roofline_tokens_per_s"],
        "roofline_share": totals["roofline_share"],
        "link_gb_per_s": totals["link_gb_per_s"],
        "bytes_per_pass": totals["bytes_per_pass"],
        "draft_s_per_iteration": iteration.get("draft"),
        "target_s_per_iteration": iteration.get("target"),
        "other_s_per_iteration": iteration.get("other"),
        "peak_vram_gib": summary["peak_vram_gib"],
        "peak_ram_gib": summary["peak_ram_gib"],
        "accuracy": summary["accuracy"]["accuracy"] if summary["accuracy"] else None,
        "audit": audit_text(row),
    }


def acceptance_cells(row: Row) -> list[Cells]:
    """Rows of ``acceptance.csv``: a row per depth."""
    totals = row.totals
    accepted = [*totals["accepted_by_depth"], *[0] * len(totals["drafted_by_depth"])]
    rates = totals["accept_rate_by_depth"]
    return [
        {
            "experiment": row.experiment,
            "target": row.target,
            "benchmark": row.benchmark,
            "method": row.method,
            "planted_weights": row.planted,
            "sample_prompts": row.sample,
            "depth": depth,
            "drafted": drafted,
            "accepted": accepted[depth - 1],
            "accept_rate": rates[depth - 1],
        }
        for depth, drafted in enumerate(totals["drafted_by_depth"], start=1)
    ]


def run_cells(run: RunData) -> Cells:
    """A row of ``runs.csv``: configuration, machine and progress of a run."""
    context, totals = run.summary["context"], run.summary["totals"]
    versions = run.environment.get("versions")
    git = run.environment.get("git")
    return {
        "run": run.name,
        "folder": _place(run.folder),
        "state": run.state.value,
        "experiment": group_name(run.config),
        "method": method_label(run.config, run.facts),
        "target": _name(run, "target") or context["target"],
        "benchmark": _name(run, "benchmark") or context["benchmark"],
        "source": context["source"],
        "planted_weights": context["planted"],
        "sample_prompts": context["source"] == "sample" if context["source"] else None,
        "seed": run.config.get("seed"),
        "turns": run.summary["counts"]["turns"],
        "skipped": sum(run.summary["counts"]["skipped"].values()),
        "damaged_lines": run.damaged,
        "tokens_per_s": totals["tokens_per_s"],
        "tau": totals["tau"],
        "overrides": " ".join(run.overrides) if run.overrides is not None else None,
        "config_digest": config_digest(run.config) if run.config else None,
        "device": device_name(run),
        "versions": _pairs(versions),
        "commit": _commit(git),
        "notes": "; ".join(run.notes),
    }


def csv_text(cells: Sequence[Cells]) -> str:
    """CSV with a heading; unmeasured figures are empty fields."""
    if not cells:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in one.items()} for one in cells)
    return buffer.getvalue()


def markdown_table(
    headings: Mapping[str, str], cells: Sequence[Mapping[str, Any]], right: Sequence[str] = ()
) -> str:
    """A Markdown table of the named cells; ``right``: right-aligned columns."""
    head = "| " + " | ".join(headings.values()) + " |"
    rule = "|" + "|".join("---:" if key in right else "---" for key in headings) + "|"
    lines = ["| " + " | ".join(_escaped(one.get(key)) for key in headings) + " |" for one in cells]
    return "\n".join([head, rule, *lines])


METHODS = {
    "method": "method",
    "speed": "tokens/s (95 %)",
    "mean": "per turn: mean ± sd",
    "tau": "tau",
    "speedup": "speed-up (95 %)",
    "roofline": "share of roofline",
    "vram": "GPU GiB",
    "ram": "RAM GiB",
    "audit": "audit",
    "data": "samples",
}
"""Columns of the main table in Markdown."""

METHODS_RIGHT = ("speed", "mean", "tau", "speedup", "roofline", "vram", "ram")


def method_text(row: Row) -> dict[str, str]:
    """A row of the main table in Markdown."""
    totals, summary = row.totals, row.summary
    counts = summary["counts"]
    per_turn = summary["per_turn"]["tokens_per_s"]
    mean = number(per_turn["mean"])
    if per_turn["sd"] is not None:
        mean += f" ± {number(per_turn['sd'])}"
    data = f"{counts['samples']}" + (f" x {len(row.runs)} runs" if len(row.runs) > 1 else "")
    unfinished = sum(run.state is not State.finished for run in row.runs)
    data += f" ({unfinished} unfinished)" if unfinished else ""
    data += f", {sum(counts['skipped'].values())} skipped" if counts["skipped"] else ""
    return {
        "method": row.method
        + (" **PLANTED**" if row.planted else "")
        + (" *sample prompts*" if row.sample else ""),
        "speed": interval_text(row.speed),
        "mean": mean,
        "tau": number(totals["tau"]),
        "speedup": _speedup(row),
        "roofline": number(totals["roofline_share"]),
        "vram": number(summary["peak_vram_gib"]),
        "ram": number(summary["peak_ram_gib"]),
        "audit": audit_text(row),
        "data": data,
    }


def interval_text(interval: Interval | None, unit: str = "") -> str:
    """``69.9 (65.1 to 74.0)``; without ends for one sample."""
    if interval is None:
        return "-"
    text = number(interval.value) + unit
    if interval.low is None:
        return text
    return f"{text} ({number(interval.low)} to {number(interval.high)})"


def number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, no exponent; ``-`` for None."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(number(one, digits) for one in value)
    if value == 0:
        return "0"
    size = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - size)}f}"


def _speedup(row: Row) -> str:
    if row.baseline is None:
        return "-"
    if row.baseline.speedup is None:
        return "baseline" if row.baseline.label == row.method else "-"
    text = interval_text(row.baseline.speedup, "x")
    return (
        text if not row.baseline.differences else f"{text} [differs: {'; '.join(row.baseline.differences)}]"
    )


def _place(folder: Path) -> str:
    """A path relative to the current folder, or to the home folder as ``~``, if it lies there."""
    resolved = folder.resolve()
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if resolved.is_relative_to(base) and base != Path(base.anchor):
            return f"{prefix}{resolved.relative_to(base).as_posix()}"
    return folder.as_posix()


def _name(run: RunData, group: str) -> str | None:
    name = config_group(run.config, group).get("name")
    return str(name) if name else None


def _pairs(value: Any) -> str | None:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else None


def _commit(git: Any) -> str | None:
    if not isinstance(git, Mapping) or not git.get("commit"):
        return None
    return str(git["commit"])[:12] + (" (changed)" if git.get("dirty") else "")


def _escaped(value: Any) -> str:
    text = "-" if value is None or value == "" else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
