"""The scripts that print the tables of ``experiments``: from run folders, and the planner's, which needs none."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.report.runs import config_of, plain_run, turns, write_run

ROOT = Path(__file__).parents[1]


def module_of(file):
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drafts():
    return module_of(ROOT / "experiments" / "drafts" / "table.py")


@pytest.fixture(scope="module")
def quantizers():
    return module_of(ROOT / "experiments" / "quantizers" / "acceptance.py")


AUDIT = {"exact": 30, "near_tie": 0, "mismatch": 0, "max_gap": 0.0, "margin": 1e-3, "first_mismatch": None}


def same_text(records):
    """As if every draft had emitted the same tokens."""
    return [record | {"token_ids": [7, 8, 9], "audit": AUDIT} for record in records]


def test_a_row_per_draft_says_whether_its_tokens_are_plain_decodings(drafts, tmp_path, capsys):
    texts = same_text(turns([9.0, 9.0], draft="none", tau=1))
    plain = write_run(tmp_path / "plain", texts, config_of("none"))
    run = write_run(tmp_path / "eagle2", same_text(turns([9.0, 9.0], draft="eagle2")), config_of("eagle2"))
    assert drafts.main([plain, run]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == (
        "| eagle2, beam 3x2 | 2 | 3.00 | 3.00 | 1.00, 0.81 | identical, 6 of 6 | 60 exact, 0 near-ties, 0 mismatches |"
    )
    other = same_text(turns([9.0, 9.0], draft="eagle2"))
    other[1]["token_ids"] = [7, 8, 10]
    write_run(run, other, config_of("eagle2"))
    assert drafts.main([plain, run]) == 1
    assert "DIFFERENT in 1 of 2 turns" in capsys.readouterr().out


def test_the_shelf_has_a_row_per_draft_over_all_benchmarks(tmp_path, capsys):
    shelf = module_of(ROOT / "experiments" / "drafts" / "shelf.py")
    for draft, tau in (("none", 1), ("eagle2", 3)):
        for benchmark, count in (("gsm8k", 1), ("mt_bench", 2)):
            records = same_text(turns([9.0] * count, draft=draft, tau=tau))
            write_run(tmp_path / benchmark / draft, records, config_of(draft))
    assert shelf.main(tmp_path, []) == 0
    header, *_, line = capsys.readouterr().out.splitlines()
    assert "tau, gsm8k (turns) | tau, mt_bench (turns) | tau, all" in header
    cells = "| eagle2, beam 3x2 | 3.00 (1) | 3.00 (2) | 3.00 | 1.00, 0.81, 0.48 | identical, 9 of 9 |"
    assert line == cells
    records[1]["token_ids"] = [7, 8, 10]
    write_run(tmp_path / "mt_bench" / "eagle2", records, config_of("eagle2"))
    assert shelf.main(tmp_path, ["eagle2"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_a_run_that_goes_on_is_compared_as_far_as_it_came(drafts, tmp_path, capsys):
    plain = write_run(tmp_path / "plain", same_text(turns([9.0], draft="none", tau=1)), config_of("none"))
    records = same_text(turns([9.0, 9.0]))
    run = write_run(tmp_path / "run", records, finished=False)
    assert drafts.main([plain, run]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| 2 (unfinished) |" in line
    assert "identical, 3 of 3 (1 turns not compared)" in line


def test_bits_errors_acceptance_and_levels_meet_in_a_row(quantizers, tmp_path, capsys, monkeypatch):
    quant = {"name": "higgs", "bits": 3, "group_size": 256, "vector_dim": 2}
    run = write_run(tmp_path / "run", same_text(turns([9.0, 9.0])), config_of(quant=quant))
    monkeypatch.setattr(quantizers, "LEVELS", tmp_path / "levels.json")
    quantizers.main([run])
    *_, line = capsys.readouterr().out.splitlines()
    start = "| HIGGS | 3 | 256 | 2 | 3.078 | 0.1698 | 3.00 | 1.00 | 60 exact, 0 mismatches |"
    assert line == f"{start} not measured |"
    level = {"name": "HIGGS", "bits": 3, "group": 256, "dim": 2, "level_ms": 4.321}
    (tmp_path / "levels.json").write_text(json.dumps([level]))
    quantizers.main([run])
    assert capsys.readouterr().out.splitlines()[-1] == f"{start} 4.32 |"


def test_only_substitutes_are_rows_of_the_quantizers(quantizers, tmp_path):
    with pytest.raises(SystemExit, match="draft=none is no substitute"):
        quantizers.main([plain_run(tmp_path / "plain")])


# ------------------------------------------------------------------------------------------------- planner


@pytest.fixture(scope="module")
def planner():
    return module_of(ROOT / "experiments" / "planner" / "plans.py")


@pytest.fixture(scope="module")
def page():
    return (ROOT / "experiments" / "planner" / "README.md").read_text(encoding="utf-8")


def test_the_planners_page_shows_what_its_command_prints(planner, page):
    """Whole tables: a number that the command no longer prints is one too many."""
    assert "\n".join(planner.comparison()) in page
    for codec in planner.CODECS:
        assert f"offload.codec={codec.value}" in page
        assert f"\n{planner.in_full('qwen2_5_7b', codec)}\n" in page


def test_the_planner_tells_weights_as_they_are_from_coded_ones(planner):
    exact, coded = (planner.drafted("qwen2_5_7b", codec) for codec in planner.CODECS)
    assert (len(exact.resident_layers), len(coded.resident_layers)) == (5, 15)
    assert (exact.codec.value, coded.codec.value) == ("none", "substitute")
    assert coded.layer_bytes < exact.layer_bytes / 2
