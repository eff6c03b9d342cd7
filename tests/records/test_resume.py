"""A run that is stopped at any point continues with its folder alone: nothing lost, nothing doubled."""

import json
import re
import shlex
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
import yaml

import subspec.benchmarks.loader
import subspec.runs.runner
from subspec.benchmarks.rows import DataUnavailableError, Table
from subspec.decoding.engine import Engine
from subspec.records.run_folder import RunFolder
from tests.helpers.cli import Forked, cli, done, no_report, records_of, summary_of, timeless, tiny_run  # noqa: F401
from tests.helpers.stopped import Killed, kill_after, killed_after
from tests.helpers.tiny import tiny_checkpoint

TURNS = 4  # two samples of two turns

SHAPE = ["benchmark=mt_bench", "tree=beam", "tree.depth=4", "tree.width=3", "seed=1"]


@pytest.fixture
def arguments(checkpoint, tmp_path):
    """A run of two samples of two turns into ``tmp_path / "run"``."""
    return [*tiny_run(checkpoint, tmp_path / "run", samples=2, tokens=8), *SHAPE]


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The folder of that run when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done(*tiny_run(checkpoint, folder, samples=2, tokens=8), *SHAPE)
    return folder


@pytest.fixture(scope="module")
def undisturbed(whole):
    """Its records and its summary."""
    return timeless(records_of(whole)), summary_of(whole)


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(whole, tmp_path / "run")


def serve(monkeypatch, source):
    """From now on ``benchmark.source=auto`` finds the data set on the hub, or, with ``sample``, no hub."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(8)]

    def load_rows(*arguments):
        if source == "sample":
            raise DataUnavailableError("the hub did not answer", "take other prompts")
        return Table(rows, "the hub"), None

    monkeypatch.setattr(subspec.benchmarks.loader, "load_rows", load_rows)


def contents(folder):
    """Every file of a run by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def resume(folder, *more):
    return done(f"run_dir={folder}", "resume=true", *more)


def refused_to_resume(folder, line, *more):
    """Nothing in the folder may change."""
    before = contents(folder)
    cli(f"run_dir={folder}", "resume=true", *more).refused(2, line)
    assert contents(folder) == before


def assert_whole(folder, undisturbed):
    records, summary = undisturbed
    assert timeless(records_of(folder)) == records
    found = summary_of(folder)
    assert found["counts"] == summary["counts"]
    same = ("prompt_tokens", "new_tokens", "verified_tokens", "iterations", "drafted_nodes", "tau")
    assert {key: found["totals"][key] for key in same} == {key: summary["totals"][key] for key in same}
    assert found["run"].keys() == summary["run"].keys()


# ------------------------------------------------------------------------------------- real processes


def test_kill_then_interrupt_then_finish(checkpoint, tmp_path, monkeypatch):
    """Killed between the turns of a sample, resumed, interrupted, and resumed as the message says."""
    folder = tmp_path / "my run"
    long = [*tiny_run(checkpoint, folder, tokens=60, samples=2), "benchmark=mt_bench", "decoding.ignore_eos=true"]
    long += ["warmup=0", "draft=none"]
    kill_after(1, folder, Forked(*long))
    before = records_of(folder)
    assert len(before) < 3
    assert not (folder / "summary.json").exists()

    append = RunFolder.append

    def interrupt(self, record):
        append(self, record)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "append", interrupt)
    ran = cli(f"run_dir={folder}", "resume=true")
    monkeypatch.undo()
    assert ran.code == 130, ran.err
    found = re.fullmatch(r"error: interrupted: finished samples are kept; continue with (.+)", ran.error)
    assert len(records_of(folder)) == len(before) + 1
    assert shlex.split(found[1]) == [f"run_dir={folder}", "resume=true"]

    done(*shlex.split(found[1]))
    done(*long, f"run_dir={tmp_path / 'undisturbed'}")
    assert timeless(records_of(folder)) == timeless(records_of(tmp_path / "undisturbed"))
    assert records_of(folder)[: len(before)] == before


# ------------------------------------------------------------------------------------- every other point


