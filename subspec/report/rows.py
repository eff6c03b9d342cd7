"""Rows of a report: pooled runs of one configuration.

A row holds runs of equal configuration (apart from folders and loggers) and hardware. Several runs of a row are
repeats: totals are pooled and the spread is shown. Rows are compared if they ran the same prompts of one target.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import Any

from subspec.records.method import config_group, group_name, is_quantized, method_label
from subspec.records.metrics import by_category, distinct_values, summarise
from subspec.records.run_folder import Key
from subspec.records.same_run import FREE_KEYS, NEW
from subspec.report.bootstrap import Interval, Speed, speed_interval
from subspec.report.collect import RunData

PLAIN = "none"
"""Draft of the default baseline."""

OVERALL = "Overall"
"""Name of all categories together."""

NOT_COMPARED = FREE_KEYS | {"experiment", "plan_only", "profile"}
"""Configuration keys that do not separate rows."""

SHOWN_DIFFERENCES = 3
"""Number of keys added to labels that would otherwise be equal."""


@dataclass(frozen=True)
class Baseline:
    """What a row is compared with (:mod:`subspec.report.baseline`).

    Attributes:
        row: the baseline; it has none itself. is_self: whether the compared row is the baseline.
        speedup: of decoding; None of the baseline itself, and if they differ in the number of texts at a time.
        by_category: the same by category.
        differences: besides the method.
        same_texts: number of turns with equal prompts and equal texts.
        other_texts: turns with equal prompts and different texts, as (sample, turn).
    """

    row: "Row"
    is_self: bool
    speedup: Interval | None
    by_category: Mapping[str, Interval | None] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    same_texts: int = 0
    other_texts: tuple[Key, ...] = ()

    @property
    def label(self) -> str:
        """Its method."""
        return self.row.method


@dataclass(frozen=True)
class Row:
    """One configuration on one machine.

    Attributes:
        experiment: experiment file; None without one.
        target, benchmark, source: names; source is ``hub``, ``file`` or ``sample``.
        method: label, see :func:`~subspec.records.method.method_label`; unique among rows that compare.
        draft: name of the draft. bits: bits per weight of a quantized draft, scales included; None if unknown.
        nominal_bits: ``quant.bits`` of a quantized draft.
        planted, sample: whether weights are planted; whether prompts are the packaged samples.
        device: GPU or CPU.
        runs: the repeats, in the order they were found.
        summary: over the records of all repeats.
        speed: tokens/s with a bootstrap interval over samples; None if nothing was decoded.
        by_sample: tokens and seconds by prompt, for comparing rows. category_of: category of those that have one.
        plain_bytes_per_pass: uncoded bytes of a pass; equal to the streamed bytes for plain weights.
        baseline: None without one.
    """

    experiment: str | None
    target: str
    benchmark: str
    source: str
    method: str
    draft: str
    bits: float | None
    nominal_bits: float | None
    planted: bool
    sample: bool
    device: str
    runs: tuple[RunData, ...]
    summary: Mapping[str, Any]
    speed: Interval | None
    by_sample: Mapping[str, Speed]
    category_of: Mapping[str, str]
    plain_bytes_per_pass: float | None
    baseline: Baseline | None = None

    @property
    def totals(self) -> Mapping[str, Any]:
        """The pooled figures."""
        return self.summary["totals"]

    @property
    def texts(self) -> str:
        """Number of texts at a time; speeds are of one text among them."""
        return text_of(self.summary["context"]["texts"])

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU."""
        return self.summary["context"]["device"] == "cpu"

    @property
    def repeats(self) -> tuple[float, float] | None:
        """Slowest and fastest repeat in tokens/s; None with one run."""
        speeds = [run.summary["totals"]["tokens_per_s"] for run in self.runs if run.turns]
        known = [speed for speed in speeds if speed is not None]
        return (min(known), max(known)) if len(self.runs) > 1 and known else None

    @property
    def iteration(self) -> dict[str, float] | None:
        """Seconds per iteration by phase: ``draft``, ``target`` (with verification), ``other``; None without any."""
        totals = self.totals
        count = totals["iterations"]
        if not count:
            return None
        draft, target = totals["draft_s"] / count, totals["verify_s"] / count
        return {"draft": draft, "target": target, "other": max(totals["decode_s"] / count - draft - target, 0.0)}

    @property
    def ceilings(self) -> list[tuple[str, float]]:
        """(kind of streamed weights, seconds per pass at the measured bandwidth); empty without a measured link."""
        streamed, link = self.totals["bytes_per_pass"], self.totals["link_gb_per_s"]
        if isinstance(streamed, list) or isinstance(link, list) or not streamed or not link:
            return []
        plain = self.plain_bytes_per_pass
        if plain is None or plain <= streamed * 1.005:
            return [("plain weights", streamed / (link * 1e9))]
        return [("coded weights", streamed / (link * 1e9)), ("plain weights", plain / (link * 1e9))]

    @property
    def categories(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by category, and ``Overall``; empty without categories. ``speedup``: an interval or None."""
        if not self.summary["categories"]:
            return {}
        accuracy, counts = self.summary["accuracy"], self.summary["counts"]
        overall = {**self.totals, **counts, "accuracy": accuracy and accuracy["accuracy"]}
        base = self.baseline
        gains = {} if base is None else {**base.by_category, OVERALL: base.speedup}
        every = {**self.summary["categories"], OVERALL: overall}
        return {name: {**one, "speedup": gains.get(name)} for name, one in every.items()}

    @property
    def place(self) -> tuple[str, str, str]:
        """Target, benchmark and source: rows are compared within one place."""
        return self.target, self.benchmark, self.source


def rows_of(runs: Sequence[RunData]) -> list[Row]:
    """Rows of all runs that generated tokens, not compared yet."""
    groups: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        if run.turns:
            groups[_identity(run)].append(run)
    rows = _unique_labels([_row(members) for members in groups.values()])
    rows.sort(key=lambda row: (row.place, row.draft != PLAIN, row.experiment or "", row.method))
    return rows


# ---------------------------------------------------------------------------------------------- grouping


def device_name(run: RunData) -> str:
    """Name of the GPU, or of the CPU with its threads; ``unknown`` if the folder does not say."""
    hardware = run.environment.get("hardware")
    hardware = hardware if isinstance(hardware, Mapping) else {}
    gpu = hardware.get("gpu")
    if run.summary["context"]["device"] == "cuda" and isinstance(gpu, Mapping):
        return str(gpu.get("name") or "unknown GPU")
    cpu = hardware.get("cpu")
    threads = run.facts.get("torch_threads") or hardware.get("torch_threads")
    return f"{cpu}, {threads} thread(s)" if cpu else "unknown"


def _identity(run: RunData) -> str:
    context = run.summary["context"]
    parts = (group_name(run.config), _settings(run), context, device_name(run), run.facts.get("dtype"))
    return json.dumps(parts, sort_keys=True, default=str)


def _settings(run: RunData) -> dict[str, Any]:
    """Settings that separate rows, as ``dotted.key: value``, and the digests of the weights.

    Plain decoding has no tree, and a quantizer only if the streamed weights are coded.
    """
    weights = config_group(run.facts, "weights")
    kept = _kept(run.config) | {f"weights.{name}": str(digest)[:8] for name, digest in weights.items()}
    if config_group(run.config, "draft").get("name") != PLAIN:
        return kept
    unused = ("tree.",) if is_coded(run) else ("quant.", "tree.")
    return {key: value for key, value in kept.items() if not key.startswith(unused)}


def is_coded(run: RunData) -> bool:
    """Whether exact weights were streamed coded; the quantizer then decides the streamed bytes."""
    return run.facts.get("codec") == "substitute"


def _kept(config: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """The configuration as ``dotted.key: value`` without :data:`NOT_COMPARED`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{key}.{name}" if key else str(name)
        if path in NOT_COMPARED or (path in NEW and value == NEW[path]):
            continue
        if isinstance(value, Mapping):
            flat |= _kept(value, path)
        else:
            flat[path] = value
    return flat


def _row(runs: Sequence[RunData]) -> Row:
    first = runs[0]
    records = [record for run in runs for record in run.records]
    summary = summarise(records)
    context = summary["context"]
    by_sample, category_of = _by_sample(records)
    substitute = first.facts.get("substitute")
    nominal = config_group(first.config, "quant").get("bits")
    nominal = nominal if is_quantized(first.config, first.facts) else None
    return Row(
        experiment=group_name(first.config),
        target=text_of(context["target"]),
        benchmark=text_of(context["benchmark"]),
        source=text_of(context["source"]),
        method=method_label(first.config, first.facts),
        draft=text_of(context["draft"]),
        bits=substitute.get("bits_per_weight") if isinstance(substitute, Mapping) else None,
        nominal_bits=nominal if isinstance(nominal, int | float) else None,
        planted=True in distinct_values(context["planted"]),
        sample="sample" in distinct_values(context["source"]),
        device=device_name(first),
        runs=tuple(runs),
        summary=summary,
        speed=speed_interval(by_sample),
        by_sample=by_sample,
        category_of=category_of,
        plain_bytes_per_pass=_plain_bytes(first),
    )


def _by_sample(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Speed], dict[str, str]]:
    """Tokens and seconds of every prompt over its turns and repeats, and its category, by sample id and digest."""
    digests: dict[str, Any] = {}
    for record in records:
        if not record.get("turn"):
            digests.setdefault(str(record.get("sample_id")), record.get("prompt_sha256"))
    turns: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if not record.get("skipped"):
            sample = str(record.get("sample_id"))
            turns[f"{sample} {digests.get(sample)}"].append(record)
    speeds = {
        sample: (fsum(r["verified_tokens"] for r in own), fsum(r["decode_s"] for r in own))
        for sample, own in turns.items()
    }
    return speeds, {sample: name for sample, own in turns.items() for name in by_category(own)}


