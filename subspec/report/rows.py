"""Rows of a report: pooled runs of one configuration.

A row holds runs of equal configuration (apart from folders and loggers) and hardware. Several runs of a row are
repeats: totals are pooled and the spread is shown. Rows are compared if they ran the same prompts of one target.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pandas as pd

from subspec.records.method import config_group, group_name, is_quantized
from subspec.records.metrics import category_group, distinct_values, summarise
from subspec.records.run_folder import Key
from subspec.records.same_run import FREE_KEYS, NEW
from subspec.report.bootstrap import Interval, speed_interval
from subspec.report.run_data import RunData

Item = TypeVar("Item")
Group = TypeVar("Group", bound=Hashable)

PLAIN = "none"  # draft of the default baseline
OVERALL = "Overall"  # name of all categories together
NOT_COMPARED = FREE_KEYS | {"experiment", "plan_only", "profile"}  # configuration keys that do not separate rows
SHOWN_DIFFERENCES = 3  # keys added to labels that would otherwise be equal


@dataclass(frozen=True)
class Baseline:
    """What a row is compared with (:mod:`subspec.report.baseline`).

    Attributes:
        row: the baseline, possibly the compared row itself.
        speedup: of decoding; None of the baseline itself, and if they differ in the number of texts at a time.
        by_category: the same by category.
        differences: besides the method.
        same_texts: number of turns with equal prompts and equal texts.
        other_texts: turns with equal prompts and different texts, as (sample, turn).
    """

    row: "Row"
    speedup: Interval | None = None
    by_category: Mapping[str, Interval | None] = field(default_factory=dict)
    differences: Sequence[str] = ()
    same_texts: int = 0
    other_texts: Sequence[Key] = ()

    @property
    def label(self) -> str:
        """Its method."""
        return self.row.method


class Row:
    """One configuration on one machine. Figures are over the records of all repeats.

    Attributes:
        runs: the repeats, in the order they were found.
        method: label, see :func:`~subspec.records.method.method_label`; unique among rows that compare.
        experiment: experiment file; None without one.
        target, benchmark, source, draft: names; source is ``hub``, ``file`` or ``sample``.
        place: target, benchmark and source; rows are compared within one place.
        texts: number of texts at a time; speeds are of one text among them.
        planted, sample: whether weights are planted; whether prompts are the packaged samples.
        device: GPU or CPU.
        bits: bits per weight of a quantized draft, scales included; None if unknown.
        nominal_bits: ``quant.bits`` of a quantized draft.
        summary: of all records. totals: part of it.
        samples: ``tokens``, ``seconds`` and ``category`` by prompt, for comparing rows.
        speed: tokens/s with a bootstrap interval over samples; None if nothing was decoded.
        baseline: None without one.
    """

    def __init__(self, runs: Sequence[RunData]) -> None:
        records = [record for run in runs for record in run.records]
        first, self.summary = runs[0], summarise(records)
        context, self.totals = self.summary["context"], self.summary["totals"]
        self.runs, self.method, self.device = runs, first.method, first.device
        self.experiment = group_name(first.config)
        self.target, self.benchmark, self.source, self.draft, self.texts = (
            text_of(context[name]) for name in ("target", "benchmark", "source", "draft", "texts")
        )
        self.place = self.target, self.benchmark, self.source
        self.planted = True in distinct_values(context["planted"])
        self.sample = "sample" in distinct_values(context["source"])
        self.bits: float | None = config_group(first.facts, "substitute").get("bits_per_weight")
        nominal = config_group(first.config, "quant").get("bits")
        known = is_quantized(first.config, first.facts) and isinstance(nominal, int | float)
        self.nominal_bits: float | None = nominal if known else None
        self.samples = _samples(records)
        self.speed = speed_interval(self.samples)
        self.baseline: Baseline | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether it is its own baseline."""
        return self.baseline is not None and self.baseline.row is self

    @property
    def repeats(self) -> tuple[float, float] | None:
        """Slowest and fastest repeat in tokens/s; None with one run."""
        speeds = [run.summary["totals"]["tokens_per_s"] for run in self.runs]
        known = [speed for speed in speeds if speed is not None]
        return (min(known), max(known)) if len(self.runs) > 1 and known else None

    @property
    def iteration(self) -> dict[str, float] | None:
        """Seconds per iteration by phase: ``draft``, ``target`` (with verification), ``other``; None without any."""
        totals, count = self.totals, self.totals["iterations"]
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
        plain = _plain_bytes(self.runs[0].plan, self.runs[0].facts)
        if plain is None or plain <= streamed * 1.005:
            return [("plain weights", streamed / (link * 1e9))]
        return [("coded weights", streamed / (link * 1e9)), ("plain weights", plain / (link * 1e9))]

    @property
    def categories(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures by category, and ``Overall``; empty without categories. ``speedup``: an interval or None."""
        if not self.summary["categories"]:
            return {}
        accuracy, base = self.summary["accuracy"], self.baseline
        overall = {**self.totals, **self.summary["counts"], "accuracy": accuracy and accuracy["accuracy"]}
        gains = {} if base is None else {**base.by_category, OVERALL: base.speedup}
        every = {**self.summary["categories"], OVERALL: overall}
        return {name: {**one, "speedup": gains.get(name)} for name, one in every.items()}


def grouped(items: Iterable[Item], key: Callable[[Item], Group]) -> dict[Group, list[Item]]:
    """Items by ``key``, in order."""
    groups: dict[Group, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def rows_of(runs: Sequence[RunData]) -> list[Row]:
    """Rows of all runs that generated tokens, not compared yet."""
    rows = [Row(members) for members in grouped((run for run in runs if run.turns), _identity).values()]
    _make_labels_unique(rows)
    return sorted(rows, key=lambda row: (row.place, row.draft != PLAIN, row.experiment or "", row.method))


# ------------------------------------------------------------------------------------------------ parts


def _identity(run: RunData) -> str:
    parts = group_name(run.config), _settings(run), run.summary["context"], run.device, run.facts.get("dtype")
    return json.dumps(parts, sort_keys=True, default=str)


def _settings(run: RunData) -> dict[str, Any]:
    """Settings that separate rows, as ``dotted.key: value``, and the digests of the weights.

    Plain decoding has no tree, and a quantizer only if the streamed weights are coded.
    """
    weights = config_group(run.facts, "weights")
    kept = _kept(run.config) | {f"weights.{name}": str(digest)[:8] for name, digest in weights.items()}
    if config_group(run.config, "draft").get("name") != PLAIN:
        return kept
    unused = ("tree.",) if run.is_coded else ("quant.", "tree.")
    return {key: value for key, value in kept.items() if not key.startswith(unused)}


def _kept(config: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """The configuration as ``dotted.key: value`` without :data:`NOT_COMPARED`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{key}.{name}" if key else str(name)
        if path in NOT_COMPARED or (path in NEW and value == NEW[path]):
            continue
        flat |= _kept(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _samples(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Tokens and seconds of every prompt over its turns and repeats, and its category, by sample id and digest."""
    digests: dict[Any, Any] = {}
    for record in records:
        if not record.get("turn"):
            digests.setdefault(record.get("sample_id"), record.get("prompt_sha256"))
    turns = [
        {
            "sample": f"{record.get('sample_id')} {digests.get(record.get('sample_id'))}",
            "tokens": float(record["verified_tokens"]),
            "seconds": float(record["decode_s"]),
            "category": category_group(record),
        }
        for record in records
        if not record.get("skipped")
    ]
    sums = {"tokens": "sum", "seconds": "sum", "category": "last"}
    return pd.DataFrame(turns, columns=["sample", *sums]).groupby("sample").agg(sums)


def _plain_bytes(plan: Mapping[str, Any], facts: Mapping[str, Any]) -> float | None:
    """Uncoded bytes of the layers that cross the slower link; None without a plan."""
    try:
        layers = len(plan["resident_layers"]) + len(plan["streamed_layers"])
        plain_layer = plan["plain_bytes_per_pass"] / (layers - plan["plain_resident"])
        if plan.get("slower_link") == "disk":
            return plain_layer * len(plan["disk_layers"])
        # Loading may keep other layers than planned.
        return plain_layer * (layers - len(facts.get("resident_layers", plan["resident_layers"])))
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _make_labels_unique(rows: Sequence[Row]) -> None:
    """Add differing settings to labels that would be equal in one table."""
    for members in grouped(rows, lambda row: (row.place, row.experiment, row.method)).values():
        described = [{**_settings(row.runs[0]), "on": row.device} for row in members]
        keys = sorted({key for one in described for key in one})
        differing = [key for key in keys if len({repr(one.get(key)) for one in described}) > 1]
        for number, (row, one) in enumerate(zip(members, described, strict=True), start=1):
            shown = [f"{key}={one.get(key)}" for key in differing[:SHOWN_DIFFERENCES]] or [f"#{number}"]
            if len(members) > 1:
                row.method += f" ({', '.join(shown)})"


def text_of(value: Any) -> str:
    """Distinct values as text."""
    return "unknown" if value is None else ", ".join(map(str, distinct_values(value)))
