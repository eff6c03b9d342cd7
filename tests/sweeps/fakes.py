"""Jobs that take a fraction of a second: a process that prints, writes records and ends as told."""

import io
import sys
from pathlib import Path

from subspec.runs.console import RunConsole
from subspec.sweeps.process import JobProcess
from subspec.sweeps.progress import SweepProgress

SCRIPT = """
import json, os, signal, sys, time
folder, samples, then, ending = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with open(f"{folder}/env.json", "w") as file:
    json.dump({"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}, file)
for index in range(samples):
    record = {"sample_id": f"s{index}", "turn": 0, "verified_tokens": 30, "iterations": 3, "decode_s": 2.0}
    with open(f"{folder}/records.jsonl", "a") as file:
        print(json.dumps(record), file=file)
    print(f"[{index + 1}/{samples}] s{index}  30 tokens", flush=True)
try:
    time.sleep(then)
except KeyboardInterrupt:
    print("error: interrupted: finished samples are kept", file=sys.stderr)
    sys.exit(130)
if ending == "ok":
    with open(f"{folder}/summary.json", "w") as file:
        counts = {"turns": samples, "skipped": {}}
        json.dump({"totals": {"tokens_per_s": 15.0, "tau": 10.0}, "counts": counts}, file)
elif ending == "refused":
    print("error: offload.vram_gib=1 cannot hold this run", file=sys.stderr)
    sys.exit(2)
elif ending == "bug":
    raise ValueError("an unexpected thing")
elif ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fake_job(folder: Path, ending: str = "ok", samples: int = 2, seconds: float = 0.0, label: str = "") -> JobProcess:
    """A job that does ``samples`` samples, waits, and ends: ``ok``, ``refused``, ``bug`` or ``killed``."""
    command = (sys.executable, "-c", SCRIPT, str(folder), str(samples), str(seconds), ending)
    return JobProcess(folder, command, samples, "tau", "cpu", label)


def started(folder: Path, ending: str = "ok", samples: int = 2, seconds: float = 0.0) -> JobProcess:
    """The same, running."""
    job = fake_job(folder, ending, samples, seconds)
    job.start()
    return job


def sweep_progress(total: int = 1, finished: int = 0, width: int | None = None) -> tuple[SweepProgress, io.StringIO]:
    """A display, and what it prints."""
    out = io.StringIO()
    return SweepProgress(total, finished, RunConsole(file=out, width=width)), out
