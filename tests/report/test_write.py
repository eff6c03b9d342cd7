"""The whole report, as a user and as a sweep ask for it."""

import re

import pandas as pd
import pytest

from subspec.errors import SubspecError
from subspec.records.outcome import Outcome, write_outcome
from subspec.records.sweep_folder import SweepFolder
from subspec.report import write_report

from .runs import config_of, plain_run, refusal, run, turns, write_run


@pytest.fixture(autouse=True)
def _empty_pictures(monkeypatch, request):
    """Pictures are files without content, except in the test that reads them: saving them takes seconds."""

    def save(figure, stem):
        files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
        for file in files:
            file.touch()
        return files

    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr("subspec.report.write.save", save)


@pytest.fixture
def real_pictures():
    """Keep the pictures."""


@pytest.fixture
def sweep(tmp_path):
    """Plain decoding and a substitute on planted weights and sample prompts, and a run that has not finished."""
    options = {"planted": True, "source": "sample"}
    plain_run(tmp_path / "sweep" / "0", **options)
    write_run(tmp_path / "sweep" / "1", turns([30.0, 20.0, 24.0], **options))
    tree = {"name": "chain", "depth": 8}
    unfinished = write_run(tmp_path / "sweep" / "2", turns([5.0], **options), config_of(tree=tree), finished=False)
    with (unfinished / "records.jsonl").open("a") as file:
        file.write('{"sample_id": "s1", "tu')
    return tmp_path / "sweep"


@pytest.fixture
def written(tmp_path):
    """Writes a report; returns it and its page."""

    def write(*folders, baseline=None):
        report = write_report(folders, tmp_path / "out", baseline)
        return report, report.page.read_text(encoding="utf-8")

    return write


def table(report, name):
    """A CSV table of a report."""
    return pd.read_csv(report.folder / f"{name}.csv")


def test_a_partial_sweep(sweep, written, tmp_path):
    report, page = written(sweep, baseline="none")
    assert report.folder == tmp_path / "out"
    assert [file.name for file in report.tables] == ["methods.csv", "acceptance.csv", "runs.csv"]
    assert page.startswith("# Report (planted weights and sample prompts)")
    for said in (
        *("> **Planted weights: ", "> **Packaged sample prompts, not the benchmark"),
        *("3 runs (2 finished, 1 unfinished) in 3 rows.", "1 of 3 runs are unfinished"),
        *("1 damaged record line(s) are left out", "sweep/2: 1 damaged line(s)"),
        *("`draft=subspec quant.bits=4`", "torch=2.0", "a CPU, 2 thread(s)", "f" * 12),
    ):
        assert said in page
    rows = re.findall(r"^\| (?:plain|subspec).*$", page, re.MULTILINE)
    assert len(rows) == 3
    assert all("**PLANTED**" in row and "*sample prompts*" in row for row in rows)
    assert sum("(1 unfinished)" in row for row in rows) == 1


def test_a_planted_draft_that_is_no_substitute_is_not_called_noise(sweep, written):
    assert "means nothing" not in written(sweep)[1]
    records = turns([30.0, 20.0], draft="small_model", planted=True, source="sample")
    write_run(sweep / "3", records, config_of("small_model"))
    where = "Rows: some_target with draft small_model"
    assert re.search(rf"> \*\*Planted weights: .*means nothing\.\*\* {where}\.", written(sweep)[1])


def test_jobs_that_left_no_run_are_named(sweep, written):
    jobs = [([f"seed={seed}"], {"seed": seed}) for seed in range(5)]
    with SweepFolder.open(sweep, []) as folder:  # 0, 1 and 2 lie there already: these are 3 to 7
        numbers = [job.number for job in folder.assign(jobs)]
    for number in numbers[:3]:
        (sweep / str(number)).mkdir()
        write_outcome(sweep / str(number), Outcome("failed", 2, "offload.vram_gib=1 cannot hold this run"))
    write_outcome(sweep / str(numbers[1]), Outcome("ok", 0))
    report, page = written(sweep, sweep / "3")
    assert [note for note in report.notes if "job" in note] == [
        "sweep: 2 of 5 jobs have not been started",
        "sweep/3: its job failed: offload.vram_gib=1 cannot hold this run",
        "sweep/5: its job failed: offload.vram_gib=1 cannot hold this run",
    ]
    assert "- sweep/5: its job failed" in page
    with pytest.raises(SubspecError, match=r"no run below .*3: .*\(3: its job failed: offload\.vram_gib=1 "):
        written(sweep / "3")


