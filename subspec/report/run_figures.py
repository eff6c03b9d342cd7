"""Figures of a single run, for loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from subspec.records.metrics import summarise
from subspec.records.run_files import FACTS, PLAN, read_json
from subspec.report.baseline import make_rows
from subspec.report.collect import RunData, State
from subspec.report.plots import acceptance, roofline, tau_by_category, time_split

FIGURES = (acceptance, tau_by_category, time_split, roofline)


def run_figures(
    run_dir: Path, config: Mapping[str, Any], environment: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Figures of one run by name; those without data are left out.

    Args:
        run_dir: its folder, for facts and plan.
        config, environment: as builtin types.
        records: all records of the run.
    """
    run = RunData(
        folder=run_dir,
        name=run_dir.name,
        config=config,
        overrides=None,
        facts=read_json(run_dir / FACTS) or {},
        plan=read_json(run_dir / PLAN) or {},
        environment=environment,
        records=tuple(records),
        summary=summarise(records),
        state=State.finished,
    )
    rows, _ = make_rows([run])
    drawn = {draw.__name__: draw(rows) for draw in FIGURES}
    return {name: figure for name, figure in drawn.items() if figure is not None}
