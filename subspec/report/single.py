"""The pictures that one run gives, for loggers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from subspec.records.metrics import summarise
from subspec.report.collect import FACTS, PLAN, RunData, State, read_optional
from subspec.report.plots import acceptance, roofline, time_split
from subspec.report.rows import make_rows


def run_figures(
    run_dir: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Figure]:
    """``acceptance``, ``time_split`` and ``roofline`` of one run, as far as it has them.

    Args:
        run_dir: its folder, for facts and plan.
        config, environment: as builtin types.
        records: all of them.
    """
    run = RunData(
        folder=run_dir,
        name=run_dir.name,
        config=config,
        overrides=None,
        facts=read_optional(run_dir / FACTS),
        plan=read_optional(run_dir / PLAN),
        environment=environment,
        records=tuple(records),
        summary=summarise(records),
        state=State.finished,
    )
    rows, _ = make_rows([run])
    drawn = {draw.__name__: draw(rows) for draw in (acceptance, time_split, roofline)}
    return {name: figure for name, figure in drawn.items() if figure is not None}
