"""Reports: tables and plots of any number of runs.

``python -m subspec.report FOLDER...`` reads every run below the folders and writes REPORT.md, CSV tables and plots. All
figures are computed from the records (see :mod:`subspec.records.metrics`), also those of unfinished sweeps. As a
library::

    from subspec.report import write_report

    report = write_report([Path("multirun/2026-01-31/12-00-00")], out=Path("report"), baseline="none")
    report.page, report.rows[0].speed
"""

from subspec.report.baseline import make_rows
from subspec.report.collect import RunData, State, collect
from subspec.report.rows import Row
from subspec.report.write import Report, write_report

__all__ = ["Report", "Row", "RunData", "State", "collect", "make_rows", "write_report"]
