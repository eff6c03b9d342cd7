"""``python -m subspec.report FOLDER...``: tables and pictures of the runs below the folders.

``python -m subspec.report compare FOLDER_A FOLDER_B``: whether the texts of two runs are identical.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from subspec.config.guard import guarded
from subspec.errors import ConfigError

HELP = """\
Tables and pictures of runs, from the records they have written so far.

Finds every run in or below the folders, pools runs of the same configuration, and writes REPORT.md, three CSV files
and plots (PNG and SVG). Sweeps that are still running or have broken are fine: the report says what is missing.

  python -m subspec.report multirun/2026-01-31                     a sweep, compared with its plain decoding
  python -m subspec.report outputs/plain outputs/mine --out table  chosen runs
  python -m subspec.report multirun --baseline outputs/plain       speed-ups over the runs of one folder
  python -m subspec.report compare outputs/plain outputs/mine      are the texts of two runs identical? (compare --help)

A folder that is named compare: ./compare
"""

COMPARE = "compare"
COMPARE_HELP = """\
Are the texts of two runs identical? Compares the token ids of every turn that both runs have generated.

A run against its twin with draft=none is a test of losslessness. Turns are matched by sample_id and turn. A turn with
another prompt (a second turn whose first one differs, other data) is counted apart. Of a differing turn the first
difference is shown: its index, both token ids, and the target's two top logits there if a run with audit=true
recorded them.

  python -m subspec.report compare outputs/plain outputs/mine
  python -m subspec.report compare outputs/plain outputs/mine --json difference.json

Exit status: 0 all compared turns are identical, 1 some differ, 2 an error.
The report of a folder that is named compare: python -m subspec.report ./compare
"""
EXIT_DIFFERENT = 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` shows what there is")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. ``tool``: ``report`` or ``compare``; both have ``folders``.

    Raises:
        ConfigError: it is wrong.
    """
    program, layout = "python -m subspec.report", argparse.RawTextHelpFormatter
    if list(arguments[:1]) == [COMPARE]:
        parser = _Parser(f"{program} {COMPARE}", description=COMPARE_HELP, formatter_class=layout)
        for name in ("FOLDER_A", "FOLDER_B"):
            parser.add_argument("folders", metavar=name, type=Path, action="append", help="a run folder")
        parser.add_argument("--json", metavar="FILE", type=Path, help="everything, for a program")
        parser.set_defaults(tool=COMPARE)
        return parser.parse_args(arguments[1:])
    parser = _Parser(program, description=HELP, formatter_class=layout)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="run folders, or anything above them")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: FOLDER/report, of the first)")
    parser.add_argument(
        "--baseline",
        metavar="NAME|FOLDER",
        help="what speed-ups are against: a draft (none), a method as the tables call it,\n"
        "an experiment, or a run's name or folder (default: plain decoding, draft=none)",
    )
    parser.set_defaults(tool="report")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the module and of the console script ``subspec-report``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(guarded(lambda: _main(parse(arguments))))


def _main(options: argparse.Namespace) -> None:
    if options.tool == COMPARE:
        _compare(*options.folders, options.json)
        return
    from subspec.report.write import write_report  # matplotlib takes a second; --help does not need it

    report = write_report(options.folders, options.out or options.folders[0] / "report", options.baseline)
    for note in report.notes:
        print(f"note: {note}")
    planted, sample = (sum(getattr(row, name) for row in report.rows) for name in ("planted", "sample"))
    marks = f"({planted} of planted weights, {sample} of sample prompts)"
    print(f"{len(report.runs)} runs in {len(report.rows)} rows {marks}")
    print(f"report: {report.page}")


def _compare(folder_a: Path, folder_b: Path, json: Path | None) -> None:
    from subspec.report.compare import compare, show
    from subspec.utils.files import write_error, write_json
    from subspec.utils.terminal import Terminal

    found, console = compare(folder_a, folder_b), Terminal()
    show(found, console)
    if json is not None:
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
            write_json(json, found.to_dict())
        except OSError as error:
            # write_error's own status equals EXIT_DIFFERENT.
            raise ConfigError(str(write_error(error, json, "choose another file"))) from error
        console.note(f"written: {json}")
    if found.differences:
        sys.exit(EXIT_DIFFERENT)


if __name__ == "__main__":
    main()
