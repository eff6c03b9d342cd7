"""Runs through the whole command line, on a tiny model: what they generate, record, print and refuse to lose."""

import json
import re
from unittest.mock import Mock

import pytest
import torch
import yaml

import subspec.decoding.text_loop
import subspec.runs.generation
import subspec.runs.runner
from subspec.benchmarks import load_benchmark
from subspec.config.schema import BenchmarkConfig, Source
from subspec.runs.logger import NoLogger
from subspec.runs.turn import prompt_digest
from tests.helpers.cli import Forked, cli, done, records_of, summary_of, texts_of, timeless, tiny_run


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """``run("draft=none", ...)``: a finished run; returns what it printed and its folder."""

    def start(*overrides, code=0, tokens=24, samples=2):
        folder = tmp_path_factory.mktemp("run")
        shape = ["tree.depth=6"]
        ran = cli(*tiny_run(checkpoint, folder, tokens=tokens, samples=samples), *shape, *overrides)
        assert ran.code == code, ran.err
        return ran, folder

    return start


@pytest.fixture(scope="module")
def plain(run):
    """Plain greedy decoding: what every draft must reproduce."""
    return run("draft=none")


@pytest.fixture(scope="module")
def drafted(run, plain):
    """The usual draft and tree, audited, beside plain decoding."""
    return run("audit=true", "target.dtype=auto", "device=auto", "warmup=2", f"baseline={plain[1]}")


# ------------------------------------------------------------------------------------------ losslessness


@pytest.mark.parametrize(("tree", "bits"), [("chain", 3), ("beam", 2)])
def test_a_draft_changes_no_token(run, plain, tree, bits):
    _, folder = run(f"tree={tree}", f"quant.bits={bits}", "audit=true")
    assert texts_of(folder) == texts_of(plain[1])
    assert all(record["audit"]["mismatch"] == 0 for record in records_of(folder))


@pytest.mark.parametrize("tree", ["chain", "beam"])
def test_sampling_draws_what_plain_sampling_draws(run, tree):
    sampling = ["decoding=sampling", "decoding.temperature=0.8", "decoding.top_k=40", "decoding.top_p=0.95"]
    _, alone = run(*sampling, "draft=none", "seed=3")
    _, sampled = run(*sampling, f"tree={tree}", "seed=3", "audit=true")
    assert texts_of(sampled) == texts_of(alone)
    assert all(record["audit"]["mismatch"] == 0 for record in records_of(sampled))
    greedy = run("draft=none", "seed=3")
    assert texts_of(alone) != texts_of(greedy[1])


def test_another_seed_draws_something_else(run):
    rows = "benchmark.max_samples=null"  # the same prompts, whatever the seed selects
    first, second = (texts_of(run("decoding=sampling", "draft=none", rows, f"seed={s}")[1]) for s in (0, 1))
    assert first.keys() == second.keys()
    assert first != second


def test_a_broken_verifier_is_found_by_the_audit(run, plain, monkeypatch):
    verify = subspec.decoding.text_loop.verify
    monkeypatch.setattr(
        subspec.decoding.text_loop, "verify", lambda tree, chosen, *levels: verify(tree, (chosen + 1) % 320, *levels)
    )
    ran, folder = run("audit=true", code=3)
    summary = summary_of(folder)
    wrong = summary["audit"]["mismatch"]
    assert wrong > 0
    assert re.search(rf"audit found {wrong} token\(s\) .*largest gap [\d.]+ logits.*{folder}/records\.jsonl", ran.error)
    assert f"AUDIT FAILED: {wrong} token(s)" in ran.out
    assert len(records_of(folder)) == summary["counts"]["turns"] == 2
    assert sum(record["audit"]["mismatch"] for record in records_of(folder)) == wrong
    assert texts_of(folder) != texts_of(plain[1])


def test_an_audited_run_says_so(drafted, plain):
    ran, folder = drafted
    assert texts_of(folder) == texts_of(plain[1])
    assert summary_of(folder)["totals"]["tau"] > 1
    tokens = sum(record["new_tokens"] for record in records_of(folder))
    audit = summary_of(folder)["audit"]
    assert audit["exact"] + audit["near_tie"] == tokens
    assert audit["turns"] == 2
    assert audit["max_gap"] <= audit["margin"]
    assert re.search(rf"losslessness audit +passed: tokens exact {audit['exact']}, .*mismatches 0", ran.out)


# --------------------------------------------------------------------------------------------- records

FIGURES = """
    prompt_tokens new_tokens iterations tau tau_published accept_rate_by_depth prefill_s decode_s tokens_per_s
    tokens_per_s_total plain_tokens plain_s speedup_over_plain draft_s verify_s transfer_s bytes_streamed link_gb_per_s
    roofline_tokens_per_s roofline_share link_busy_share peak_vram_gib device_vram_gib peak_ram_gib finish_reason
"""


