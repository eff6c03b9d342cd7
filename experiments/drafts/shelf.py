"""One row per draft over several benchmarks: acceptance, and whether tokens are plain decoding's. Exits with 1 if not.

    python experiments/drafts/shelf.py ROOT [DRAFT ...]

Run folders are ROOT/BENCHMARK/DRAFT, as scripts/bitwise_matrix.py writes them; ROOT/BENCHMARK/none is plain decoding.
"""

import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]  # a script's own folder is searched first, the checkout is not

from experiments.default_target.compare import texts  # noqa: E402
from experiments.drafts.table import tau  # noqa: E402
from subspec.records.method import method_label  # noqa: E402
from subspec.report.run_data import RunData, read_run  # noqa: E402

DEPTHS = (1, 2, 3, 4, 6, 8)


def by_depth(runs: list[RunData]) -> list[float]:
    """Accepted by drafted tokens at depth 1, 2, ..., of all runs together."""
    sums = [
        [sum(counts) for counts in zip_longest(*(run.summary["totals"][key] for run in runs), fillvalue=0)]
        for key in ("accepted_by_depth", "drafted_by_depth")
    ]
    return [accepted / drafted if drafted else 0.0 for accepted, drafted in zip(*sums, strict=True)]


def row(runs: list[RunData], plain: list[dict[tuple[str, int], list[int]]]) -> tuple[str, bool]:
    """A line of the table, and whether every turn's tokens are plain decoding's."""
    turns: list[Any] = [turn for run in runs for turn in run.turns]
    rates, same, tokens = by_depth(runs), True, 0
    for run, known in zip(runs, plain, strict=True):
        ours = texts(run.folder)
        same &= run.state == "finished" and all(known.get(turn) == ids for turn, ids in ours.items())
        tokens += sum(map(len, ours.values()))
    cells = (
        method_label(runs[0].config, runs[0].facts),
        *(f"{tau(run.turns):.2f} ({len(run.turns)})" for run in runs),
        f"{tau(turns):.2f}",
        ", ".join(f"{rates[depth - 1]:.2f}" for depth in DEPTHS if depth <= len(rates)) or "-",
        f"identical, {tokens} of {tokens}" if same else "DIFFERENT",
    )
    return f"| {' | '.join(cells)} |", same


def main(root: Path, drafts: list[str]) -> int:
    """Print the table; by default of every draft that ran on all benchmarks."""
    plain = {path.parent.name: texts(path) for path in sorted(root.glob("*/none"))}
    drafts = drafts or sorted({path.parent.name for path in root.glob("*/*/summary.json")} - {"none"})
    taus = (f"tau, {benchmark} (turns)" for benchmark in plain)
    header = ("draft", *taus, "tau, all", f"accepted at depth {', '.join(map(str, DEPTHS))}", "token ids")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    good = True
    for draft in ("none", *drafts):
        runs = [read_run(root / benchmark / draft) for benchmark in plain]
        line, same = row(runs, list(plain.values()))
        print(line)
        good &= same
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
