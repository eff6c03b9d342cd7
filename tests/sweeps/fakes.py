"""Jobs that take a fraction of a second: a process that prints, writes records and ends as told."""

import json
import sys
from pathlib import Path

from subspec.sweeps.process import JobSpec

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


def fake_job(folder: Path, ending: str = "ok", samples: int = 2, seconds: float = 0.0, device="cpu") -> JobSpec:
    """A job that does ``samples`` samples, waits, and ends: ``ok``, ``refused``, ``bug`` or ``killed``."""
    command = (sys.executable, "-c", SCRIPT, str(folder), str(samples), str(seconds), ending)
    return JobSpec(folder, command, samples, "tau", device)


def seen(folder: Path) -> dict:
    """What the fake job saw of its environment."""
    return json.loads((folder / "env.json").read_text())
