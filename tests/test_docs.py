"""The pages in docs/: what they show as code is applied to a copy of the project and run, what they quote exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cli import ROOT, records_of, summary_of
from tests.helpers.tiny import tiny_checkpoint

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(\w+)\n# ((?:subspec|conf)/\S+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^python -m subspec\.run (.+)$", re.MULTILINE)

SMALL = ["device=cpu", "logger=none", "benchmark.source=sample", "benchmark.max_samples=1", "warmup=0"]
SMALL += ["decoding.max_new_tokens=12", "decoding.max_length=1024", "audit=true"]


def extended(folder: Path) -> Path:
    """A copy of the project with every block of docs/extending.md in the file that it names."""
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    for part in ("subspec", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    blocks = BLOCK.findall(PAGES["extending.md"])
    assert len(blocks) >= 12
    for _, name, text in blocks:
        file = folder / name
        separator = "\n\n" if file.exists() else ""
        with file.open("a", encoding="utf-8") as out:
            out.write(separator + text)
    return folder


def run_each(project: Path, *commands: list[str]) -> subprocess.CompletedProcess:
    """Runs, one after the other, in one fresh process that imports the copy."""
    code = (
        "import json, sys, torch\nfrom subspec.run import main\ntorch.set_num_threads(1)\n"
        "for arguments in json.loads(sys.argv.pop()):\n"
        "    try:\n        main(arguments)\n"
        "    except SystemExit as stop:\n"
        "        if stop.code:\n            raise\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_extensions_work_as_written(tmp_path):
    project = extended(tmp_path / "project")
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "qwen2", max_positions=2048)
    shown = [shlex.split(arguments) for arguments in COMMAND.findall(PAGES["extending.md"])]
    assert len(shown) == 5
    named, lookup, rounding, plan, boolq = shown
    mine = [f"target.path={checkpoint}", *SMALL]
    ran = run_each(
        project,
        [*named, *mine, "tree.depth=2", "tree.width=2", f"run_dir={tmp_path / 'target'}"],
        [*lookup, "target=qwen2_5_3b", *mine, f"run_dir={tmp_path / 'lookup'}"],
        [*rounding, "target=planted_tiny", *SMALL, "tree.depth=4", f"run_dir={tmp_path / 'round'}"],
        [*plan, f"run_dir={tmp_path / 'plan'}"],
        [*boolq, "target=planted_tiny", "draft=none", *SMALL, f"run_dir={tmp_path / 'boolq'}"],
        ["target=planted_qwen2_5_3b", "plan_only=true", "offload=stream", "offload.card='RTX 4090'"]
        + ["offload.vram_gib=6", f"run_dir={tmp_path / 'shape'}"],
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]

    assert records_of(tmp_path / "target")[0]["target"] == "qwen2_5_3b"
    for name, draft in {"target": "subspec", "lookup": "lookup", "round": "subspec", "boolq": "none"}.items():
        (record,) = records_of(tmp_path / name)
        assert record["draft"] == draft
        assert record["audit"]["exact"] == record["new_tokens"] == 12, name
    assert records_of(tmp_path / "boolq")[0]["sample_id"].startswith("boolq/sample-")
    assert summary_of(tmp_path / "lookup")["totals"]["drafted_by_depth"]
    assert summary_of(tmp_path / "round")["totals"]["tau"] > 2  # rounding that is wrong agrees on nothing
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("plan", "shape")]
    assert all(plan["streamed_layers"] and plan["headroom_bytes"] >= 0 for plan in plans)


def test_extensions_are_offered(tmp_path):
    project = extended(tmp_path)
    ran = run_each(project, ["--help"])
    assert ran.returncode == 0, ran.stderr
    for option in ("qwen2_5_3b", "lookup", "round", "boolq"):
        assert re.search(rf"\b{option}\b", ran.stdout), option


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES), "experiments/README.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (file.parent / link).exists(), link
