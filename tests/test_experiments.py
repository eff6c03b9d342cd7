"""The shipped experiments: they say what the paper's table says, name themselves, and tables name rows that exist."""

import functools
from dataclasses import replace

import pytest
import yaml

from subspec.config.help_text import options
from subspec.config.schema import HubTargetConfig, PlantedTargetConfig, Source
from subspec.sweeps.command_line import is_table
from subspec.utils.paths import conf_dir
from tests.config.test_config import validated

FOLDER = conf_dir() / "experiment"
NAMES = [name for name, _ in options(conf_dir(), "experiment")]
TABLES = [name for name in NAMES if is_table(name)]
ROWS = [name for name in NAMES if name not in TABLES and not name.endswith("settings")]

PAPER = {
    "llama3_1_8b_plain": ("none", None, 8),
    "qwen2_5_7b_plain": ("none", None, 8),
    "qwen2_5_14b_plain": ("none", None, 12),
    "qwen2_5_32b_plain": ("none", None, 24),
    "llama3_1_8b_small_model": ("meta-llama/Llama-3.2-1B-Instruct", (1.0, 32, 6), 8),
    "qwen2_5_7b_small_model": ("Qwen/Qwen2.5-1.5B-Instruct", (1.0, 32, 6), 8),
    "qwen2_5_14b_small_model": ("Qwen/Qwen2.5-1.5B-Instruct", (1.0, 32, 6), 12),
    "qwen2_5_32b_small_model": ("Qwen/Qwen2.5-1.5B-Instruct", (1.0, 32, 6), 24),
    "qwen2_5_32b_7b": ("Qwen/Qwen2.5-7B-Instruct", (1.0, 32, 6), 24),
    "llama3_1_8b_eagle2": ("yuhuili/EAGLE-LLaMA3.1-Instruct-8B", (1.0, 6, 10), 8),
    "qwen2_5_7b_eagle2": ("leptonai/EAGLE-Qwen2.5-7B-Instruct", (1.0, 6, 10), 8),
    "llama3_1_8b_subspec": ("subspec", (0.2, 48, 6), 8),
    "qwen2_5_7b_subspec": ("subspec", (0.2, 48, 6), 8),
    "qwen2_5_14b_subspec": ("subspec", (0.2, 48, 6), 12),
    "qwen2_5_32b_subspec": ("subspec", (0.2, 48, 6), 24),
}
"""Rows of the paper: draft, (temperature, depth, K), GiB."""


@functools.cache
def experiment(name):
    return validated(f"experiment={name}")


def rows_of(table):
    """The experiments that a table runs."""
    params = yaml.safe_load((FOLDER / f"{table}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return [row.strip() for row in params["experiment"].split(",")]


@pytest.mark.parametrize("row", PAPER)
def test_the_rows_of_the_paper(row):
    config = experiment(f"paper/{row}")
    draft, shape, gib = PAPER[row]
    assert isinstance(config.target, HubTargetConfig)
    assert row.startswith(config.target.name)
    assert (getattr(config.draft, "path", None) or config.draft.name) == draft
    if shape:
        assert (config.draft.temperature, config.tree.depth, config.tree.width) == shape
    assert (config.offload.name, config.offload.vram_gib) == ("stream_uncoded", gib)  # as the paper streams
    assert (config.seed, config.warmup) == (0, 3 if shape else 1)
    decoding = config.decoding
    assert (decoding.name, decoding.max_new_tokens) == ("greedy", None)
    assert (decoding.max_length, decoding.prefill_chunk) == (2048, 256)
    assert config.benchmark.max_samples == 20
    if draft == "subspec":
        quant = config.quant
        assert (quant.name, quant.bits, quant.group_size, quant.axis) == ("hqq", 4, 64, 1)


def test_no_row_of_the_paper_is_left_out():
    assert {f"paper/{row}" for row in PAPER} == {name for name in ROWS if name.startswith("paper/")}


@pytest.mark.parametrize("name", ROWS)
def test_an_experiment_names_itself_and_its_command(name):
    assert experiment(name).experiment == name
    assert f"# python -m subspec.run experiment={name}\n" in (FOLDER / f"{name}.yaml").read_text()
    if name.startswith("planted/"):
        needs_no_hub(experiment(name))


def needs_no_hub(config):
    assert isinstance(config.target, PlantedTargetConfig)
    assert config.benchmark.source is Source.sample
    path = getattr(config.draft, "path", None)
    assert path is None or path == "planted" or path.startswith("planted:")


def test_the_planted_table_has_every_method_of_the_papers():
    """For Qwen2.5-7B; rows of its own besides."""
    ours, theirs = (rows_of(f"{where}/table_main") for where in ("planted", "paper"))
    assert {row.replace("paper/", "planted/") for row in theirs if "qwen2_5_7b" in row} <= set(ours)


def same_but_for_the_path(draft):
    return replace(draft, path=None) if hasattr(draft, "path") else draft


@pytest.mark.parametrize("twin", [name for name in ROWS if name.startswith("paper/")])
def test_planted_twins_are_twins(twin):
    name = twin.replace("paper/", "planted/")
    ours, theirs = (experiment(each) for each in (name, twin))
    assert same_but_for_the_path(ours.draft) == same_but_for_the_path(theirs.draft)
    for part in ("tree", "offload", "quant", "warmup"):
        assert getattr(ours, part) == getattr(theirs, part)
    assert ours.target.name == f"planted_{theirs.target.name}"


@pytest.mark.parametrize("name", TABLES)
def test_tables_name_rows_and_benchmarks_that_exist(name):
    experiment(name)
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"# python -m subspec.run experiment={name}\n" in text
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    rows = rows_of(name)
    assert set(rows) <= set(ROWS)
    assert len(set(rows)) == len(rows)
    assert set(params["benchmark"].split(",")) <= {option for option, _ in options(conf_dir(), "benchmark")}


def test_there_are_tables_with_and_without_a_hub():
    assert {"paper/table_main", "planted/table_main", "planted/table_tiny"} <= set(TABLES)
