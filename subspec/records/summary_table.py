"""A run's summary as a table, and the warnings that must accompany its figures."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich import box
from rich.console import ConsoleOptions, Group
from rich.table import Table
from rich.text import Text

from subspec.records.metrics import distinct_values, ratio
from subspec.utils.rounding import is_power_of_two

Summary = Mapping[str, Any]

SAMPLE_PROMPTS = "note: packaged sample prompts, not the benchmark: compare no figure with published ones"
PLANTED_WEIGHTS = "planted weights: real speed, but no language model; acceptance comes from quantization noise"
PLANTED_DRAFT = (
    "planted weights: real speed, but no language model; how much of this draft is accepted is planted too and "
    "means nothing"
)
FROM_NOISE = frozenset({"none", "subspec"})
"""Drafts to which :data:`PLANTED_WEIGHTS` applies: only a substitute differs from its target by quantization noise."""
ON_CPU = "note: on a CPU there is no link to hide behind, so that speeds here say nothing about offloading"

FIGURES = (
    ("decode speed (tokens/s)", "tokens_per_s", 2),
    ("overall speed (tokens/s)", "tokens_per_s_total", 2),
    ("times plain decoding", "speedup_over_plain", 2),
    ("acceptance length tau", "tau", 2),
    ("tau as published", "tau_published", 2),
    ("prompt tokens", "prompt_tokens", 0),
    ("new tokens", "new_tokens", 0),
    ("verification passes", "iterations", 0),
    ("prefill (s)", "prefill_s", 2),
    ("decode (s)", "decode_s", 2),
    ("share of the roofline", "roofline_share", 3),
    ("share of time link is busy", "link_busy_share", 3),
)
"""Rows of the upper table: label, figure, decimals."""

PHASES = {"draft_s": "drafting", "verify_s": "verifying"}
MEMORY = {
    "peak_ram_gib": "RAM {:.2f} GiB",
    "peak_vram_gib": "GPU {:.2f} GiB of PyTorch's allocations",
    "device_vram_gib": "{:.2f} GiB by the driver",
}

DEPTHS_SHOWN = 8
NARROW = 68
"""Columns below which the upper table has no figures per turn."""


def banners(summary: Summary) -> list[str]:
    """Warnings about the figures, one line each."""
    sources, planted, drafts, devices = (
        set(distinct_values(summary["context"][name])) for name in ("source", "planted", "draft", "device")
    )
    lines = []
    if "sample" in sources:
        lines.append(SAMPLE_PROMPTS)
    if True in planted:
        lines.append(PLANTED_DRAFT if drafts - FROM_NOISE else PLANTED_WEIGHTS)
    if "cpu" in devices and drafts - {"none"} and summary["totals"]["bytes_per_pass"] is None:
        lines.append(ON_CPU)
    audit = summary["audit"]
    if audit and audit["mismatch"]:
        lines.append(f"AUDIT FAILED: {audit['mismatch']} token(s) that the target itself would not have emitted")
    return lines


def summary_table(summary: Summary, speedup: Summary | None, options: ConsoleOptions) -> Group:
    """The whole table as a rich renderable. ASCII consoles get ``+/-`` for the plus-minus sign."""
    sign = "+/-" if options.ascii_only else "±"
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    for label, text in _fact_lines(summary, speedup):
        facts.add_row(Text(label), Text(text))
    return Group(Text(_title(summary), style="bold"), _figures(summary, sign, options.max_width < NARROW), facts)


# ------------------------------------------------------------------------------------------------ parts


def _title(summary: Summary) -> str:
    """Target, draft, benchmark, device and seed on one line."""
    context = summary["context"]
    planted = " (planted)" if True in distinct_values(context["planted"]) else ""
    sample = " (sample)" if "sample" in distinct_values(context["source"]) else ""
    target, draft, benchmark, device, seed = (
        _text(context[name]) for name in ("target", "draft", "benchmark", "device", "seed")
    )
    return f"target {target}{planted}, draft {draft}, benchmark {benchmark}{sample}, {device}, seed {seed}"


def _fact_lines(summary: Summary, speedup: Summary | None) -> list[tuple[str, str]]:
    """Labels and texts of the lower table, without figures that were not measured."""
    counts, totals = summary["counts"], summary["totals"]
    facts = [("samples", _samples(counts))]
    if several := _several(summary):
        others, together = summary["per_turn"]["texts_beside"]["mean"], totals["tokens_per_s_together"]
        beside = f"{_text(summary['context']['texts'])}, each beside {decimals(others, 1)} others on average"
        facts.append(("texts at a time", f"{beside}; {_figure(together)} tokens/s together"))
    facts.append(("finished by", _counts(counts["finish_reasons"]) or "-"))
    if summary["accuracy"]:
        found = summary["accuracy"]
        share = f" ({100 * found['accuracy']:.1f} %)" if found["checked"] else ""
        cut = f"; {found['unfinished']} cut before an answer" if found["unfinished"] else ""
        facts.append(("correct answers", f"{found['correct']} of {found['checked']} checked{share}{cut}"))
    facts.append(("losslessness audit", _audit(summary["audit"])))
    if rates := totals["accept_rate_by_depth"]:
        facts.append(("accepted by depth", "  ".join(f"{d}:{_figure(rates[d - 1])}" for d in shown_depths(len(rates)))))
    blocks = [(share, totals[f"block_p{share}_s"]) for share in (50, 95, 99)]
    if blocks[0][1] is not None:
        shown = ", ".join(f"p{share} {1e3 * seconds:.1f} ms" for share, seconds in blocks)
        facts.append(("between blocks", shown))
    shares = [(word, ratio(totals[name], totals["decode_s"])) for name, word in PHASES.items()]
    if split := [f"{word} {100 * share:.0f} %" for word, share in shares if share is not None]:
        facts.append(("decode time", ", ".join(split)))
    passes, levels = totals.get("draft_passes"), sum(totals["drafted_by_depth"])
    if passes and passes < levels:
        facts.append(("draft passes", f"{passes} for {levels} levels ({100 * passes / levels:.0f} %)"))
    if totals["roofline_tokens_per_s"] is not None:
        facts.append(((summary.get("run") or {}).get("slower_link", "link"), _link(totals, several)))
    facts.append(("peak memory", _memory(summary)))
    facts.append(("data source", _text(summary["context"]["source"])))
    if speedup:
        facts.append((f"speed-up over {speedup['baseline']}", _speedup(speedup)))
        facts += [("  not the same", difference) for difference in speedup["differences"]]
    return facts


def _figures(summary: Summary, sign: str, narrow: bool) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    table.add_column("figure", no_wrap=True)
    for heading in ("total",) if narrow else ("total", f"per turn: mean {sign} sd", "median"):
        table.add_column(heading, justify="right", no_wrap=True)
    several = _several(summary)
    for label, name, digits in FIGURES:
        label = label.replace(" speed ", " speed of a text ") if several else label
        spread, total = summary["per_turn"][name], summary["totals"].get(name)
        if not spread["n"] and total is None:
            continue
        mean = _figure(spread["mean"], max(digits, 1))
        if spread["sd"] is not None:
            mean += f" {sign} {_figure(spread['sd'], max(digits, 1))}"
        table.add_row(label, _figure(total, digits), *(() if narrow else (mean, _figure(spread["median"], digits))))
    return table


def _several(summary: Summary) -> bool:
    """Whether several texts ran at a time."""
    return summary["context"]["texts"] not in (None, 1)


def _samples(counts: Summary) -> str:
    text = f"{counts['samples']}, turns {counts['turns']}"
    skipped = counts["skipped"]
    return f"{text}; skipped prompts: {_counts(skipped)}" if skipped else f"{text}, no prompt skipped"


def _audit(audit: Summary | None) -> str:
    if not audit:
        return "not run (audit=true runs it)"
    ties = f"near-ties {audit['near_tie']}"
    sizes = (("largest gap", audit["max_gap"]), ("margin", audit["margin"]))
    known = [f"{label} {value:.3g}" for label, value in sizes if value is not None]
    ties += f" ({', '.join(known)})" if known else ""
    verdict = "passed" if not audit.get("errors", audit["mismatch"]) else "FAILED"
    verdict += " bit for bit" if audit.get("bitwise") == audit["turns"] else ""
    return f"{verdict}: tokens exact {audit['exact']}, {ties}, mismatches {audit['mismatch']}"


def shown_depths(last: int) -> list[int]:
    """The first and last depth and the powers of two between them, so that 48 depths fit one line."""
    return [d for d in range(1, last + 1) if last <= DEPTHS_SHOWN or is_power_of_two(d) or d == last]


def _link(totals: Summary, several: bool) -> str:
    # Bytes of a pass count for each of its texts.
    streamed = "" if several else f"{totals['bytes_streamed'] / 1e9:.1f} GB at "
    roofline = f"roofline {'of a text ' * several}{totals['roofline_tokens_per_s']:.2f} tokens/s"
    return f"{streamed}{_text(totals['link_gb_per_s'])} GB/s, {roofline}"


def _memory(summary: Summary) -> str:
    parts = [text.format(summary[name]) for name, text in MEMORY.items() if summary[name] is not None]
    return ", ".join(parts) or "not measured"


def _speedup(speedup: Summary) -> str:
    decode, overall = speedup["tokens_per_s"], speedup["tokens_per_s_total"]
    if decode is None and speedup["tokens_per_s_together"] is not None:
        return f"{_figure(speedup['tokens_per_s_together'])}x all texts together"
    return f"{_figure(decode)}x decode, {_figure(overall)}x overall"


def _counts(counts: Summary) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in distinct_values(value))


def decimals(value: float | None, digits: int = 2, separator: str = "") -> str:
    """``digits`` decimals, or a dash for None. ``separator``: of thousands, ``,`` or none."""
    return "-" if value is None else f"{value:{separator}.{digits}f}"


_figure = partial(decimals, separator=",")
