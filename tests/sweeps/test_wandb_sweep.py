"""The shipped W&B sweep file: the command line that an agent builds from it is one that a run takes."""

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from subspec.config.checks import check_keys
from subspec.config.schema import to_config
from subspec.drafts.check_config import check_config
from subspec.runs.wandb_logger import SERIES
from tests.config.test_config import composed
from tests.helpers.cli import ROOT

FILE = ROOT / "scripts" / "wandb_sweep.yaml"


def agent_command(pick) -> list[str]:
    """What ``wandb agent`` would start. ``pick``: chooses a value of a parameter."""
    sweep = yaml.safe_load(FILE.read_text())
    values = {name: {"value": pick(how)} for name, how in sweep["parameters"].items()}
    macros = create_sweep_command_args({"args": values})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep.get("program", "")]}
    words: list[str] = []
    for chunk in create_sweep_command(list(sweep["command"])):
        name = str(chunk)[2:-1] if str(chunk).startswith("${") else None
        words += macros[name] if name in macros else [str(chunk)]
    return words


def candidates(how: dict) -> list:
    if "values" in how:
        return how["values"]
    return [how["value"]] if "value" in how else [how["min"], how["max"]]


@pytest.mark.parametrize("place", [0, -1])
def test_what_an_agent_starts_composes(place):
    words = agent_command(lambda how: candidates(how)[place])
    start = words.index("subspec.run")
    assert words[start - 1] == "-m"
    cfg = composed(*words[start + 1 :])
    check_keys(cfg)
    check_config(to_config(cfg))


def test_the_metric_is_one_that_runs_report():
    sweep = yaml.safe_load(FILE.read_text())
    assert sweep["metric"]["name"] in SERIES
    assert sweep["metric"]["goal"] == "maximize"