def test_the_tables_hold_what_the_records_say(sweep, written):
    report, _ = written(sweep)
    methods = table(report, "methods").set_index("method")
    ours, plain = methods.loc["subspec hqq4, beam 3x2"], methods.loc["plain decoding"]
    tokens, speeds = [30, 33, 36], [30.0, 20.0, 24.0]
    total = sum(tokens) / sum(count / speed for count, speed in zip(tokens, speeds, strict=True))
    assert ours.tokens_per_s == pytest.approx(total)
    assert ours.tokens_per_s_mean == pytest.approx(sum(speeds) / 3)
    assert (ours.tau, ours.peak_ram_gib) == (3.0, 3.0)
    assert ours.speedup == pytest.approx(total / plain.tokens_per_s)
    assert ours.speedup_low <= ours.speedup <= ours.speedup_high
    assert (ours.speedup_paired, ours.planted_weights, ours.sample_prompts) == (True, True, True)
    assert pd.isna(plain.speedup)
    assert plain.baseline == "plain decoding"
    curves = table(report, "acceptance").set_index("method")
    assert list(curves.loc[ours.name].accept_rate) == pytest.approx([1.0, 27 / 33, 16 / 33])
    runs = table(report, "runs")
    assert list(runs.state) == ["finished", "finished", "unfinished"]
    assert list(runs.damaged_lines) == [0, 0, 1]
    assert set(runs.config_digest.str.len()) == {20}
    assert runs.config_digest.is_unique


def test_accuracy_texts_and_the_baseline_are_told(tmp_path, written):
    facts = {"dtype": "bfloat16", "device": "cuda:0", "bitwise": {"on": True}, "resident_layers": [*range(11)]}
    facts |= {"streamed_bytes_per_pass": 2**30, "captured_passes": False}
    for draft, tau in (("none", 1), ("subspec", 3), ("eagle2", 3)):
        records = turns([30.0, 20.0, 24.0], draft=draft, tau=tau, correct=True, reference="7")
        records[0]["correct"], records[1]["correct"] = False, None  # wrong, and cut before an answer
        for one in records:
            one["token_ids"] = [1, 2 + (draft == "eagle2" and one["sample_id"] == "s2")]
        write_run(tmp_path / draft, records, config_of(draft), facts=facts)
    report, page = written(tmp_path)
    assert page.count("| 1 of 2 (50 %), 1 cut |") == 3
    for said in (
        "- Baseline plain decoding: bfloat16, batch-invariant kernels, passes launched kernel by kernel, 11 layers on",
        "1.00 GiB of plain weights streamed per pass.",
        "subspec hqq4, beam 3x2: the same text as plain decoding in all 3 turns, and so the same accuracy.",
    ):
        assert said in page
    assert re.search(r"eagle2, .*another text than plain decoding in 1 of 3 turns\*\*: s2 turn 0 \(`.*compare ", page)
    assert "#### By category" not in page
    assert "share of roofline |" not in page, "a column without figures"
    row = table(report, "methods").set_index("draft").loc["eagle2"]
    assert (row.turns_with_baseline_text, row.turns_with_other_text) == (2, 1)
    assert (row.accuracy, row.checked, row.unfinished, row.ttft_s_mean) == (0.5, 2, 1, 0.5)
    assert 0 < row.block_p50_s <= row.block_p99_s


