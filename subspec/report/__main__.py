"""``python -m subspec.report FOLDER...``: tables and pictures of the runs below the folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from subspec.command import guarded
from subspec.errors import ConfigError

HELP = """\
Tables and pictures of runs, from the records they have written so far.

Finds every run in or below the folders, pools runs of the same configuration, and writes REPORT.md, three CSV files
and plots (PNG and SVG). Sweeps that are still running or have broken are fine: the report says what is missing.

  python -m subspec.report multirun/2026-01-31                     a sweep, compared with its plain decoding
  python -m subspec.report outputs/plain outputs/mine --out table  chosen runs
  python -m subspec.report multirun --baseline outputs/plain       speed-ups over the runs of one folder
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `python -m subspec.report --help` shows what there is")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: it is wrong.
    """
    parser = _Parser(
        "python -m subspec.report", description=HELP, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", type=Path, help="run folders, or anything above them"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: FOLDER/report, of the first)"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME|FOLDER",
        help="what speed-ups are against: a draft (none), a method as the tables call it,\n"
        "an experiment, or a run's name or folder (default: plain decoding, draft=none)",
    )
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the module and of the console script ``subspec-report``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: _main(arguments)))


def _main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    from subspec.report.write import write_report  # matplotlib takes a second; --help does not need it

    report = write_report(options.folders, options.out or options.folders[0] / "report", options.baseline)
    for note in report.notes:
        print(f"note: {note}")
    planted = sum(row.planted for row in report.rows)
    sample = sum(row.sample for row in report.rows)
    print(
        f"{len(report.runs)} runs in {len(report.rows)} rows ({planted} of planted weights, {sample} of sample prompts)"
    )
    print(f"report: {report.page}")


if __name__ == "__main__":
    main()
