"""Markdown tables and notes of a report, with rounded figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from subspec.records.method import config_group
from subspec.records.summary_table import shown_depths
from subspec.report.bootstrap import Interval
from subspec.report.cells import place
from subspec.report.collect import RunData, State
from subspec.report.rows import OVERALL, Row, audit_text


def markdown_table(headings: Mapping[str, str], cells: Sequence[Mapping[str, Any]], right: Sequence[str] = ()) -> str:
    """A Markdown table of the named cells; ``right``: right-aligned columns."""
    head = "| " + " | ".join(headings.values()) + " |"
    rule = "|" + "|".join("---:" if key in right else "---" for key in headings) + "|"
    lines = ["| " + " | ".join(_escaped(one.get(key)) for key in headings) + " |" for one in cells]
    return "\n".join([head, rule, *lines])


def measured_table(headings: Mapping[str, str], cells: Sequence[Mapping[str, str]], left: Sequence[str]) -> str:
    """A Markdown table without columns that no row has; ``left``: left-aligned columns."""
    shown = {key: name for key, name in headings.items() if any(one.get(key, "-") != "-" for one in cells)}
    return markdown_table(shown, cells, [key for key in shown if key not in left])


METHODS = {
    "method": "method",
    "speed": "tokens/s (95 %)",
    "mean": "per turn: mean ± sd",
    "together": "texts at a time: tokens/s together",
    "tau": "tau",
    "speedup": "speed-up (95 %)",
    "accuracy": "correct",
    "ttft": "first token (s)",
    "blocks": "between blocks p50, p95, p99 (ms)",
    "roofline": "share of roofline",
    "vram": "GPU GiB",
    "ram": "RAM GiB",
    "audit": "audit",
    "data": "samples",
}
"""Columns of the main table in Markdown."""


def methods_table(rows: Sequence[Row]) -> str:
    """The main table in Markdown."""
    several = any(row.texts != "1" for row in rows)
    headings = {key: name for key, name in METHODS.items() if several or key != "together"}
    return measured_table(headings, [_method_text(row) for row in rows], left=("method", "audit", "data"))


def _method_text(row: Row) -> dict[str, str]:
    totals, summary = row.totals, row.summary
    counts, per_turn = summary["counts"], summary["per_turn"]
    mean, sd = (per_turn["tokens_per_s"][name] for name in ("mean", "sd"))
    data = f"{counts['samples']}" + (f" x {len(row.runs)} runs" if len(row.runs) > 1 else "")
    unfinished = sum(run.state is not State.finished for run in row.runs)
    data += f" ({unfinished} unfinished)" if unfinished else ""
    data += f", {sum(counts['skipped'].values())} skipped" if counts["skipped"] else ""
    blocks = [totals[f"block_p{share}_s"] for share in (50, 95, 99)]
    marks = (" **PLANTED**" if row.planted else "") + (" *sample prompts*" if row.sample else "")
    return {
        "method": row.method + marks,
        "speed": interval_text(row.speed),
        "mean": number(mean) + (f" ± {number(sd)}" if sd is not None else ""),
        "together": f"{row.texts}: {number(totals['tokens_per_s_together'])}",
        "tau": number(totals["tau"]),
        "speedup": _speedup(row),
        "accuracy": accuracy_text(summary["accuracy"]),
        "ttft": number(per_turn["ttft_s"]["mean"]),
        "blocks": "-" if None in blocks else ", ".join(number(1e3 * seconds) for seconds in blocks),
        "roofline": number(totals["roofline_share"]),
        "vram": number(summary["peak_vram_gib"]),
        "ram": number(summary["peak_ram_gib"]),
        "audit": audit_text(row),
        "data": data,
    }


def category_tables(rows: Sequence[Row]) -> list[str]:
    """Methods by categories: tau, speed, speed-up and accuracy, each a Markdown table; empty without categories."""
    figures = {f"`{row.method}`": row.categories for row in rows}
    names = sorted({name for one in figures.values() for name in one} - {OVERALL})
    tables = []
    for label, field in CATEGORY_FIGURES.items():
        cells = [
            {"method": method, **{name: _category_text(field, one[name]) for name in one}}
            for method, one in figures.items()
        ]
        cells = [one for one in cells if set(one.values()) - {"-", one["method"]}]
        if cells:
            headings = {"method": label} | {name: name for name in (*names, OVERALL)}
            tables.append(markdown_table(headings, cells, (*names, OVERALL)))
    return tables


CATEGORY_FIGURES = {"tau": "tau", "tokens/s": "tokens_per_s", "speed-up": "speedup", "correct": "accuracy"}
"""Fields of :attr:`Row.categories <subspec.report.rows.Row.categories>` by heading."""


def _category_text(field: str, one: Mapping[str, Any]) -> str:
    value = one[field]
    if field == "speedup":
        return "-" if value is None else f"{number(value.value)}x"
    return f"{100 * value:.0f} %" if field == "accuracy" and value is not None else number(value)


def acceptance_tables(rows: Sequence[Row]) -> list[str]:
    """Acceptance by depth, and lengths of the accepted paths, as Markdown tables; empty if nothing was drafted."""
    drafted = [row for row in rows if row.totals["drafted_by_depth"]]
    if not drafted:
        return []
    depths = shown_depths(max(len(row.totals["drafted_by_depth"]) for row in drafted))
    ends = [(0, 0), *zip([1, *(depth + 1 for depth in depths)], depths, strict=False)]
    rates, lengths = [], []
    for row in drafted:
        every, given = (row.totals[f"{kind}accept_rate_by_depth"] or [] for kind in ("", "conditional_"))
        rates.append({"depth": f"`{row.method}`"} | {str(d): f"{_at(every, d)} / {_at(given, d)}" for d in depths})
        passes, histogram = row.totals["iterations"], row.totals["accepted_histogram"]
        shares = {_range(low, high): sum(histogram[low : high + 1]) / passes for low, high in ends}
        lengths.append(
            {"accepted": f"`{row.method}`"} | {name: f"{100 * share:.1f} %" for name, share in shares.items()}
        )
    captions = (
        "Acceptance at a depth: of the passes that drafted it / of those that also accepted the depth before.",
        "Passes by number of accepted draft tokens, passes without a tree included.",
    )
    return [
        f"{caption}\n\n{markdown_table({name: name for name in cells[0]}, cells, list(cells[0])[1:])}"
        for caption, cells in zip(captions, (rates, lengths), strict=True)
    ]


def _at(rates: Sequence[float | None], depth: int) -> str:
    return number(rates[depth - 1]) if depth <= len(rates) else "-"


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def accuracy_text(accuracy: Mapping[str, Any] | None) -> str:
    """``12 of 20 (60 %), 3 cut``; ``-`` if no answer was to be checked."""
    if not accuracy:
        return "-"
    share = f" ({100 * accuracy['accuracy']:.0f} %)" if accuracy["checked"] else ""
    cut = f", {accuracy['unfinished']} cut" if accuracy["unfinished"] else ""
    return f"{accuracy['correct']} of {accuracy['checked']}{share}{cut}"


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


TURNS_NAMED = 10
"""Turns that a note names."""


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
        modules = facts.get("modules_on_device"), facts["modules_offloaded"]
        parts.append("accelerate with {} modules on the device and {} on the host".format(*modules))
    elif "resident_layers" in facts:
        kind = "coded" if facts.get("codec") == "substitute" else "plain"
        streamed = f"{(facts.get('streamed_bytes_per_pass') or 0) / 2**30:.2f} GiB of {kind} weights"
        parts.append(f"{facts['resident_layers']} layers on the device and {streamed} streamed per pass")
    elif facts.get("device"):
        parts.append(f"all weights on {facts['device']}")
    return ", ".join(parts)


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
    if row.baseline.is_self:
        return "baseline"
    text = interval_text(row.baseline.speedup, "x")
    return text if not row.baseline.differences else f"{text} [differs: {'; '.join(row.baseline.differences)}]"


def _escaped(value: Any) -> str:
    text = "-" if value is None or value == "" else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
