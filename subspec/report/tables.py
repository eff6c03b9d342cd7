"""Tables of a report: with full precision for CSV files, and in Markdown with rounded figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from subspec.records.method import config_group, group_name
from subspec.records.summary_table import shown_depths
from subspec.records.sweep_folder import config_digest
from subspec.report.bootstrap import Interval
from subspec.report.rows import OVERALL, Row
from subspec.report.run_data import RunData, State

TURNS_NAMED = 10  # in a note
TOGETHER = "texts at a time: tokens/s together"

Cells = dict[str, Any]


def _place_cells(row: Row) -> Cells:
    """Columns with which every table of rows begins."""
    names = ("experiment", "target", "benchmark", "source", "method")
    marks = {"planted_weights": row.planted, "sample_prompts": row.sample}
    return {**{name: getattr(row, name) for name in names}, **marks}


def method_cells(row: Row) -> Cells:
    """A row of ``methods.csv``. Speeds are tokens per second, memory GiB, times seconds."""
    totals, summary = row.totals, row.summary
    per_turn, accuracy, counts = summary["per_turn"], summary["accuracy"] or {}, summary["counts"]
    speed, base, repeats = row.speed, row.baseline, row.repeats or (None, None)
    gain = base.speedup if base else None
    iteration = row.iteration or {}
    compared = base is not None and not row.is_baseline
    return {
        **_place_cells(row),
        "draft": row.draft,
        "bits_per_weight": row.bits,
        "device": row.device,
        "repeats": len(row.runs),
        "unfinished_runs": sum(run.state is not State.finished for run in row.runs),
        "samples": counts["samples"],
        "turns": counts["turns"],
        "skipped": sum(counts["skipped"].values()),
        "tokens_per_s": totals["tokens_per_s"],
        "tokens_per_s_low": speed.low if speed else None,
        "tokens_per_s_high": speed.high if speed else None,
        "tokens_per_s_mean": per_turn["tokens_per_s"]["mean"],
        "tokens_per_s_sd": per_turn["tokens_per_s"]["sd"],
        "tokens_per_s_slowest_repeat": repeats[0],
        "tokens_per_s_fastest_repeat": repeats[1],
        "tokens_per_s_with_prefill": totals["tokens_per_s_total"],
        "texts": row.texts,
        "texts_beside_mean": per_turn["texts_beside"]["mean"],
        "tokens_per_s_together": totals["tokens_per_s_together"],
        "tau": totals["tau"],
        "tau_mean": per_turn["tau"]["mean"],
        "tau_sd": per_turn["tau"]["sd"],
        "tau_published": totals["tau_published"],
        "draft_acceptance_rate": totals["draft_acceptance_rate"],
        "speedup": gain.value if gain else None,
        **{f"speedup_{name}": getattr(gain, name, None) for name in ("low", "high", "paired", "samples")},
        "baseline": base.label if base else None,
        "baseline_differences": "; ".join(base.differences) if base else None,
        "turns_with_baseline_text": base.same_texts if compared else None,
        "turns_with_other_text": len(base.other_texts) if compared else None,
        "ttft_s_mean": per_turn["ttft_s"]["mean"],
        "ttft_s_median": per_turn["ttft_s"]["median"],
        **{name: totals[name] for name in ("block_p50_s", "block_p95_s", "block_p99_s")},
        **{name: totals[name] for name in ("roofline_tokens_per_s", "roofline_share", "link_gb_per_s")},
        "bytes_per_pass": totals["bytes_per_pass"],
        **{f"{phase}_s_per_iteration": iteration.get(phase) for phase in ("draft", "target", "other")},
        **{name: summary[name] for name in ("peak_vram_gib", "device_vram_gib", "peak_ram_gib")},
        **{name: accuracy.get(name) for name in ("accuracy", "correct", "checked", "unfinished")},
        "audit": audit_text(row),
    }


def acceptance_cells(row: Row) -> list[Cells]:
    """Rows of ``acceptance.csv``: a row per depth. ``accepted_exactly``: passes whose accepted path ended there."""
    totals = row.totals
    accepted = [*totals["accepted_by_depth"], *[0] * len(totals["drafted_by_depth"]), 0]
    given = totals["conditional_accept_rate_by_depth"]
    return [
        {
            **_place_cells(row),
            "depth": depth,
            "drafted": drafted,
            "accepted": accepted[depth - 1],
            "accept_rate": totals["accept_rate_by_depth"][depth - 1],
            "conditional_accept_rate": given[depth - 1] if given else None,
            "accepted_exactly": accepted[depth - 1] - accepted[depth],
        }
        for depth, drafted in enumerate(totals["drafted_by_depth"], start=1)
    ]


def category_cells(row: Row) -> list[Cells]:
    """Rows of ``categories.csv``: a row per category, and one of all."""
    names = ("samples", "turns", "tau", "tokens_per_s", "accuracy")
    return [
        {
            **_place_cells(row),
            "category": category,
            **{name: one[name] for name in names},
            "speedup": getattr(one["speedup"], "value", None),
            **{f"speedup_{end}": getattr(one["speedup"], end, None) for end in ("low", "high")},
        }
        for category, one in row.categories.items()
    ]


def run_cells(run: RunData) -> Cells:
    """A row of ``runs.csv``: configuration, machine and progress of a run."""
    context, totals, counts = (run.summary[name] for name in ("context", "totals", "counts"))
    named = {name: config_group(run.config, name).get("name") or context[name] for name in ("target", "benchmark")}
    versions, git = (config_group(run.environment, name) for name in ("versions", "git"))
    commit = str(git.get("commit") or "")[:12]
    return {
        "run": run.name,
        "folder": place(run.folder),
        "state": run.state.value,
        "experiment": group_name(run.config),
        "method": run.method,
        **named,
        "source": context["source"],
        "planted_weights": context["planted"],
        "sample_prompts": context["source"] == "sample" if context["source"] else None,
        "seed": run.config.get("seed"),
        "turns": counts["turns"],
        "skipped": sum(counts["skipped"].values()),
        "damaged_lines": run.damaged,
        "texts": context["texts"],
        "tokens_per_s": totals["tokens_per_s"],
        "tokens_per_s_together": totals["tokens_per_s_together"],
        "tau": totals["tau"],
        "overrides": " ".join(run.overrides) if run.overrides is not None else None,
        "config_digest": config_digest(run.config) if run.config else None,
        "device": run.device,
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()) or None,
        "commit": commit + " (changed)" * bool(commit and git.get("dirty")) or None,
        "notes": "; ".join(run.notes),
    }


def place(folder: Path) -> str:
    """A path relative to the current folder, or to the home folder as ``~``, if it lies there."""
    resolved = folder.resolve()
    for base, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if resolved.is_relative_to(base) and base != Path(base.anchor):
            return f"{prefix}{resolved.relative_to(base).as_posix()}"
    return folder.as_posix()


def audit_text(row: Row) -> str:
    """``passed: 640 exact, 2 near-ties (gap 0.06)``, ``FAILED: ...`` or ``not run``."""
    audit = row.summary["audit"]
    if not audit:
        return "not run"
    verdict = "FAILED" if audit["errors"] else "passed"
    bits = ", bit for bit" if audit["bitwise"] == audit["turns"] else ""
    text = f"{verdict}: {audit['exact']} exact{bits}"
    if audit["near_tie"]:
        gap = f" (gap {audit['max_gap']:.2g})" if audit["max_gap"] is not None else ""
        text += f", {audit['near_tie']} near-tie(s){gap}"
    if audit["mismatch"]:
        text += f", {audit['mismatch']} mismatch(es)"
    if audit["turns"] < row.summary["counts"]["turns"]:
        text += f"; {audit['turns']} of {row.summary['counts']['turns']} turns"
    return text


# ---------------------------------------------------------------------------------------------- Markdown


def markdown_table(table: pd.DataFrame, left: Sequence[str]) -> str:
    """A Markdown table; columns but those of ``left`` are right-aligned."""
    rule = "|".join("---" if name in left else "---:" for name in table.columns)
    head, *lines = (" | ".join(map(_escaped, cells)) for cells in (table.columns, *table.itertuples(index=False)))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in lines)])


def _escaped(value: Any) -> str:
    text = "-" if value is None or value == "" else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def methods_table(rows: Sequence[Row]) -> str:
    """The main table, without columns that no row has."""
    table = pd.DataFrame([_method_text(row) for row in rows])
    shown = (table != "-").any()
    shown[TOGETHER] = any(row.texts != "1" for row in rows)
    return markdown_table(table.loc[:, shown], left=("method", "audit", "samples"))


def _method_text(row: Row) -> dict[str, str]:
    """Cells by heading."""
    totals, summary = row.totals, row.summary
    counts, per_turn, accuracy = summary["counts"], summary["per_turn"], summary["accuracy"]
    mean, sd = (per_turn["tokens_per_s"][name] for name in ("mean", "sd"))
    samples = f"{counts['samples']}" + (f" x {len(row.runs)} runs" if len(row.runs) > 1 else "")
    unfinished = sum(run.state is not State.finished for run in row.runs)
    samples += f" ({unfinished} unfinished)" if unfinished else ""
    samples += f", {sum(counts['skipped'].values())} skipped" if counts["skipped"] else ""
    blocks = [totals[f"block_p{share}_s"] for share in (50, 95, 99)]
    between = "-" if None in blocks else ", ".join(number(1e3 * seconds) for seconds in blocks)
    marks = (" **PLANTED**" if row.planted else "") + (" *sample prompts*" if row.sample else "")
    correct = "-"
    if accuracy:
        share = f" ({100 * accuracy['accuracy']:.0f} %)" if accuracy["checked"] else ""
        cut = f", {accuracy['unfinished']} cut" if accuracy["unfinished"] else ""
        correct = f"{accuracy['correct']} of {accuracy['checked']}{share}{cut}"
    speedup = "-" if row.baseline is None else "baseline" if row.is_baseline else _interval(row.baseline.speedup, "x")
    if row.baseline and row.baseline.differences:
        speedup += f" [differs: {'; '.join(row.baseline.differences)}]"
    return {
        "method": row.method + marks,
        "tokens/s (95 %)": _interval(row.speed),
        "per turn: mean ± sd": number(mean) + (f" ± {number(sd)}" if sd is not None else ""),
        TOGETHER: f"{row.texts}: {number(totals['tokens_per_s_together'])}",
        "tau": number(totals["tau"]),
        "speed-up (95 %)": speedup,
        "correct": correct,
        "first token (s)": number(per_turn["ttft_s"]["mean"]),
        "between blocks p50, p95, p99 (ms)": between,
        "share of roofline": number(totals["roofline_share"]),
        "GPU GiB": number(summary["peak_vram_gib"]),
        "RAM GiB": number(summary["peak_ram_gib"]),
        "audit": audit_text(row),
        "samples": samples,
    }


CATEGORY_FIGURES = {
    "tau": ("tau", lambda value: number(value)),
    "tokens/s": ("tokens_per_s", lambda value: number(value)),
    "speed-up": ("speedup", lambda value: f"{number(value)}x"),
    "correct": ("accuracy", lambda value: f"{100 * value:.0f} %"),
}
"""Columns of ``categories.csv``, and their texts, by heading."""


def category_tables(rows: Sequence[Row]) -> list[str]:
    """Methods by categories: a Markdown table per figure, without methods that lack it; empty without categories."""
    cells = pd.DataFrame([cells for row in rows for cells in category_cells(row)], dtype=object)
    tables = []
    for heading, (field, text) in CATEGORY_FIGURES.items() if len(cells) else ():
        figures = cells.pivot(index="method", columns="category", values=field)
        names = [*figures.columns.drop(OVERALL).sort_values(), OVERALL]
        figures = figures.reindex(index=cells["method"].unique(), columns=names).dropna(how="all")
        if len(figures):
            table = figures.map(text, na_action="ignore").fillna("-")
            table.insert(0, heading, [f"`{method}`" for method in table.index])
            tables.append(markdown_table(table, left=[heading]))
    return tables


def acceptance_tables(rows: Sequence[Row]) -> list[str]:
    """Acceptance by depth, and lengths of the accepted paths, as Markdown tables; empty if nothing was drafted."""
    drafted = [row for row in rows if row.totals["drafted_by_depth"]]
    if not drafted:
        return []
    depths = shown_depths(max(len(row.totals["drafted_by_depth"]) for row in drafted))
    rates, lengths = [], []
    for row in drafted:
        totals, name = row.totals, f"`{row.method}`"
        every, given = (
            dict(enumerate(totals[f"{kind}accept_rate_by_depth"] or [], start=1)) for kind in ("", "conditional_")
        )
        rates.append({"depth": name} | {d: f"{number(every.get(d))} / {number(given.get(d))}" for d in depths})
        lengths.append({"accepted": name})
        for low, high in [(0, 0), *zip([1, *(depth + 1 for depth in depths)], depths, strict=False)]:
            share = sum(totals["accepted_histogram"][low : high + 1]) / totals["iterations"]
            lengths[-1][str(low) if low == high else f"{low}-{high}"] = f"{100 * share:.1f} %"
    return [
        "Acceptance at a depth: of the passes that drafted it / of those that also accepted the depth before.\n\n"
        + markdown_table(pd.DataFrame(rates), left=["depth"]),
        "Passes by number of accepted draft tokens, passes without a tree included.\n\n"
        + markdown_table(pd.DataFrame(lengths), left=["accepted"]),
    ]


def texts_note(row: Row) -> str | None:
    """Whether the texts of a row, and so its accuracy, are its baseline's; None without turns to compare."""
    base = row.baseline
    if base is None or not (count := base.same_texts + len(base.other_texts)):
        return None
    others = base.other_texts
    if not others:
        accuracy = ", and so the same accuracy" if row.summary["accuracy"] else ""
        return f"{row.method}: the same text as {base.label} in all {count} turns{accuracy}."
    named = ", ".join(f"{sample} turn {turn}" for sample, turn in others[:TURNS_NAMED])
    more = f" and {len(others) - TURNS_NAMED} more" if len(others) > TURNS_NAMED else ""
    folders = " ".join(place(one.runs[0].folder) for one in (base.row, row))
    return (
        f"{row.method}: **another text than {base.label} in {len(others)} of {count} turns**: {named}{more} "
        f"(`python -m subspec.report compare {folders}` shows where)."
    )