def test_categories_and_accepted_lengths_have_tables(tmp_path, written):
    for draft, tau in (("none", 1), ("subspec", 3)):
        records = turns([30.0, 20.0, 24.0], draft=draft, tau=tau, benchmark="spec_bench", category="rag")
        records[0]["category"] = "stem"
        write_run(tmp_path / draft, records, config_of(draft))
    report, page = written(tmp_path)
    method = "| `subspec hqq4, beam 3x2` |"
    for said in (
        "| tau | multi-turn | rag | Overall |",
        f"| speed-up | multi-turn | rag | Overall |\n|---|---:|---:|---:|\n{method} 1.00x |",
        f"{method} 1.00 / 1.00 | 0.818 / 0.818 | 0.485 / 0.593 |",
        f"{method} 0.0 % | 18.2 % | 33.3 % | 48.5 % |",
    ):
        assert said in page
    assert "| correct |" not in page
    assert list(table(report, "categories").category) == ["multi-turn", "rag", "Overall"] * 2
    assert {"tau_by_category", "speedup_by_category", "accepted_lengths"} <= set(report.plots)
    for draft in ("none", "subspec"):
        write_run(tmp_path / draft, turns([30.0], draft=draft), config_of(draft))
    written(tmp_path)
    assert not (tmp_path / "out" / "categories.csv").exists()


def test_folders_are_named_from_where_one_stands(sweep, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report, page = written(sweep)
    assert list(table(report, "runs").folder) == ["sweep/0", "sweep/1", "sweep/2"]
    assert str(tmp_path) not in page


def test_every_picture_on_the_page_is_there(sweep, written, tmp_path, real_pictures):
    report, page = written(sweep)
    named = re.findall(r"\]\((plots/[^)]+)\)", page)
    assert len(named) == 2 * len(report.plots)
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in named)
    assert "- roofline: no run streams weights" in page


def test_a_report_is_replaced_with_what_it_no_longer_has(sweep, written, tmp_path):
    written(sweep)
    assert (tmp_path / "out" / "plots" / "acceptance.png").exists()
    assert "plots/acceptance" not in written(sweep / "0")[1]
    assert not (tmp_path / "out" / "plots" / "acceptance.png").exists()


def test_a_sweep_that_has_only_begun(tmp_path, written):
    write_run(tmp_path / "0", [], finished=False)
    report, page = written(tmp_path)
    assert "1 of 1 runs have generated nothing yet" in page
    assert "No run has generated anything yet." in page
    assert report.plots == {}


def test_rows_of_real_weights_and_prompts_carry_no_mark(tmp_path, written):
    write_run(tmp_path / "real", turns([10.0, 12.0]))
    planted = turns([10.0], planted=True, target="planted_x")
    write_run(tmp_path / "planted", planted, config_of(target={"name": "planted_x"}))
    _, page = written(tmp_path)
    assert page.startswith("# Report (in part planted weights)")
    marked = [line for line in page.splitlines() if line.startswith("| subspec")]
    assert ["**PLANTED**" in line for line in marked] == [True, False]


def test_the_command_line(sweep, tmp_path, capsys):
    code, out, err = run(capsys, sweep)
    assert (code, err) == (0, "")
    assert f"report: {sweep / 'report' / 'REPORT.md'}" in out
    assert "3 runs in 3 rows (3 of planted weights, 3 of sample prompts)" in out
    assert "note: 1 of 3 runs are unfinished" in out
    again = run(capsys, sweep, "--out", tmp_path / "out", "--baseline", "subspec hqq4, beam 3x2")
    assert again[0] == 0
    assert "3 runs" in again[1], "a report is no run"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ([], 2, "the following arguments are required: FOLDER"),
        (["--nonsense", "x"], 2, "unrecognized arguments: --nonsense"),
        (["missing"], 1, "missing: no such folder"),
        (["SWEEP", "--baseline", "nope"], 1, "--baseline nope: no such run"),
        (["SWEEP", "--out", "FILE/below"], 1, "cannot write .*choose another folder with --out"),
    ],
)
def test_failures_are_one_line(sweep, tmp_path, capsys, arguments, code, line):
    (tmp_path / "file").write_text("in the way")
    places = {"SWEEP": str(sweep), "FILE/below": str(tmp_path / "file" / "below")}
    ended, err = refusal(capsys, *[places.get(argument, argument) for argument in arguments])
    assert ended == code
    assert re.search(f"^error: {line}", err), err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["--baseline", "python -m subspec.report multirun", "report compare", "./compare"]),
        (["compare", "--help"], ["FOLDER_A", "--json", "Exit status", "draft=none"]),
    ],
)
def test_help_is_in_the_users_words(capsys, arguments, words):
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert all(word in out for word in words)
