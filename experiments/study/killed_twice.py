"""Kill a sweep twice at random moments, finish it, and compare its records with an undisturbed sweep's.

    python experiments/study/killed_twice.py UNDISTURBED KILLED [--seed 0]

UNDISTURBED: folder of the finished sweep; the same command is run again in KILLED. First the sweep itself, then one of
its jobs gets SIGKILL, each at a random moment; then the command is given until nothing is missing.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

TIMES = {"timestamp", "prefill_s", "decode_s", "draft_s", "verify_s", "tokens_per_s", "tokens_per_s_total"}
TIMES |= {"peak_ram_gib"}
"""Fields of a record that differ between two runs of the same configuration on a CPU."""

ATTEMPTS = 3


def records(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    """Records without times, by the job's folder."""
    found = {}
    for file in sorted(sweep.glob("*/records.jsonl")):
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found[file.parent.name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return found


def written(sweep: Path) -> int:
    """Whole records so far."""
    return sum(file.read_bytes().count(b"\n") for file in sweep.glob("*/records.jsonl"))


def start(command: list[str]) -> subprocess.Popen:
    """The sweep as a process."""
    return subprocess.Popen([sys.executable, "-m", "subspec.run", *command])


def wait_for(sweep: Path, count: int, process: subprocess.Popen) -> None:
    """Until the sweep holds ``count`` records."""
    while written(sweep) < count:
        if process.poll() is not None:
            sys.exit(f"the sweep ended by itself with status {process.returncode}")
        time.sleep(0.1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("killed", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    manifest = json.loads((options.undisturbed / "sweep.json").read_text(encoding="utf-8"))
    command = ["-m", *manifest["command"], f"sweep_dir={options.killed}"]
    expected = records(options.undisturbed)
    turns = sum(map(len, expected.values()))
    first, second = sorted(chance.sample(range(1, turns - 1), 2))

    sweep = start(command)
    wait_for(options.killed, first, sweep)
    time.sleep(chance.uniform(0, 5))
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    print(f"-- SIGKILL to the sweep, with {written(options.killed)} of {turns} records written", flush=True)

    sweep = start(command)
    wait_for(options.killed, second, sweep)
    time.sleep(chance.uniform(0, 5))
    jobs = [child for child in psutil.Process(sweep.pid).children() if "subspec.cli.job" in child.cmdline()]
    jobs[0].kill()
    print(f"-- SIGKILL to a job, with {written(options.killed)} of {turns} records written", flush=True)
    print(f"-- the sweep ended with status {sweep.wait()}", flush=True)

    for _ in range(ATTEMPTS):
        status = start(command).wait()
        print(f"-- given again: status {status}", flush=True)
        if status == 0:
            break
    found = records(options.killed)
    same = found == expected
    print(f"-- {sum(map(len, found.values()))} records, {turns} undisturbed: {'equal' if same else 'DIFFERENT'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