def _plain_bytes(run: RunData) -> float | None:
    """Uncoded bytes of the layers that cross the slower link, from the plan; None without one."""
    plan = run.plan
    try:
        layers = len(plan["resident_layers"]) + len(plan["streamed_layers"])
        plain_layer = plan["plain_bytes_per_pass"] / (layers - plan["plain_resident"])
        crossing = "disk_layers" if plan.get("slower_link") == "disk" else "streamed_layers"
        return plain_layer * len(plan[crossing])
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _unique_labels(rows: list[Row]) -> list[Row]:
    """Add differing settings to labels that would be equal in one table."""
    same: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        same[(row.place, row.experiment, row.method)].append(row)
    unique = []
    for members in same.values():
        if len(members) == 1:
            unique += members
            continue
        described = [{**_settings(row.runs[0]), "on": row.device} for row in members]
        keys = sorted({key for one in described for key in one})
        differing = [key for key in keys if len({repr(one.get(key)) for one in described}) > 1]
        for number, (row, one) in enumerate(zip(members, described, strict=True), start=1):
            shown = [f"{key}={one.get(key)}" for key in differing[:SHOWN_DIFFERENCES]] or [f"#{number}"]
            unique.append(replace(row, method=f"{row.method} ({', '.join(shown)})"))
    return unique


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


def text_of(value: Any) -> str:
    return "unknown" if value is None else ", ".join(map(str, distinct_values(value)))
