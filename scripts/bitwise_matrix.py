"""The sceptic's test: every draft and tree against plain decoding, text by text, with the command line's own runs.

    python scripts/bitwise_matrix.py --data FOLDER --out FOLDER [--rows 15] [--jobs 4] [KEY=VALUE ...]

Runs the default target with ``draft=none`` and with every draft and tree that fits it, whole and streamed, greedy and
sampled, on rows of ``mt_bench.jsonl`` and ``gsm8k_test.jsonl`` in FOLDER, several processes side by side (their speeds
mean nothing), each with ``audit=true``. Then compares the token ids of every run with plain decoding's. Keys and values
are given to every run. Prints a table for people and one JSON line last; exits with 1 where a text differs or an audit
found anything but equal bits.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from subspec.errors import SubspecError
from subspec.report.compare import compare

TREES = {"beam": ["tree=beam"], "chain": ["tree=chain"], "adaptive": ["tree=adaptive"], "eagle2": ["tree=eagle2"]}
DECODING = {
    "greedy": ["decoding=greedy"],
    "sampling": ["decoding=sampling", "decoding.temperature=0.8", "decoding.top_p=0.95"],
}
HEADS = {"eagle3": "eagle2", "block_head": "eagle2", "prompt_lookup": "chain"}
"""Drafts that take one tree each, with the whole target."""
BENCHMARKS = {"mt_bench": "mt_bench.jsonl", "gsm8k": "gsm8k_test.jsonl"}


@dataclass(frozen=True)
class Job:
    """One run; ``name`` is its folder."""

    name: str
    baseline: str
    arguments: tuple[str, ...]


def jobs(rows: int, slow_rows: int) -> list[Job]:
    """Every draft and tree; ``layer_skip`` and streamed modules take ``slow_rows`` rows."""
    found = []
    for decoding, how in DECODING.items():
        for benchmark in BENCHMARKS:
            plain = f"{decoding}/{benchmark}/none"
            common = (*how, f"benchmark={benchmark}")
            found.append(Job(plain, plain, (*common, "draft=none", f"benchmark.max_samples={rows}")))
            for draft, tree in itertools.product(("subspec", "layer_skip", "small_model", "eagle2"), TREES):
                # Half the layers of a model this small propose nothing: every token is a pass over the link.
                count = min(rows, slow_rows) if draft == "layer_skip" else rows
                found.append(_drafted(draft, tree, common, plain, count))
                if draft == "eagle2" or (draft == "small_model" and tree != "eagle2"):
                    found.append(_drafted(draft, tree, common, plain, slow_rows, streamed=True))
            found += [_drafted(draft, tree, common, plain, rows) for draft, tree in HEADS.items()]
    return sorted(found, key=lambda job: "layer_skip" not in job.name)  # the slowest first


def _drafted(draft: str, tree: str, common: tuple[str, ...], plain: str, rows: int, *, streamed: bool = False) -> Job:
    """A run with a draft; its captured levels are streamed where the tree allows it."""
    captured = draft in ("subspec", "layer_skip") and tree != "eagle2"
    place: tuple[str, ...] = ()
    if captured or streamed:
        place = ("offload=stream", "offload.vram_gib=1.5", "offload.resident_layers=4")
        if draft != "subspec":
            place = (*place, "offload.codec=none")
        if draft == "layer_skip":
            place = (*place[:2], "draft.keep=8", *place[3:])
    name = f"{plain.removesuffix('none')}{draft}-{tree}{'-streamed' if streamed else ''}"
    arguments = (*common, f"draft={draft}", *TREES[tree], *place, f"benchmark.max_samples={rows}")
    return Job(name, plain, arguments)


def run(job: Job, options: argparse.Namespace) -> float:
    """Run a job in a process of its own; returns its seconds."""
    folder = Path(options.out) / job.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    benchmark = job.name.split("/")[1]
    command = [
        sys.executable, "-m", "subspec.run", *job.arguments, "benchmark.source=file",
        f"benchmark.path={Path(options.data).absolute() / BENCHMARKS[benchmark]}", "decoding.max_new_tokens=128",
        "decoding.max_length=1024", "audit=true", "logger=none", f"run_dir={folder}", *options.overrides,
    ]  # fmt: skip
    with (folder.parent / f"{folder.name}.log").open("w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False, env=environment)
    return time.perf_counter() - started


def judge(job: Job, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """What a run came to: turns like plain decoding's, and its audit."""
    folder = Path(options.out)
    row: dict[str, Any] = {"run": job.name, "seconds": round(seconds, 1)}
    try:
        summary = json.loads((folder / job.name / "summary.json").read_text())
    except OSError:
        log = (folder / f"{job.name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return row | {"failed": log[-1][-300:] if log else "no output"}
    audit = summary["audit"]
    row |= {"tau": summary["totals"]["tau"], "turns": summary["counts"]["turns"], "bitwise": audit["bitwise"]}
    row |= {name: audit[name] for name in ("exact", "near_tie", "mismatch", "max_gap")}
    if job.name == job.baseline:
        return row
    try:
        found = compare(folder / job.baseline, folder / job.name)
    except SubspecError as error:
        return row | {"failed": str(error)}
    counts = {name: len(keys) for name, keys in found.turns.items()}
    return row | {"identical": counts["identical"], "different": counts["different"] + counts["other_prompt"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of mt_bench.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--rows", type=int, default=15, help="of each of the two files")
    parser.add_argument(
        "--slow-rows",
        type=int,
        default=2,
        help="of each, for layer_skip and for streamed drafts without captured levels",
    )
    parser.add_argument("--jobs", type=int, default=4, help="processes side by side")
    parser.add_argument("--only", default="", help="runs whose name this expression finds, and plain decoding")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    found = jobs(options.rows, options.slow_rows)
    baselines = {job.baseline for job in found if re.search(options.only, job.name)}
    wanted = [job for job in found if job.name in baselines or re.search(options.only, job.name)]
    with ThreadPoolExecutor(options.jobs) as pool:
        seconds = list(pool.map(lambda job: run(job, options), wanted))
    rows = [judge(job, took, options) for job, took in zip(wanted, seconds, strict=True)]
    table = Table(title="token ids against plain decoding's, and audits")
    columns = (
        "run",
        "turns",
        "identical",
        "different",
        "tau",
        "exact",
        "near_tie",
        "mismatch",
        "bitwise",
        "seconds",
        "failed",
    )
    for name in columns:
        table.add_column(name, justify="left" if name in ("run", "failed") else "right")
    for row in rows:
        cells = [row.get(name) for name in columns]
        table.add_row(*("" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=180).print(table)
    sums = {name: sum(row.get(name) or 0 for row in rows) for name in columns[1:-1] if name != "tau"}
    print(json.dumps({"sums": sums, "rows": rows}))
    if options.json:
        Path(options.json).write_text(json.dumps({"sums": sums, "rows": rows}, indent=1), encoding="utf-8")
    wrong = sums["different"] or sums["near_tie"] or sums["mismatch"] or any(row.get("failed") for row in rows)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
