"""What ships for readers of Weights & Biases: the workspace's definition and the sweep's."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from subspec.config.schema import register_schemas, to_config
from subspec.drafts.check_config import check_config
from subspec.records.metrics import summarise
from subspec.runs.wandb_logger import SERIES, flat_summary
from tests.helpers.records import record

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dashboard():
    spec = importlib.util.spec_from_file_location("dashboard", ROOT / "scripts" / "wandb_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_charts_name_what_runs_log(dashboard):
    from subspec.records.metrics import LinkInfo, speedup

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
    for expected in (
        *dashboard.GROUPS,
        *dashboard.BARS.values(),
        *dashboard.LINES.values(),
        *dashboard.PICTURES,
    ):
        assert expected in out
    assert "planted weights" in out


def test_the_workspace_is_grouped_by_experiment_and_method(dashboard):
    pytest.importorskip("wandb_workspaces")
    found = dashboard.workspace("me", "subspec")
    assert [key.name for key in found.runset_settings.groupby] == list(dashboard.GROUPS)
    assert [section.name for section in found.sections] == ["Totals", "By sample", "Each run"]


def test_every_setting_of_the_sweep_composes():
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text(encoding="utf-8"))
    assert sweep["metric"] == {"name": "tokens_per_s", "goal": "maximize"}
    assert sweep["command"][-2:] == ["subspec.run", "${args_no_hyphens}"]
    choices = {key: one.get("values", [one.get("value")]) for key, one in sweep["parameters"].items()}
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for end in (0, -1):
            overrides = [f"{key}={values[end]}" for key, values in choices.items()]
            assert all(re.fullmatch(r"[\w.]+=[\w.]+", override) for override in overrides)
            check_config(to_config(compose("config", [*overrides, "run_dir=somewhere"])))
