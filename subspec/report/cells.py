"""Tables of a report with full precision, as they are written to CSV; Markdown tables take cells of them too."""

from pathlib import Path
from typing import Any

from subspec.records.method import config_group, group_name
from subspec.records.sweep_folder import config_digest
from subspec.report.collect import RunData, State
from subspec.report.rows import Row

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
