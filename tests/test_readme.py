"""The README's commands exist, and those of the pages behind it: every example composes, and the two set-up commands
name what is there. What docs/extending.md adds is run by test_docs.py."""

import re
import shlex
from pathlib import Path

import pytest

from subspec.config.help_text import GROUPS, options
from subspec.utils.paths import conf_dir
from tests.helpers.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md") if file.stem != "extending"]
SHOWN = "\n".join([README, *PAGES])
COMMANDS = re.findall(r"python -m subspec\.run([^\n#`&]*)", SHOWN)
assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", sorted({command.strip() for command in COMMANDS}))
def test_every_example_composes(command):
    arguments = [a for a in shlex.split(command) if a not in ("-m", "...")]
    # A multirun composes each combination; the first one of each list will do here.
    first = [re.sub(r"^(\w+=)([^\[,]+),.*", r"\1\2", argument) for argument in arguments]
    ran = cli(*first, *(["--cfg", "job"] if "--help" not in first else []))
    assert ran.code == 0, ran.err


def commands_of(module):
    found = re.findall(rf"python -m {module}([^\n#`&]*)", SHOWN)
    return [arguments for arguments in map(shlex.split, found) if arguments]


def test_every_prediction_and_report_is_understood():
    from subspec.cli.predict import parse as parse_prediction
    from subspec.cli.predict_inputs import compose, named_gpu
    from subspec.report.__main__ import parse as parse_report

    predictions, reports = commands_of("subspec.predict"), commands_of("subspec.report")
    assert min(len(predictions), len(reports)) >= 2
    for arguments in predictions:
        asked = parse_prediction(arguments)
        assert compose(asked, named_gpu(asked)).offload.name == "stream"
    assert all(parse_report(arguments).folders for arguments in reports)


def test_the_table_of_groups_names_every_option():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, re.MULTILINE))
    for group in GROUPS:
        named = set(re.findall(r"`(\w+)`", rows[group]))
        assert named == {name for name, _ in options(conf_dir(), group)} or group == "experiment"


def test_the_set_up_commands_use_the_constraints():
    commands = re.findall(r"^python3 -m venv.*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert all("-c constraints.txt" in command for command in commands)
    assert "draft=subspec quant=hqq benchmark=gsm8k" in commands[0]
    assert "pytest" in commands[1]


def test_the_library_example_runs(tmp_path, monkeypatch, capsys):
    from tests.helpers.tiny import tiny_checkpoint

    tiny_checkpoint(tmp_path / "FOLDER", "llama")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"\d+ passes for \d+ tokens", capsys.readouterr().out)
