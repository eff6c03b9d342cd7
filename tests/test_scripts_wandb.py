"""What ships for readers of Weights & Biases: the workspace's definition and the sweep's."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from subspec.config.checks import check_keys
from subspec.config.schema import to_config
from subspec.drafts.check_config import check_config
from subspec.records.metrics import LinkInfo, speedup, summarise
from subspec.runs.wandb_logger import SERIES, flat_summary
from tests.config.test_config import composed
from tests.helpers.records import record

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dashboard():
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "scripts" / "wandb_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_charts_name_what_runs_log(dashboard):
    summary = summarise([record(0, link=LinkInfo(50.0, 10**9), peak_vram_gib=7.0)])
    logged = flat_summary({**summary, "speedup": speedup(summary, summary, "itself")})
    assert set(dashboard.BARS.values()) <= set(logged)
    totals = {"total/tokens_per_s", "total/tau"}
    assert set(dashboard.LINES.values()) <= {*SERIES, *totals}
    assert {"context/planted", "context/source"} <= set(logged)


def test_without_the_package_the_script_says_what_to_do(dashboard, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["wandb_dashboard.py", "me"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        dashboard.main()
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "pip install wandb-workspaces" in out
    charts = (*dashboard.BARS.values(), *dashboard.LINES.values(), *dashboard.PICTURES)
    assert all(expected in out for expected in (*dashboard.GROUPS, *charts))
    assert "planted weights" in out


def test_the_workspace_is_grouped_by_experiment_and_method(dashboard):
    pytest.importorskip("wandb_workspaces")
    found = dashboard.workspace("me", "subspec")
    assert [key.name for key in found.runset_settings.groupby] == list(dashboard.GROUPS)
    assert [section.name for section in found.sections] == ["Totals", "By sample", "Each run"]


SWEEP = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text(encoding="utf-8"))


def agent_command(place: int) -> list[str]:
    """The command that ``wandb agent`` starts with the first (0) or last (-1) value of every parameter."""

    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    def value(how):
        return (how.get("values") or ([how["value"]] if "value" in how else [how["min"], how["max"]]))[place]

    values = {name: {"value": value(how)} for name, how in SWEEP["parameters"].items()}
    macros = create_sweep_command_args({"args": values})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [SWEEP.get("program", "")]}
    words: list[str] = []
    for chunk in create_sweep_command(list(SWEEP["command"])):
        name = str(chunk)[2:-1] if str(chunk).startswith("${") else None
        words += macros[name] if name in macros else [str(chunk)]
    return words


@pytest.mark.parametrize("place", [0, -1])
def test_what_an_agent_of_the_sweep_starts_composes(place):
    words = agent_command(place)
    start = words.index("subspec.run")
    assert words[start - 1] == "-m"
    cfg = composed(*words[start + 1 :])
    check_keys(cfg)
    check_config(to_config(cfg))


def test_the_metric_of_the_sweep_is_one_that_runs_report():
    assert SWEEP["metric"] == {"name": "tokens_per_s", "goal": "maximize"}
    assert SWEEP["metric"]["name"] in SERIES