def test_a_record_holds_every_metric(drafted, plain):
    ran, folder = drafted
    gain = summary_of(folder)["totals"]["speedup_over_plain"]
    assert f"{gain:.2f} times as fast as plain decoding" in ran.out
    assert "times as fast" not in plain[0].out
    for record, alone in zip(records_of(folder), records_of(plain[1]), strict=True):
        assert set(FIGURES.split()) <= set(record)
        assert record["new_tokens"] == len(record["token_ids"]) == 24
        assert record["verified_tokens"] == 23
        assert record["tau"] == 23 / record["iterations"]
        assert record["tau_published"] == 24 / (1 + record["iterations"])
        assert alone["iterations"] == 23
        assert alone["tau"] == 1
        assert record["prefill_s"] > 0
        assert record["decode_s"] >= record["draft_s"] + record["verify_s"] - 0.01
        assert (record["draft"], alone["draft"]) == ("subspec", "none")
        plain_speed = record["plain_tokens"] / record["plain_s"]
        assert record["speedup_over_plain"] == pytest.approx(record["tokens_per_s"] / plain_speed)
        assert record["plain_tokens"] == min(4, max(1, record["iterations"] // 5))
        assert alone["plain_tokens"] is None
        assert (record["source"], record["device"], record["seed"]) == ("sample", "cpu", 0)
        assert (record["correct"], record["extracted"]) == (None, None)  # cut before an answer
        assert record["reference"]
        assert record["prompt_sha256"] == alone["prompt_sha256"]


def test_the_summary_says_what_ran(drafted, checkpoint):
    _, folder = drafted
    summary = summary_of(folder)
    facts = summary["run"]
    assert (facts["dtype"], facts["device"], facts["target_source"]) == ("float32", "cpu", str(checkpoint))
    assert facts["substitute"]["quantizer"] == "hqq"
    tree = summary["config"]["tree"]
    assert (tree["name"], tree["width"]) == ("adaptive", 1)  # on a CPU
    assert facts["substitute"]["bits_per_weight"] == pytest.approx(4.5)
    assert facts["warmup_generations_excluded"] == 2
    assert facts["benchmark_detail"] == "packaged sample prompts"
    assert summary["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert summary["environment"]["versions"]["torch"]
    assert summary["counts"]["samples"] == 2
    assert summary["totals"]["new_tokens"] == 48
    assert not [name for name in facts if "vram" in name], "there is no GPU"


def test_the_stored_configuration_is_the_one_that_was_composed(run, checkpoint):
    overrides = ["tree=adaptive", "tree.width=2", "tree.check_every=3", "tree.min_depth=1"]
    overrides += ["decoding.stop=[a b]", "seed=5"]
    _, folder = run(*overrides)
    shown = cli(*tiny_run(checkpoint, folder, tokens=24), "tree.depth=6", *overrides, "--cfg", "job", "--resolve")
    assert yaml.safe_load(shown.out) == yaml.safe_load((folder / "config.yaml").read_text())
    assert cli(*tiny_run(checkpoint, folder / "another"), "--cfg", "job").code == 0
    assert not (folder / "another").exists()


def test_the_second_turn_follows_the_first_answer(run):
    _, folder = run("benchmark=mt_bench", "audit=true", samples=1)
    first, second = records_of(folder)
    assert (first["turn"], second["turn"]) == (0, 1)
    (sample,) = load_benchmark(BenchmarkConfig("mt_bench", Source.sample, max_samples=1), seed=0).samples
    asked, then = ({"role": "user", "content": text} for text in sample.turns)
    answer = {"role": "assistant", "content": first["text"]}
    assert first["prompt_sha256"] == prompt_digest([asked])
    assert second["prompt_sha256"] == prompt_digest([asked, answer, then])
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]
    counts = summary_of(folder)["counts"]
    assert (counts["samples"], counts["turns"]) == (1, 2)


@pytest.mark.parametrize("draft", ["none", "subspec"])
def test_a_stop_string_ends_the_text(run, plain, draft):
    texts = [record["text"] for record in records_of(plain[1])]
    stop = re.search(r"(?<=..)[a-zA-Z]{2}", texts[0])[0]
    _, folder = run(f"draft={draft}", f"decoding.stop=[{stop}]")
    record = records_of(folder)[0]
    assert record["finish_reason"] == "stop"
    assert record["text"] == texts[0][: texts[0].index(stop)]


def test_a_local_file_of_prompts(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "one", "question": "What is 3 + 4?", "answer": "3 + 4 = 7\\n#### 7"}\n')
    ran, folder = run("benchmark.source=file", f"benchmark.path={rows}", samples=5)
    (record,) = records_of(folder)
    assert (record["sample_id"], record["source"], record["reference"]) == ("gsm8k/one", "file", "7")
    assert "1 of 1 rows" in ran.out
    assert "packaged sample prompts" not in ran.out


@pytest.mark.parametrize(("later", "most"), [(3.0, 6.0), (7.0, 7.0)])
def test_what_a_budget_bounds_beside_the_turns_is_recorded(run, monkeypatch, later, most):
    """Loading's peaks, before the turns' own begin anew. A stand-in for the allocator, around a run on the CPU."""
    peaks = {"allocated": 5.0, "reserved": 6.0, "device": 6.7}
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    load = subspec.runs.runner.load
    monkeypatch.setattr("subspec.runs.loading.resolve_device", lambda device: cuda)
    monkeypatch.setattr(subspec.runs.runner, "why_not", lambda *arguments, **options: "this is no GPU")
    monkeypatch.setattr(subspec.runs.runner, "load", lambda config, device, console: load(config, cpu, console))
    for room in (subspec.runs.runner, subspec.runs.generation):
        monkeypatch.setattr(room, "peak_vram_gib", lambda: peaks["allocated"])
        monkeypatch.setattr(room, "device_vram_gib", lambda: peaks["device"])
    monkeypatch.setattr(subspec.runs.runner, "reserved_vram_gib", lambda: peaks["reserved"])
    monkeypatch.setattr(subspec.runs.runner, "cuda_vram_gib", lambda: 0.7)
    reset = lambda device: peaks.update(allocated=2.0, reserved=later, device=6.8)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    ran, folder = run("draft=none")
    summary = summary_of(folder)
    assert (summary["peak_vram_gib"], summary["device_vram_gib"]) == (2.0, 6.8)
    assert "GPU 2.00 GiB of PyTorch's allocations, 6.80 GiB by the driver" in ran.out
    assert (summary["run"]["loading_peak_vram_gib"], summary["run"]["reserved_vram_gib"]) == (5.0, most)
    assert (summary["run"]["loading_device_vram_gib"], summary["run"]["loading_cuda_vram_gib"]) == (6.7, 0.7)
    assert json.loads((folder / "facts.json").read_text()) == summary["run"]


# --------------------------------------------------------------------------------- baselines and sweeps


def test_the_speed_up_over_a_baseline(drafted, plain):
    ran, folder = drafted
    ours, theirs = (summary_of(path)["totals"]["tokens_per_s"] for path in (folder, plain[1]))
    found = re.search(r"speed-up over \S+ +([\d.]+)x decode, [\d.]+x overall", ran.out)
    assert float(found[1]) == pytest.approx(ours / theirs, abs=0.006)
    assert summary_of(folder)["speedup"]["tokens_per_s"] == pytest.approx(ours / theirs)
    assert "speedup" not in summary_of(plain[1])


# ------------------------------------------------------------------------------------ loggers and folders


def test_a_logger_that_fails_loses_no_record(run, plain, monkeypatch):
    finished = []
    monkeypatch.setattr(NoLogger, "log_turn", Mock(side_effect=ConnectionError("the service went away")))
    monkeypatch.setattr(NoLogger, "finish", lambda self, summary, code=0: finished.append(summary))
    ran, folder = run("draft=none", f"baseline={plain[1]}")
    assert len(records_of(folder)) == 2
    assert summary_of(folder)["counts"]["turns"] == 2
    assert [summary["speedup"] for summary in finished] == [summary_of(folder)["speedup"]]
    assert ran.out.count("warning: No logger: log_turn failed: ConnectionError: the service went away") == 1


def test_offline_from_another_folder_into_one_with_an_unusual_name(checkpoint, tmp_path):
    """As a user without an account runs it: a process, the default logger, a name that a shell would quote."""
    place = tmp_path / "größe (1), a=b"
    place.mkdir()
    arguments = [a for a in tiny_run(checkpoint, "my run") if a != "logger=none"]
    bare = {"WANDB_API_KEY": None, "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": None}
    log = tmp_path.parent / f"{tmp_path.name}.log"
    with log.open("wb") as file:
        process = Forked(*arguments, f"run_dir={place}/my run", log=file.fileno(), cwd=tmp_path, env=bare)
    out = log.read_text() if process.wait() == 0 else pytest.fail(log.read_text())
    folder = place / "my run"
    assert len(records_of(folder)) == 2
    assert "offline" in out
    assert list((folder / "wandb").glob("offline-run-*"))
    assert not (tmp_path / "wandb").exists()
    assert {path.name for path in tmp_path.iterdir()} == {place.name}

    again = done(f"run_dir={folder}", "resume=true", "logger=none")
    assert "every sample is finished" in again.out


def test_a_home_folder_is_found(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done(*tiny_run(checkpoint, "~/run", samples=1), "draft=none")
    assert len(records_of(tmp_path / "run")) == 1


def test_two_runs_of_one_configuration_differ_in_times_only(run, plain):
    _, folder = run("draft=none")
    assert timeless(records_of(folder)) == timeless(records_of(plain[1]))


def test_the_shipped_check_of_an_installation(tmp_path):
    ran = done("experiment=smoke", "device=cpu", f"run_dir={tmp_path}")
    assert "losslessness audit  passed: tokens exact 64" in ran.out
    assert ran.out.startswith("subspec ")
    assert re.search(r"^tables and plots: python -m subspec\.report \S+$", ran.out, re.MULTILINE)
    assert "planted" in ran.out
    summary = summary_of(tmp_path)
    assert summary["audit"]["mismatch"] == 0
    assert summary["counts"]["turns"] == 2
