"""Compare the rows of a report with their baselines: speed-ups, differences besides the method, and texts."""

from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subspec.errors import SubspecError
from subspec.records.method import budget_text, config_group
from subspec.report.bootstrap import speedup_interval
from subspec.report.rows import PLAIN, Baseline, Row, rows_of, text_of
from subspec.report.run_data import RunData, texts_of, turn_outcome


def make_rows(runs: Sequence[RunData], baseline: str | None = None) -> tuple[list[Row], list[str]]:
    """Rows of all runs that generated tokens, each with its baseline, and notes about their comparison.

    Args:
        runs: of :func:`~subspec.report.run_data.collect`.
        baseline: a draft (``none``), a method's label, an experiment, or a folder of runs; None: plain decoding.

    Raises:
        SubspecError: no row matches the given baseline, or several rows of one place do.
    """
    rows = rows_of(runs)
    chosen = [row for row in rows if _is_baseline(row, baseline)]
    if baseline is not None and not chosen:
        methods = sorted({row.draft for row in rows} | {row.method for row in rows})
        raise SubspecError(
            f"--baseline {baseline}: no such run; give a folder, or one of {'; '.join(methods) or '(no rows)'}"
        )
    notes = set()
    wanted = "run of plain decoding (draft=none)" if baseline is None else f"run of the baseline {baseline}"
    for row in rows:
        closest = _closest(row, [other for other in chosen if other.place == row.place])
        place = f"{row.target} on {row.benchmark}"
        if len(closest) == 1:
            row.baseline = _compared(row, closest[0])
        elif not closest:
            notes.add(f"{place}: no {wanted}, so no speed-up")
        elif baseline is None:
            notes.add(f"{place}: several runs of plain decoding, none closest: name one with --baseline")
        else:
            labels = "; ".join(other.method for other in closest)
            raise SubspecError(f"--baseline {baseline}: {place} has several such rows ({labels}): name one")
    return rows, sorted(notes)


def _is_baseline(row: Row, baseline: str | None) -> bool:
    if baseline is None:
        return row.draft == PLAIN
    if baseline in (row.draft, row.method, row.experiment):
        return True
    folder = Path(baseline)
    if not folder.is_dir():
        return baseline in (run.name for run in row.runs)
    return any(run.folder.resolve().is_relative_to(folder.resolve()) for run in row.runs)


def _closest(row: Row, candidates: Sequence[Row]) -> Sequence[Row]:
    """The baselines most similar to the row: the row itself, or those that share most of the ordered criteria."""
    if row in candidates:
        return [row]
    found, ours = candidates, _settings(row)
    for name in ("device", "texts", "decoding", "streamed", "offloading", "quantizer of coded weights", "experiment"):
        found = [other for other in found if _settings(other, row)[name] == ours[name]] or found
    return found


def _settings(row: Row, compared: Row | None = None) -> dict[str, Any]:
    """Settings besides the method. Of a candidate for ``compared``, the quantizer counts if its weights are coded."""
    first = row.runs[0]
    decoding = {key: value for key, value in config_group(first.config, "decoding").items() if key != "texts"}
    quantized = compared if compared is not None and not first.is_coded else row
    return {
        "device": row.device,
        "seed": text_of(row.summary["context"]["seed"]),
        "texts": row.texts,
        "decoding": repr(decoding),
        "samples": row.summary["counts"]["samples"],
        "prompts": frozenset(row.samples.index),
        "weights": config_group(first.facts, "weights").get("target"),
        "streamed": bool(row.ceilings),
        "offloading": (config_group(first.config, "offload").get("name"), budget_text(first.config, first.facts)),
        "quantizer of coded weights": repr(config_group(quantized.runs[0].config, "quant")),
        "experiment": row.experiment,
    }


def _compared(row: Row, other: Row) -> Baseline:
    if other is row:
        return Baseline(row)
    speedup, by_category = None, {}
    if row.texts == other.texts:  # the speed of a text depends on those beside it
        speedup = speedup_interval(row.samples, other.samples)
        by_category = {
            name: speedup_interval(*(one.samples[one.samples.category == name] for one in (row, other)))
            for name in row.summary["categories"]
        }
    # Each turn of the first run that has it.
    ours, theirs = (ChainMap(*map(texts_of, one.runs)) for one in (row, other))
    outcomes = {key: turn_outcome(ours[key], theirs[key]) for key in ours if key in theirs}
    return Baseline(
        other,
        speedup,
        by_category,
        _differences(row, other),
        same_texts=sum(outcome == "identical" for outcome in outcomes.values()),
        other_texts=tuple(key for key, outcome in outcomes.items() if outcome == "different"),
    )


def _differences(row: Row, other: Row) -> tuple[str, ...]:
    """Differences besides the method."""
    ours, theirs = _settings(row), _settings(other)
    found = {name for name in ours if ours[name] != theirs[name]}
    named = {"decoding": "decoding settings", "offloading": "offloading or budget"}
    if None not in (ours["weights"], theirs["weights"]):
        named["weights"] = "weights of the target"
    if "samples" not in found:
        named["prompts"] = "prompts"
    named |= {name: f"{name}: {ours[name]} against {theirs[name]}" for name in ("device", "seed", "texts", "samples")}
    return tuple(named[name] for name in ours if name in found and name in named)
