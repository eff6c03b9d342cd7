"""Reports: tables and plots of any number of runs.

``python -m subspec.report FOLDER...`` reads every run below the folders and writes REPORT.md, CSV tables and plots. All
figures are computed from the records (see :mod:`subspec.records.metrics`), also those of unfinished sweeps. As a
library::

    from subspec.report import write_report

    report = write_report([Path("multirun/2026-01-31/12-00-00")], out=Path("report"), baseline="none")
    report.page, report.rows[0].speed
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "write": ("Report", "write_report"),
    "rows": ("Row",),
    "run_data": ("RunData", "State", "collect"),
    "baseline": ("make_rows",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # Lazily: matplotlib and pandas take seconds to import, and `--help` and `compare` need neither.
    if name in _MODULE_OF:
        return getattr(import_module(f"subspec.report.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'subspec.report' has no attribute {name!r}")
