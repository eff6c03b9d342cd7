"""Figures of a single run, for loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from subspec.records.metrics import summarise
from subspec.records.run_files import FACTS, PLAN, read_json
from subspec.report.baseline import make_rows
from subspec.report.plots import acceptance, roofline, tau_by_category, time_split
from subspec.report.run_data import RunData, State


def run_figures(
    run_dir: Path, config: Mapping[str, Any], environment: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Figures of one run by name; those without data are left out. ``run_dir``: for facts and plan."""
    facts, plan = (read_json(run_dir / file) or {} for file in (FACTS, PLAN))
    described = {"config": config, "overrides": None, "facts": facts, "plan": plan, "environment": environment}
    summary = summarise(records)
    run = RunData(run_dir, run_dir.name, **described, records=tuple(records), summary=summary, state=State.finished)
    rows, _ = make_rows([run])
    drawn = {draw.__name__: draw(rows) for draw in (acceptance, tau_by_category, time_split, roofline)}
    return {name: figure for name, figure in drawn.items() if figure is not None}
