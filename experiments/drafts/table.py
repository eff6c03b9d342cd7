"""One row per draft from run folders: acceptance, and whether its tokens are plain decoding's. Exits with 1 otherwise.

    python experiments/drafts/table.py PLAIN RUN ...

A run that is not finished is compared on the turns it has, and its row says how many those are. An unfinished run
of plain decoding vouches for its own turns only.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # a script's own folder is searched first, the checkout is not

from experiments.default_target.compare import texts  # noqa: E402
from subspec.records.method import method_label  # noqa: E402
from subspec.report.run_data import RunData, read_run  # noqa: E402

HEADER = "| draft | turns | tau | tau of turns 1, 2 | accepted at depth 1, 2, 4, 8 | token ids | audit |"
DEPTHS = (1, 2, 4, 8)


def tau(records: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per verification pass, all together; nan without any."""
    passes = sum(record["iterations"] for record in records)
    return sum(record["verified_tokens"] for record in records) / passes if passes else math.nan


def row(run: RunData, folder: Path, plain: Mapping[tuple[str, int], list[int]]) -> tuple[str, bool]:
    """A line of the table, and whether every turn's tokens are plain decoding's."""
    ours = texts(folder)
    known = [turn for turn in ours if turn in plain]
    differing = sum(ours[turn] != plain[turn] for turn in known)
    tokens = sum(len(ours[turn]) for turn in known)
    same = f"identical, {tokens} of {tokens}"
    if differing:
        same = f"DIFFERENT in {differing} of {len(known)} turns"
    if len(known) < len(ours):
        same += f" ({len(ours) - len(known)} turns not compared)"
    by_turn = [[record for record in run.turns if record["turn"] == turn] for turn in (0, 1)]
    rates = run.summary["totals"]["accept_rate_by_depth"]
    audit = run.summary["audit"] or {}
    audited = (
        f"{audit['exact']} exact, {audit['near_tie']} near-ties, {audit['mismatch']} mismatches" if audit else "not run"
    )
    cells = (
        method_label(run.config, run.facts),
        str(len(run.turns)) + ("" if run.state == "finished" else " (unfinished)"),
        f"{tau(run.turns):.2f}",
        ", ".join(f"{tau(records):.2f}" for records in by_turn if records),
        ", ".join(f"{rates[depth - 1]:.2f}" for depth in DEPTHS if depth <= len(rates)) or "-",
        same,
        audited,
    )
    return f"| {' | '.join(cells)} |", not differing


def main(folders: list[Path]) -> int:
    """Print the table; the first folder is plain decoding's."""
    plain = texts(folders[0])
    print(HEADER)
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    good = True
    for folder in folders:
        line, same = row(read_run(folder), folder, plain)
        print(line)
        good &= same
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
