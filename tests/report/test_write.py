"""The whole report, as a user and as a sweep ask for it."""

import csv
import re

import pytest

from subspec.errors import SubspecError
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


def cells(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_partial_sweep(sweep, tmp_path):
    report = write_report([sweep], tmp_path / "out", baseline="none")
    assert report.folder == tmp_path / "out"
    assert [file.name for file in report.tables] == ["methods.csv", "acceptance.csv", "runs.csv"]
    page = report.page.read_text(encoding="utf-8")
    assert page.startswith("# Report (planted weights and sample prompts)")
    assert "> **Planted weights: " in page
    assert "> **Packaged sample prompts, not the benchmark" in page
    assert "3 runs (2 finished, 1 unfinished) in 3 rows." in page
    assert "1 of 3 runs are unfinished" in page
    assert "1 damaged record line(s) are left out" in page
    assert "sweep/2: 1 damaged line(s)" in page
    rows = re.findall(r"^\| (?:plain|subspec).*$", page, re.MULTILINE)
    assert len(rows) == 3
    assert all("**PLANTED**" in row and "*sample prompts*" in row for row in rows)
    assert sum("(1 unfinished)" in row for row in rows) == 1
    assert all(mark in page for mark in ("`draft=subspec quant.bits=4`", "torch=2.0", "a CPU, 2 thread(s)", "f" * 12))


def test_a_planted_draft_that_is_no_substitute_is_not_called_noise(sweep, tmp_path):
    options = {"planted": True, "source": "sample"}
    page = write_report([sweep], tmp_path / "out").page.read_text(encoding="utf-8")
    assert "means nothing" not in page
    write_run(sweep / "3", turns([30.0, 20.0], draft="small_model", **options), config_of("small_model"), finished=True)
    page = write_report([sweep], tmp_path / "out").page.read_text(encoding="utf-8")
    assert re.search(r"> \*\*Planted weights: .*means nothing\.\*\* Rows: some_target with draft small_model\.", page)


def test_jobs_that_left_no_run_are_named(sweep, tmp_path):
    from subspec.records.outcome import Outcome, write_outcome
    from subspec.records.sweep_folder import SweepFolder

    jobs = [([f"seed={seed}"], {"seed": seed}) for seed in range(5)]
    with SweepFolder.open(sweep, []) as folder:  # 0, 1 and 2 lie there already: these are 3 to 7
        numbers = [job.number for job in folder.assign(jobs)]
    for number in numbers[:3]:
        (sweep / str(number)).mkdir()
        write_outcome(sweep / str(number), Outcome("failed", 2, "offload.vram_gib=1 cannot hold this run"))
    write_outcome(sweep / str(numbers[1]), Outcome("ok", 0))
    report = write_report([sweep, sweep / "3"], tmp_path / "out")
    assert [note for note in report.notes if "job" in note] == [
        "sweep: 2 of 5 jobs have not been started",
        "sweep/3: its job failed: offload.vram_gib=1 cannot hold this run",
        "sweep/5: its job failed: offload.vram_gib=1 cannot hold this run",
    ]
    assert "- sweep/5: its job failed" in report.page.read_text(encoding="utf-8")
    with pytest.raises(SubspecError, match=r"no run below .*3: .*\(3: its job failed: offload\.vram_gib=1 "):
        write_report([sweep / "3"], tmp_path / "out")


def test_the_tables_hold_what_the_records_say(sweep, tmp_path):
    write_report([sweep], tmp_path / "out")
    methods = {row["method"]: row for row in cells(tmp_path / "out" / "methods.csv")}
    ours, plain = methods["subspec hqq4, beam 3x2"], methods["plain decoding"]
    tokens, speeds = [30, 33, 36], [30.0, 20.0, 24.0]
    total = sum(tokens) / sum(count / speed for count, speed in zip(tokens, speeds, strict=True))
    assert float(ours["tokens_per_s"]) == pytest.approx(total)
    assert float(ours["tokens_per_s_mean"]) == pytest.approx(sum(speeds) / 3)
    assert float(ours["tau"]) == 3.0
    assert float(ours["speedup"]) == pytest.approx(total / float(plain["tokens_per_s"]))
    assert float(ours["speedup_low"]) <= float(ours["speedup"]) <= float(ours["speedup_high"])
    assert ours["speedup_paired"] == "True"
    assert (ours["planted_weights"], ours["sample_prompts"]) == ("True", "True")
    assert (plain["speedup"], plain["baseline"]) == ("", "plain decoding")
    assert float(ours["peak_ram_gib"]) == 3.0
    curve = [row for row in cells(tmp_path / "out" / "acceptance.csv") if row["method"] == ours["method"]]
    assert [float(row["accept_rate"]) for row in curve] == pytest.approx([1.0, 27 / 33, 16 / 33])
    runs = cells(tmp_path / "out" / "runs.csv")
    assert [row["state"] for row in runs] == ["finished", "finished", "unfinished"]
    assert runs[2]["damaged_lines"] == "1"
    assert [len(row["config_digest"]) for row in runs] == [20] * 3
    assert runs[1]["config_digest"] != runs[2]["config_digest"]


def test_accuracy_texts_and_the_baseline_are_told(tmp_path):
    facts = {"dtype": "bfloat16", "device": "cuda:0", "bitwise": {"on": True}, "resident_layers": 11}
    facts |= {"streamed_bytes_per_pass": 2**30, "captured_passes": False}
    for draft, tau in (("none", 1), ("subspec", 3), ("eagle2", 3)):
        records = turns([30.0, 20.0, 24.0], draft=draft, tau=tau, correct=True, reference="7")
        records[0]["correct"], records[1]["correct"] = False, None  # wrong, and cut before an answer
        for one in records:
            one["token_ids"] = [1, 2 + (draft == "eagle2" and one["sample_id"] == "s2")]
        write_run(tmp_path / draft, records, config_of(draft), facts=facts)
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
    assert page.count("| 1 of 2 (50 %), 1 cut |") == 3
    assert (
        "- Baseline plain decoding: bfloat16, batch-invariant kernels, passes launched kernel by kernel, 11 layers on"
        in page
    )
    assert "1.00 GiB of plain weights streamed per pass." in page
    assert "subspec hqq4, beam 3x2: the same text as plain decoding in all 3 turns, and so the same accuracy." in page
    assert re.search(r"eagle2, .*another text than plain decoding in 1 of 3 turns\*\*: s2 turn 0 \(`.*compare ", page)
    assert "#### By category" not in page
    assert "share of roofline |" not in page, "a column without figures"
    (row,) = (one for one in cells(tmp_path / "out" / "methods.csv") if one["draft"] == "eagle2")
    assert (row["turns_with_baseline_text"], row["turns_with_other_text"]) == ("2", "1")
    assert (row["accuracy"], row["checked"], row["unfinished"]) == ("0.5", "2", "1")
    assert float(row["ttft_s_mean"]) == 0.5
    assert 0 < float(row["block_p50_s"]) <= float(row["block_p99_s"])


def test_categories_and_accepted_lengths_have_tables(tmp_path):
    for draft, tau in (("none", 1), ("subspec", 3)):
        records = turns([30.0, 20.0, 24.0], draft=draft, tau=tau, benchmark="spec_bench", category="rag")
        records[0]["category"] = "stem"
        write_run(tmp_path / draft, records, config_of(draft))
    report = write_report([tmp_path], tmp_path / "out")
    page = report.page.read_text()
    assert "| tau | multi-turn | rag | Overall |" in page
    assert (
        "| speed-up | multi-turn | rag | Overall |\n|---|---:|---:|---:|\n| `subspec hqq4, beam 3x2` | 1.00x |" in page
    )
    assert "| correct |" not in page
    assert "| `subspec hqq4, beam 3x2` | 1.00 / 1.00 | 0.818 / 0.818 | 0.485 / 0.593 |" in page
    assert "| `subspec hqq4, beam 3x2` | 0.0 % | 18.2 % | 33.3 % | 48.5 % |" in page
    rows = cells(tmp_path / "out" / "categories.csv")
    assert [row["category"] for row in rows] == ["multi-turn", "rag", "Overall"] * 2
    assert {"tau_by_category", "speedup_by_category", "accepted_lengths"} <= set(report.plots)
    for folder in ("none", "subspec"):
        write_run(tmp_path / folder, turns([30.0], draft=folder), config_of(folder))
    write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out" / "categories.csv").exists()


def test_folders_are_named_from_where_one_stands(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_report([sweep], tmp_path / "out")
    assert [row["folder"] for row in cells(tmp_path / "out" / "runs.csv")] == ["sweep/0", "sweep/1", "sweep/2"]
    assert str(tmp_path) not in (tmp_path / "out" / "REPORT.md").read_text()


def test_every_picture_on_the_page_is_there(sweep, tmp_path, real_pictures):
    report = write_report([sweep], tmp_path / "out")
    page = report.page.read_text(encoding="utf-8")
    named = re.findall(r"\]\((plots/[^)]+)\)", page)
    assert len(named) == 2 * len(report.plots)
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in named)
    assert "- roofline: no run streams weights" in page


def test_a_report_is_replaced_with_what_it_no_longer_has(sweep, tmp_path):
    write_report([sweep], tmp_path / "out")
    assert (tmp_path / "out" / "plots" / "acceptance.png").exists()
    write_report([sweep / "0"], tmp_path / "out")
    assert not (tmp_path / "out" / "plots" / "acceptance.png").exists()
    assert "plots/acceptance" not in (tmp_path / "out" / "REPORT.md").read_text()


def test_a_sweep_that_has_only_begun(tmp_path):
    write_run(tmp_path / "0", [], finished=False)
    report = write_report([tmp_path], tmp_path / "out")
    page = report.page.read_text()
    assert "1 of 1 runs have generated nothing yet" in page
    assert "No run has generated anything yet." in page
    assert report.plots == {}


def test_rows_of_real_weights_and_prompts_carry_no_mark(tmp_path):
    write_run(tmp_path / "real", turns([10.0, 12.0]))
    write_run(
        tmp_path / "planted", turns([10.0], planted=True, target="planted_x"), config_of(target={"name": "planted_x"})
    )
    page = write_report([tmp_path], tmp_path / "out").page.read_text()
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