@pytest.mark.parametrize(("kept", "at_once"), [(0, False), (1, False), (2, True), (TURNS, True)])
def test_stopped_around_any_record(arguments, undisturbed, tmp_path, monkeypatch, kept, at_once):
    killed_after(kept, *arguments, at_once=at_once)
    assert len(records_of(tmp_path / "run")) == kept

    generated = []
    admit = Engine.admit
    monkeypatch.setattr(Engine, "admit", lambda *text: generated.append(0) or admit(*text))
    resume(tmp_path / "run", "warmup=1")
    assert len(generated) == (TURNS - kept + 1 if kept < TURNS else 0)  # and the warm-up
    assert_whole(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("place", ["load", "_Run._warm_up", "RunFolder.write_summary", "summarise"])
def test_stopped_elsewhere(arguments, undisturbed, tmp_path, monkeypatch, place):
    monkeypatch.setattr(f"subspec.runs.runner.{place}", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        cli(*arguments)
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_whole(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("kept", [0.0, 0.999])
def test_a_torn_last_line_runs_again(finished, undisturbed, kept):
    folder = finished
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    torn = lines[-2][: int(kept * len(lines[-2]))]
    (folder / "records.jsonl").write_bytes(b"".join(lines[:-2]) + torn)
    ran = resume(folder)
    assert_whole(folder, undisturbed)
    assert ("half-written last line" in ran.out) == bool(torn)
    assert (folder / "records.jsonl.damaged").exists() == bool(torn)


def test_stopped_between_the_folder_and_its_overrides(arguments, tmp_path, monkeypatch):
    """Nothing has been generated yet, so starting again is all there is to do, and the message says so."""
    monkeypatch.setattr(subspec.runs.runner, "store_overrides", Mock(side_effect=KeyboardInterrupt))
    ran = cli(*arguments)
    assert ran.code == 130
    assert ran.error == "error: interrupted: nothing had been generated yet; start again"
    monkeypatch.undo()
    assert cli(f"run_dir={tmp_path / 'run'}", "resume=true").code == 2
    done(*arguments)


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_sweep_names_its_folder(arguments, tmp_path, monkeypatch):
    options = [a for a in arguments if not a.startswith("run_dir")]
    options += ["-m", "draft=none", "seed=0,1", f"sweep_dir={tmp_path / 'my sweep'}", "hydra/launcher=basic"]
    monkeypatch.setattr(subspec.runs.runner, "load", Mock(side_effect=KeyboardInterrupt))
    ran = cli(*options)
    assert ran.code == 130
    found = re.search(r"continue with the same command and (.+)", ran.error)
    monkeypatch.undo()
    done(*options, *shlex.split(found[1]))
    assert len(records_of(tmp_path / "my sweep" / "1")) == TURNS


# ---------------------------------------------------------------------------------------- what is resumed


def test_a_finished_run_generates_nothing_and_loads_nothing(finished, undisturbed, monkeypatch):
    before = (finished / "records.jsonl").read_bytes()
    monkeypatch.setattr(subspec.runs.runner, "load", Mock(side_effect=AssertionError("nothing is left to generate")))
    ran = resume(finished, f"baseline={finished}", "logger=none")  # keys that change no record
    assert "every sample is finished: nothing to generate" in ran.out
    assert "acceptance length tau" in ran.out
    assert re.search(r"1\.00x decode, 1\.00x overall", ran.out)
    assert (finished / "records.jsonl").read_bytes() == before
    assert_whole(finished, undisturbed)


def test_more_samples_extend_a_run(arguments, undisturbed, tmp_path):
    folder = tmp_path / "run"
    done(*arguments, "benchmark.max_samples=1")
    first = records_of(folder)
    resume(folder, "benchmark.max_samples=2")
    assert_whole(folder, undisturbed)
    assert records_of(folder)[: len(first)] == first
    assert yaml.safe_load((folder / "config.yaml").read_text())["benchmark"]["max_samples"] == 2
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(lines[:-1]))
    resume(folder)  # remembers that it was extended
    assert_whole(folder, undisturbed)


def test_another_configuration_is_refused_and_spoils_nothing(arguments, finished, undisturbed):
    for changed, line in (
        ("tree.width=2", r"differs from .*config\.yaml: tree\.width: 3 -> 2\. Use the same values, or .*run_dir="),
        ("audit=true", r"audit: false -> true"),
        ("decoding=sampling", r"decoding\.name: \"greedy\" -> \"sampling\""),
    ):
        refused_to_resume(finished, line, changed)
    line = r"run_dir=\S+ already holds records: continue it with resume=true"
    cli(*arguments, "draft=none").refused(2, line)
    resume(finished)
    assert_whole(finished, undisturbed)


@pytest.mark.parametrize(("first", "then"), [("sample", "hub"), ("hub", "sample")])
def test_other_prompts_under_the_same_configuration_are_refused(arguments, tmp_path, monkeypatch, first, then):
    """``benchmark.source=auto`` takes what the hub's state at that moment leaves it."""
    folder, options = tmp_path / "run", [*arguments, "benchmark=gsm8k", "benchmark.source=auto"]
    serve(monkeypatch, first)
    killed_after(1, *options)
    serve(monkeypatch, then)
    line = rf"benchmark\.source comes to {then} now, .* are of {first}: set benchmark\.source={first}, or .* run_dir="
    refused_to_resume(folder, line)
    refused_to_resume(folder, line, f"benchmark.source={then}")
    serve(monkeypatch, first)
    resume(folder, f"benchmark.source={first}")
    assert {record["source"] for record in records_of(folder)} == {first}
    summary = summary_of(folder)
    assert (summary["context"]["source"], summary["run"]["benchmark_source"]) == (first, first)
    assert summary["counts"]["samples"] == 2


def test_another_device_under_the_same_configuration_is_refused(arguments, tmp_path, monkeypatch):
    """``device=auto`` on a machine whose GPU comes or goes: the dtype would be another, too."""
    monkeypatch.setattr(subspec.runs.runner, "why_not", lambda *arguments, **options: "there is no GPU to ask")
    folder = tmp_path / "run"
    monkeypatch.setattr("subspec.runs.loading.resolve_device", lambda device: torch.device("cpu"))
    killed_after(1, *arguments, "device=auto")
    monkeypatch.setattr("subspec.runs.loading.resolve_device", lambda device: torch.device("cuda", 0))
    refused_to_resume(folder, r"device comes to cuda now, and the records in \S+ are of cpu: set device=cpu, or choose")
    monkeypatch.setattr("subspec.runs.loading.resolve_device", lambda device: torch.device("cpu"))
    resume(folder, "device=cpu")
    assert {record["device"] for record in records_of(folder)} == {"cpu"}
    assert len(records_of(folder)) == TURNS


def test_other_data_and_other_weights_under_the_same_configuration_are_refused(
    arguments, checkpoint, tmp_path, monkeypatch
):
    folder, file, model = tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copytree(checkpoint, model)

    def write_rows(*turns):
        rows = [{"question_id": n, "turns": [text]} for n, text in enumerate(turns)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    options = [*arguments, f"target.path={model}", "benchmark.source=file", f"benchmark.path={file}"]
    options += ["warmup=0", "draft=none"]
    write_rows("one", "two")
    done(*options, "benchmark.max_samples=1")
    write_rows("another", "other")
    more = "benchmark.max_samples=2"
    refused_to_resume(folder, r"benchmark\.path=\S+rows\.jsonl now holds other data: it changed the prompt", more)
    write_rows("one", "two", "three")
    shutil.rmtree(model)
    tiny_checkpoint(model, max_positions=8192, seed=1)
    line = r"target\.path=\S+model now holds other weights: .*run_dir="
    cli(f"run_dir={folder}", "resume=true", more).refused(2, line)
    shutil.rmtree(model)
    shutil.copytree(checkpoint, model)
    resume(folder, more)
    assert len(records_of(folder)) == 2


def test_a_run_without_records_may_take_other_prompts(arguments, tmp_path, monkeypatch):
    folder, options = tmp_path / "run", [*arguments, "benchmark=gsm8k", "benchmark.source=auto"]
    serve(monkeypatch, "sample")
    killed_after(0, *options)
    serve(monkeypatch, "hub")
    resume(folder)
    assert summary_of(folder)["context"]["source"] == "hub"


def test_a_script_that_always_resumes_may_start_a_run(arguments, undisturbed, tmp_path):
    """A batch system restarts the same command line."""
    assert "starting from the beginning" in done(*arguments, "resume=true").out
    done(*arguments, "resume=true")
    assert_whole(tmp_path / "run", undisturbed)


def test_skipped_prompts_are_not_tried_again(arguments, tmp_path):
    done(*arguments, "benchmark.max_prompt_tokens=200", "decoding.max_length=230")
    before = records_of(tmp_path / "run")
    assert any(record.get("skipped") for record in before)
    assert "every sample is finished" in resume(tmp_path / "run").out
    assert records_of(tmp_path / "run") == before


def test_overrides_that_cannot_be_read(finished):
    (finished / "overrides.yaml").write_text("tree: [")
    cli(f"run_dir={finished}", "resume=true").refused(2, r"overrides\.yaml cannot be read: mend it, or delete it")


def test_a_second_process_is_kept_out(arguments, tmp_path):
    with RunFolder.open(tmp_path / "run", resume=False, config={}):
        cli(*arguments).refused(1, r"run_dir=\S+ is in use by another process: wait for it")
