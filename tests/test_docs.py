"""The pages in docs/: their code is applied to a copy of the project and run; what they quote exists."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from subspec.runs.turn import PROMPT_TOO_LONG
from tests.helpers.cli import ROOT, cli, records_of, summary_of
from tests.helpers.forked import run_forked
from tests.helpers.tiny import tiny_checkpoint
from tests.test_import_order import ORDER

PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"```(\w+)\n# ((?:subspec|conf)/\S+)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^python -m subspec\.run (.+)$", re.MULTILINE)

SMALL = ["device=cpu", "logger=none", "benchmark.source=sample", "benchmark.max_samples=1", "warmup=0"]
SMALL += ["decoding.max_new_tokens=12", "decoding.max_length=1024", "audit=true"]
PLAN = ["target=planted_qwen2_5_7b", "offload=stream", "offload.card='RTX 4090'"]


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


RUNS = """
import os, torch
from hydra import compose, initialize_config_dir
from subspec.cli.run import main
for arguments in RUNS:
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code:
            raise

# The whole way of offload=stream, on the CPU; levels of a substitute are too slow there to draft many.
from subspec.config.schema import to_config
from subspec.decoding.engine import Engine
from subspec.planning.plan import plan_run
from subspec.session import assemble_streamed
from subspec.targets import open_source
cpu, prompt = torch.device("cpu"), [5, 6, 7, 5, 6, 7, 5, 6]
for arguments in STREAMED:
    with initialize_config_dir(os.path.abspath("conf"), version_base="1.3"):
        config = to_config(compose("config", arguments))
    source = open_source(config.target, torch.bfloat16, cpu)
    plan = plan_run(config, source.config, link_gb_per_s=25.0, host_free=None, device=None)
    assembly = assemble_streamed(config, source, plan, cpu)
    if assembly.quant is None:
        drafted = assembly.engine.generate(prompt, max_new_tokens=12)
        plain = Engine(assembly.engine.target, max_length=64).generate(prompt, max_new_tokens=12)
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.drafted_nodes > 0
    else:
        assert assembly.quant.bits_per_weight < 5
    assembly.close()
