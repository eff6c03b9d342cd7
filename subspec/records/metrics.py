"""Definitions of every reported figure: per turn, pooled over turns, and against a baseline.

Tau, tokens per second and acceptance have several definitions in the literature; all tables use those of this module. A
record keeps raw counts and seconds beside derived figures, and :func:`summarise` pools the raw values. A summary
depends on the records alone, so that a resumed run has the summary of an undisturbed one. docs/outputs.md defines every
field.

Units: seconds, tokens, GB = 1e9 bytes (links are sold in GB/s), GiB = 2**30 bytes (memory). A figure whose
denominator is zero is ``None`` (JSON null), never 0 or infinity.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from math import fsum
from typing import Any, NamedTuple

from subspec.benchmarks.prompts import TASKS
from subspec.decoding.result import GenerationResult, audit_errors

Record = Mapping[str, Any]

PER_TURN_FIGURES = (
    *("tokens_per_s", "tokens_per_s_total", "speedup_over_plain", "tau", "tau_published", "draft_acceptance_rate"),
    *("prompt_tokens", "new_tokens", "iterations", "prefill_s", "decode_s", "ttft_s"),
    *("block_p50_s", "block_p95_s", "block_p99_s", "roofline_share", "link_busy_share", "texts_beside"),
)
"""Figures of a turn that are summarised by mean, standard deviation and median."""

CONTEXT_FIELDS = ("benchmark", "source", "target", "draft", "device", "planted", "seed", "texts")
"""Record fields that are constant over a run and part of its summary. Records of earlier versions are of one text."""

SUMMED = ("verified_tokens", "new_tokens", "iterations", "prefill_s", "decode_s", "loop_s")
"""Record fields whose sums give :func:`speeds`."""


class LinkInfo(NamedTuple):
    """The link of an offloaded run: its measured bandwidth, and the weight bytes that a verification pass streams."""

    gb_per_s: float
    bytes_per_pass: int


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """``numerator / denominator``; ``None`` when either is missing or the denominator is not positive."""
    if numerator is None or denominator is None or denominator <= 0:
        return None
    return numerator / denominator


def turn_metrics(
    result: GenerationResult,
    *,
    beside: float = 0.0,
    loop_s: float | None = None,
    link: LinkInfo | None = None,
    plain: tuple[int, float] | None = None,
    peak_vram_gib: float | None = None,
    device_vram_gib: float | None = None,
    peak_ram_gib: float | None = None,
) -> dict[str, Any]:
    """The metrics of one turn: the fields of a record from ``prompt_tokens`` to ``finish_reason``.

    The prefill is no verification pass, and its token is not verified.

    Args:
        result: the finished generation.
        beside: mean number of other texts in its passes.
        loop_s: its share of the seconds of the loop over passes; the shares of all turns add up to those seconds.
        link: the link the weights cross, or None without offloading: the link figures are then None.
        plain: timed passes of plain decoding and their seconds (:meth:`~subspec.decoding.engine.Engine.time_plain`).
        peak_vram_gib: peak of PyTorch's device allocations so far (GiB), None without a GPU.
        device_vram_gib: memory that the process holds of the device at the end of the turn, as the driver counts (GiB).
        peak_ram_gib: peak resident memory of the process so far (GiB).
    """
    raw = asdict(result.stats) | {
        "new_tokens": len(result.token_ids),
        "ttft_s": result.stats.prefill_s,
        "block_s": [round(seconds, 6) for seconds in result.stats.block_s],
        "texts_beside": beside,
        "loop_s": loop_s,
        "plain_tokens": plain and plain[0],
        "plain_s": plain and plain[1],
        "link_gb_per_s": link and link.gb_per_s,
        "bytes_per_pass": link and link.bytes_per_pass,
        "peak_vram_gib": peak_vram_gib,
        "device_vram_gib": device_vram_gib,
        "peak_ram_gib": peak_ram_gib,
        "finish_reason": result.finish_reason.value,
    }
    figures = _totals([raw]) | raw
    for name in ("accept_s", "tokens_per_s_together"):  # a part of verify_s, and a figure of all texts of a run
        del figures[name]
    return figures


def summarise(records: Iterable[Record]) -> dict[str, Any]:
    """Pool the records of a run, in any order.

    Returns:
        ``context`` (:data:`CONTEXT_FIELDS`: a list where records disagree, None where absent), ``counts`` (``samples``
        and ``turns`` that were generated, ``skipped`` prompts by reason, ``finish_reasons``), ``totals`` (sums of the
        raw values, and the figures of :func:`turn_metrics` computed from the sums), ``per_turn`` (``n``, ``mean``,
        ``sd`` of a sample and ``median`` of :data:`PER_TURN_FIGURES`), ``categories``, ``accuracy`` and ``audit``
        (None when nothing was checked), and the largest ``peak_vram_gib``, ``device_vram_gib``, ``peak_ram_gib``.
        Totals of a field that earlier versions did not record are None unless all turns have it. The roofline is of
        offloaded turns only, ``speedup_over_plain`` of the turns behind which plain passes were timed.
    """
    records = [{"texts": 1, **record} for record in records]
    turns = [record for record in records if not record.get("skipped")]
    skipped = [record["skipped"] for record in records if record.get("skipped")]
    return {
        "context": {name: _common(records, name) for name in CONTEXT_FIELDS},
        "counts": {
            "samples": len({record.get("sample_id") for record in turns}),
            "turns": len(turns),
            "skipped": _counted(skip.get("reason") or "unknown" for skip in skipped),
            "finish_reasons": _counted(record.get("finish_reason") or "unknown" for record in turns),
        },
        "totals": _totals(turns),
        "per_turn": {name: _spread(turns, name) for name in PER_TURN_FIGURES},
        "categories": {name: _category(own) for name, own in by_category(turns).items()},
        "accuracy": _accuracy(turns),
        "audit": _audit(turns),
        **{name: _largest(turns, name) for name in ("peak_vram_gib", "device_vram_gib", "peak_ram_gib")},
    }


def speeds(sums: Mapping[str, Any]) -> dict[str, float | None]:
    """Speeds and tau of turns, given the sums of :data:`SUMMED` over them."""
    return {
        "tokens_per_s": ratio(sums["verified_tokens"], sums["decode_s"]),
        "tokens_per_s_total": ratio(sums["new_tokens"], sums["prefill_s"] + sums["decode_s"]),
        "tokens_per_s_together": ratio(sums["new_tokens"], sums["loop_s"]),
        "tau": ratio(sums["verified_tokens"], sums["iterations"]),
    }


def add_turn(sums: Counter[str], record: Record) -> None:
    """Add a turn to running sums of :data:`SUMMED`."""
    sums.update({name: record.get(name) or 0 for name in SUMMED})


def speedup(summary: Record, baseline: Record, name: str) -> dict[str, Any]:
    """How many times faster a run is than the baseline run ``name``, and the differences besides the method.

    Speeds of a text are None if the runs differ in the number of texts at a time.
    """
    ours, theirs = summary["totals"], baseline["totals"]
    pairs = {key: (summary["context"][key], baseline["context"][key]) for key in CONTEXT_FIELDS if key != "draft"}
    pairs |= {key: (summary["counts"][key], baseline["counts"][key]) for key in ("samples", "turns")}
    alike = pairs["texts"][0] == pairs["texts"][1]
    gains = {key: ratio(ours[key], theirs[key]) for key in ours if key.startswith("tokens_per_s")}
    return {
        "baseline": name,
        **(gains if alike else gains | {"tokens_per_s": None, "tokens_per_s_total": None}),
        "differences": [f"{key}: {mine} against {other}" for key, (mine, other) in pairs.items() if mine != other],
    }


# ------------------------------------------------------------------------------------------------ pooling


def _totals(turns: Sequence[Record]) -> dict[str, Any]:
    counts = ("prompt_tokens", "new_tokens", "verified_tokens", "iterations", "drafted_nodes", "bytes_streamed")
    seconds = ("prefill_s", "decode_s", "draft_s", "verify_s", "transfer_s")
    sums: dict[str, Any] = {name: sum(record.get(name) or 0 for record in turns) for name in counts}
    sums |= {name: fsum(record.get(name) or 0.0 for record in turns) for name in seconds}
    drafted = _sum_by_depth(turns, "drafted_by_depth")
    accepted = _sum_by_depth(turns, "accepted_by_depth")
    reached = _sum_by_depth(turns, "reached_by_depth") if _all_have(turns, "reached_by_depth") else None
    passes = sum(record["draft_passes"] for record in turns) if _all_have(turns, "draft_passes") else None
    shares = [_loop_s(record) for record in turns]
    sums["loop_s"] = None if None in shares else fsum(shares)
    blocks = [seconds for record in turns for seconds in record.get("block_s") or []]

    compared = [record for record in turns if record.get("plain_s")]
    plain = {name: sum(r[name] for r in compared) or None for name in ("plain_tokens", "plain_s")}
    drafted_speed = ratio(sum(r["verified_tokens"] for r in compared), fsum(r["decode_s"] for r in compared))

    linked = [record for record in turns if record.get("link_gb_per_s") and record.get("bytes_per_pass")]
    floor_s = fsum(r["iterations"] * r["bytes_per_pass"] / (r["link_gb_per_s"] * 1e9) for r in linked)
    linked_speed = ratio(sum(r["verified_tokens"] for r in linked), fsum(r["decode_s"] for r in linked))
    roofline = ratio(sum(r["verified_tokens"] for r in linked), floor_s)
    busy = ratio(fsum(r["transfer_s"] for r in linked), fsum(r["prefill_s"] + r["decode_s"] for r in linked))
    return sums | {
        **speeds(sums),
        **plain,
        "speedup_over_plain": ratio(drafted_speed, ratio(plain["plain_tokens"], plain["plain_s"])),
        "tau_published": _tau_published(len(turns), sums["verified_tokens"], sums["iterations"]),
        **_acceptance(sums["iterations"], sums["drafted_nodes"], drafted, accepted, reached),
        "draft_passes": passes,
        **_percentiles(blocks if _all_have(turns, "block_s") else []),
        "link_gb_per_s": _common(linked, "link_gb_per_s") if linked else None,
        "bytes_per_pass": _common(linked, "bytes_per_pass") if linked else None,
        "roofline_tokens_per_s": roofline,
        "roofline_share": ratio(linked_speed, roofline),
        "link_busy_share": busy,
    }


def _loop_s(record: Record) -> float | None:
    """A turn's share of the loop's seconds. Records of earlier versions lack it, whose texts had the loop alone."""
    alone = record["prefill_s"] + record["decode_s"] if record.get("texts", 1) == 1 else None
    return alone if record.get("loop_s") is None else record["loop_s"]


def _tau_published(prefills: int, verified: int, iterations: int) -> float | None:
    return (prefills + verified) / (prefills + iterations) if iterations else None


def _acceptance(
    iterations: int, nodes: int, drafted: list[int], accepted: list[int], reached: list[int] | None
) -> dict[str, Any]:
    # Passes that accepted at least 0, 1, 2, ... draft tokens.
    least = [iterations, *accepted, 0]
    return {
        "drafted_by_depth": drafted,
        "accepted_by_depth": accepted,
        "reached_by_depth": reached,
        "accept_rate_by_depth": _rates(drafted, accepted),
        "conditional_accept_rate_by_depth": None if reached is None else _rates(reached, accepted),
        "accepted_histogram": [more - fewer for more, fewer in pairwise(least)],
        "drafted_nodes": nodes,
        "accepted_nodes": sum(accepted),
        "draft_acceptance_rate": ratio(sum(accepted), nodes),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    cuts: Sequence[float | None] = [None] * 99
    if seconds:  # quantiles() needs two values
        cuts = statistics.quantiles([*seconds] * (1 + (len(seconds) == 1)), n=100, method="inclusive")
    return {f"block_p{share}_s": cuts[share - 1] for share in (50, 95, 99)}


def _all_have(turns: Sequence[Record], name: str) -> bool:
    return all(record.get(name) is not None for record in turns)


def category_group(record: Record) -> str | None:
    """The category that a record counts for: some benchmarks report several categories of their data as one."""
    task, category = TASKS.get(record.get("benchmark", "")), record.get("category")
    return task.groups.get(category, category) if task else category


def by_category(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by :func:`category_group`, in alphabetical order; those without one are left out."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if (category := category_group(record)) is not None:
            found.setdefault(category, []).append(record)
    return dict(sorted(found.items()))


def _category(turns: Sequence[Record]) -> dict[str, Any]:
    totals, accuracy = _totals(turns), _accuracy(turns)
    return {
        "samples": len({record.get("sample_id") for record in turns}),
        "turns": len(turns),
        "tau": totals["tau"],
        "tokens_per_s": totals["tokens_per_s"],
        "accuracy": accuracy and accuracy["accuracy"],
    }


def _rates(drafted: Sequence[int], accepted: Sequence[int]) -> list[float | None]:
    padded = [*accepted, *[0] * (len(drafted) - len(accepted))]
    return [ratio(hit, tried) for hit, tried in zip(padded, drafted, strict=False)]


def _sum_by_depth(turns: Sequence[Record], name: str) -> list[int]:
    rows = [record.get(name) or [] for record in turns]
    depth = max(map(len, rows), default=0)
    return [sum(row[level] for row in rows if level < len(row)) for level in range(depth)]


def _spread(turns: Sequence[Record], name: str) -> dict[str, Any]:
    values = [record[name] for record in turns if record.get(name) is not None]
    return {
        "n": len(values),
        "mean": fsum(values) / len(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values) if values else None,
    }


def _accuracy(turns: Sequence[Record]) -> dict[str, Any] | None:
    checked = [bool(record["correct"]) for record in turns if record.get("correct") is not None]
    unfinished = sum(map(is_unfinished, turns))
    if not checked and not unfinished:
        return None
    return {
        "correct": sum(checked),
        "checked": len(checked),
        "accuracy": ratio(sum(checked), len(checked)),
        "unfinished": unfinished,
    }


def is_unfinished(record: Record) -> bool:
    """Whether a text was cut at the length limit before it reached the answer that was to be checked."""
    unchecked = record.get("correct") is None and record.get("reference") is not None
    return unchecked and record.get("finish_reason") == "length"


def _audit(turns: Sequence[Record]) -> dict[str, Any] | None:
    audits = [record["audit"] for record in turns if record.get("audit")]
    if not audits:
        return None
    sums: dict[str, Any] = {key: sum(a.get(key) or 0 for a in audits) for key in ("exact", "near_tie", "mismatch")}
    return sums | {
        "max_gap": _largest(audits, "max_gap"),
        "margin": _largest(audits, "margin"),
        "turns": len(audits),
        "bitwise": sum(bool(a.get("bitwise")) for a in audits),
        "errors": sum(
            audit_errors(a.get("mismatch") or 0, a.get("near_tie") or 0, bool(a.get("bitwise"))) for a in audits
        ),
    }


def _largest(records: Sequence[Record], name: str) -> float | None:
    return max((record[name] for record in records if record.get(name) is not None), default=None)


def _common(records: Sequence[Record], name: str) -> Any:
    """The common value of all records, or the list of distinct values in a stable order."""
    values = {repr(record[name]): record[name] for record in records if record.get(name) is not None}
    distinct = [values[key] for key in sorted(values)]
    return distinct[0] if len(distinct) == 1 else distinct or None


def distinct_values(value: Any) -> list[Any]:
    """A field of ``context`` as a list: one value, or those on which records disagree."""
    return value if isinstance(value, list) else [value]


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