def setup_text(run: RunData) -> str:
    """How a run computed and where its weights lay, as far as its facts say."""
    facts, bitwise, parts = run.facts, config_group(run.facts, "bitwise"), []
    if facts.get("dtype"):
        parts.append(str(facts["dtype"]))
    if bitwise:
        why = f" ({bitwise['reason']})" if bitwise.get("reason") else ""
        parts.append("batch-invariant kernels" if bitwise.get("on") else f"no batch-invariant kernels{why}")
    if str(facts.get("device")).startswith("cuda"):
        parts.append("passes captured" if facts.get("captured_passes") else "passes launched kernel by kernel")
    if "modules_offloaded" in facts:
        device, host = facts.get("modules_on_device"), facts["modules_offloaded"]
        parts.append(f"accelerate with {device} modules on the device and {host} on the host")
    elif "resident_layers" in facts:
        kind, streamed = "coded" if run.is_coded else "plain", (facts.get("streamed_bytes_per_pass") or 0) / 2**30
        streams = f"{streamed:.2f} GiB of {kind} weights streamed per pass"
        parts.append(f"{len(facts['resident_layers'])} layers on the device and {streams}")
    elif facts.get("device"):
        parts.append(f"all weights on {facts['device']}")
    return ", ".join(parts)


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


def _interval(interval: Interval | None, unit: str = "") -> str:
    """``69.9 (65.1 to 74.0)``; without ends for one sample."""
    if interval is None:
        return "-"
    text = number(interval.value) + unit
    return text if interval.low is None else f"{text} ({number(interval.low)} to {number(interval.high)})"