"""


def test_extensions_work_as_written(tmp_path):
    project = extended(tmp_path / "project")
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "qwen2", max_positions=2048)
    shown = [shlex.split(arguments) for arguments in COMMAND.findall(PAGES["extending.md"])]
    assert len(shown) == 7
    named, lookup, lookup_plan, confident, rounding, rounding_plan, boolq = shown
    mine, tiny = [f"target.path={checkpoint}", *SMALL], ["target=planted_tiny", *SMALL]
    plans = {"lookup_plan": lookup_plan, "round_plan": rounding_plan}
    stream = ["target=planted_tiny_tied", "offload=stream", "offload.vram_gib=1", "offload.resident_layers=1"]
    stream += ["offload.codec=none"]
    stream += ["decoding.max_length=64", "tree.depth=5", "run_dir=x"]
    runs = [
        ["--help"],
        [*named, *mine, "tree.depth=2", "tree.width=2", f"run_dir={tmp_path / 'target'}"],
        [*lookup, "target=qwen2_5_3b", *mine, f"run_dir={tmp_path / 'lookup'}"],
        [*confident, *tiny, "tree.depth=8", f"run_dir={tmp_path / 'confident'}"],
        [*rounding, *tiny, "tree.depth=4", f"run_dir={tmp_path / 'round'}"],
        [*boolq, *tiny, "draft=none", f"run_dir={tmp_path / 'boolq'}"],
        *([*plan, f"run_dir={tmp_path / name}"] for name, plan in plans.items()),
    ]
    streamed = [[*lookup[:2], "tree=confident", *stream], ["quant=round", *stream]]
    given = f"RUNS, STREAMED = {runs!r}, {streamed!r}"
    ran = run_forked(project, given + RUNS, project, SUBSPEC_CACHE=str(project / "cache"))
    assert ran.code == 0, ran.out[-2000:] + ran.err[-2000:]

    for option in ("qwen2_5_3b", "lookup", "confident", "round", "boolq"):
        assert re.search(rf"\b{option}\b", ran.out), option
    assert records_of(tmp_path / "target")[0]["target"] == "qwen2_5_3b"
    drafts = {"target": "subspec", "lookup": "lookup", "confident": "subspec", "round": "subspec", "boolq": "none"}
    for name, draft in drafts.items():
        (record,) = records_of(tmp_path / name)
        assert record["draft"] == draft
        assert record["audit"]["exact"] == record["new_tokens"] == 12, name
    assert records_of(tmp_path / "boolq")[0]["sample_id"].startswith("boolq/sample-")
    assert summary_of(tmp_path / "lookup")["totals"]["drafted_by_depth"]
    assert summary_of(tmp_path / "round")["totals"]["tau"] > 2  # rounding that is wrong agrees on nothing
    for name in plans:
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        assert plan["streamed_layers"], name
        assert plan["headroom_bytes"] >= 0, name


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES), "experiments/README.md"])
def test_links_lead_somewhere(page):
    file = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (file.parent / link).exists(), link


def test_the_packages_are_listed_in_the_order_of_imports():
    rows = re.findall(r"^\| `(\w+)` \| ", PAGES["architecture.md"], re.MULTILINE)
    assert tuple(rows) == ORDER


# ------------------------------------------------------------------------------------- quoted messages


VARIES = "\0"


def templates() -> list[str]:
    """Every string of the source, with ``VARIES`` where an f-string has a value."""
    found = []
    for file in sorted((ROOT / "subspec").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.append(node.value)
    return found


def quoted(page: str) -> list[str]:
    """The first column of the tables of messages."""
    rows = re.findall(r"^\| (`.+?`)(?: \(a note\))? \| ", page, re.MULTILINE)
    return [row.strip("`") for row in rows]


def occurs(message: str, known: list[str]) -> bool:
    """Whether one string of the source matches ``message``, whose ``...`` stand for values."""
    parts = message.split("...")
    pattern = re.compile(rf"{VARIES}?[^{VARIES}]*?".join(map(re.escape, parts)))
    longest = max(parts, key=len)  # a search for it is much faster than the pattern
    return any(longest in text and pattern.search(text) for text in known)


def test_every_quoted_message_exists():
    known = templates()
    messages = quoted(PAGES["troubleshooting.md"])
    assert len(messages) > 30
    assert [message for message in messages if not occurs(message, known)] == []
    assert not occurs("offload.vram_gib=... holds this run", known)


def test_where_the_pages_place_a_function_it_is():
    """``name`` (``subspec/file.py``): the sentence before says who registers, builds or holds it."""
    for page in PAGES.values():
        for name, file in re.findall(r"`(\w+)`\s\(`(subspec/[\w/]+\.py)`\)", page):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", text, re.MULTILINE), (name, file)


# ------------------------------------------------------------------------------------------- outputs


def test_the_record_is_described_field_by_field(tmp_path):
    ran = cli("experiment=smoke", "audit=true", f"run_dir={tmp_path}", "logger=none")
    assert ran.code == 0, ran.err
    record = records_of(tmp_path)[0]
    page = PAGES["outputs.md"]
    section = page[page.index("## A record") : page.index("## The summary")]
    table = re.findall(r"^\| (`.+?) \| ", section, re.MULTILINE)
    described = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert described == set(record)
    assert set(re.findall(r"`(\w+)`", section[section.index("| `audit`") :].split("\n")[0])) >= set(record["audit"])
    assert f"`skipped` with a `reason` (`{PROMPT_TOO_LONG}`)" in section
    files = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    named = set(re.findall(r"`([\w.]+)`", page[: page.index("## A record")]))
    assert files <= named


def test_the_plan_is_described(tmp_path):
    folder = tmp_path / "plan"
    assert cli("plan_only=true", *PLAN, f"run_dir={folder}").code == 0
    plan = json.loads((folder / "plan.json").read_text())
    page = PAGES["outputs.md"]
    section = page[page.index("## The plan") : page.index("## A sweep's folder")]
    named = set(re.findall(r"`(\w+)`", section)) - {"peak_vram_gib", "device_vram_gib"}
    assert named <= set(plan), named - set(plan)
