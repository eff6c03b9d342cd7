"""What a quantizer's error costs in acceptance: one row per run of a substitute, bits and errors beside it.

    python experiments/quantizers/acceptance.py RUN ...

Bits per weight and relative errors come from ``errors.json`` (``errors.py``), tau and the audit from the runs'
folders. The time of a draft level comes from ``levels_h200.json`` when it is there: a list of objects with ``name``
(HQQ or HIGGS), ``bits``, ``dim`` (0 for HQQ), ``group`` and ``level_ms``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspec.report.run_data import RunData, read_run

HERE = Path(__file__).parent
LEVELS = HERE / "levels_h200.json"
SOURCE = "smollm2_135m"
NOT_MEASURED = "not measured"

HEADER = (
    "| quantizer | bits | group, at most | dimension | bits per weight | relative error | tau | "
    "accepted at depth 1, 4, 8 | audit | draft level, ms |"
)
DEPTHS = (1, 4, 8)

Key = tuple[str, int, int, int]
"""Name, bits, group and dimension (0 for HQQ), as in ``errors.json``."""


def by_key(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Rows of a JSON file by the quantizer they belong to."""
    return {(row["name"], row["bits"], row["group"], row["dim"]): row for row in rows}


def key_of(run: RunData) -> Key:
    """The quantizer of a run.

    Raises:
        SystemExit: its draft is no quantized substitute.
    """
    quant = run.config.get("quant") or {}
    if run.config["draft"]["name"] != "subspec" or "bits" not in quant:
        sys.exit(f"{run.folder}: draft={run.config['draft']['name']} is no substitute that quant made")
    return quant["name"].upper(), quant["bits"], quant["group_size"], quant.get("vector_dim", 0)


def row(run: RunData, errors: Mapping[Key, Mapping[str, Any]], levels: Mapping[Key, Mapping[str, Any]]) -> str:
    """A line of the table."""
    key = key_of(run)
    name, bits, group, dim = key
    error = errors.get(key, {})
    totals, audit = run.summary["totals"], run.summary["audit"]
    rates = totals["accept_rate_by_depth"]
    unfinished = "" if run.state == "finished" else f" ({len(run.turns)} turns, unfinished)"
    cells = (
        name,
        str(bits),
        str(group),
        str(dim or "-"),
        f"{error['bits_per_weight']:.3f}" if error else NOT_MEASURED,
        f"{error['error']:.4f}" if error else NOT_MEASURED,
        f"{totals['tau']:.2f}{unfinished}",
        ", ".join(f"{rates[depth - 1]:.2f}" for depth in DEPTHS if depth <= len(rates)),
        f"{audit['exact']} exact, {audit['mismatch']} mismatches" if audit else "not run",
        f"{levels[key]['level_ms']:.2f}" if key in levels else NOT_MEASURED,
    )
    return f"| {' | '.join(cells)} |"


def main(folders: Sequence[Path]) -> None:
    """Print the table, rows in the order of the folders."""
    errors = json.loads((HERE / "errors.json").read_text(encoding="utf-8"))
    known = by_key([error for error in errors if error["source"] == SOURCE])
    levels = by_key(json.loads(LEVELS.read_text(encoding="utf-8"))) if LEVELS.exists() else {}
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    for folder in folders:
        run = read_run(folder)
        if not run.turns:
            sys.exit(f"{folder}: nothing was generated there")
        print(row(run, known, levels))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
