"""Runs with ``decoding.texts``: the texts of one at a time, whole records, and figures that add up."""

import re
import time

import pytest

from subspec.decoding.audit import Auditor
from subspec.decoding.scheduler import Scheduler
from tests.helpers.cli import Forked, cli, done, records_of, summary_of, texts_of, tiny_run
from tests.helpers.stopped import kill_after, killed_after

PLANTED = ["target=planted_tiny", "benchmark=aime", "benchmark.source=sample", "benchmark.max_samples=3"]
PLANTED += ["decoding.max_new_tokens=6", "tree.depth=3", "warmup=0", "logger=none", "device=cpu"]

DRAFTS = {
    "none": ["draft=none"],
    "subspec": ["draft=subspec", "tree=beam"],
    "prompt_lookup": ["draft=prompt_lookup"],
    "eagle2": ["draft=eagle2", "draft.path=planted", "tree=eagle2", "tree.total_tokens=12"],
}


def run(folder, *overrides):
    return done(*overrides, f"run_dir={folder}").out


@pytest.fixture(scope="module")
def options(checkpoint):
    """A run of four samples of two turns, whose prompts of different lengths are read in small pieces."""
    shape = ["benchmark=mt_bench", "decoding.prefill_chunk=64", "draft=prompt_lookup", "seed=1"]
    return [*tiny_run(checkpoint, "nowhere", samples=4, tokens=6)[:-1], *shape]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """The folder of that run, one text at a time."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *options, "decoding.texts=1")
    return folder


@pytest.fixture(scope="module")
def together(options, alone, tmp_path_factory):
    """Output and folder of that run, three texts at a time, audited."""
    folder = tmp_path_factory.mktemp("together")
    return run(folder, *options, "decoding.texts=3", "audit=true", f"baseline={alone}"), folder


# ---------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Texts of plain decoding, one at a time."""
    found = {}
    for decoding in ("greedy", "sampling"):
        folder = tmp_path_factory.mktemp(decoding)
        run(folder, *PLANTED, "draft=none", f"decoding={decoding}")
        found[decoding] = texts_of(folder)
    return found


@pytest.mark.parametrize("decoding", ["greedy", "sampling"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_texts_are_those_of_one_at_a_time(tmp_path, planted, draft, decoding):
    run(tmp_path, *PLANTED, *DRAFTS[draft], f"decoding={decoding}", "decoding.texts=2", "audit=true")
    assert texts_of(tmp_path) == planted[decoding]
    assert summary_of(tmp_path)["audit"]["errors"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("default_target")
def test_the_default_models_texts_are_those_of_one_at_a_time(tmp_path):
    shape = ["benchmark=aime", "benchmark.source=sample", "benchmark.max_samples=2", "logger=none"]
    shape += ["decoding.max_new_tokens=6", "device=cpu", "draft=subspec", "tree.depth=3", "warmup=0"]
    for number in (1, 2):
        run(tmp_path / str(number), *shape, f"decoding.texts={number}")
    assert texts_of(tmp_path / "1") == texts_of(tmp_path / "2")


# --------------------------------------------------------------------------------------------- records


def test_every_turn_is_recorded_once_behind_the_one_before_it(alone, together):
    records = records_of(together[1])
    keys = [(record["sample_index"], record["turn"]) for record in records]
    assert sorted(keys) == [(index, turn) for index in range(4) for turn in (0, 1)]
    assert all(keys.index((index, 0)) < keys.index((index, 1)) for index in range(4))
    assert keys != sorted(keys)
    assert keys.index((3, 0)) > min(keys.index((index, 1)) for index in range(3))
    assert texts_of(together[1]) == texts_of(alone)
    assert all(record["audit"]["mismatch"] == 0 for record in records)


def test_a_record_tells_its_company_and_the_summary_the_speed_of_all(alone, together):
    out, folder = together
    records, summary = records_of(folder), summary_of(folder)
    assert {record["texts"] for record in records} == {summary["context"]["texts"]} == {3}
    assert all(0 <= record["texts_beside"] <= 2 for record in records)
    assert max(record["texts_beside"] for record in records) > 1
    assert all(record["plain_tokens"] is None for record in records)
    totals, loop = summary["totals"], sum(record["loop_s"] for record in records)
    assert totals["loop_s"] == pytest.approx(loop)
    assert totals["tokens_per_s_together"] == pytest.approx(totals["new_tokens"] / loop)
    assert totals["tokens_per_s_together"] > totals["tokens_per_s_total"]
    assert "decode speed of a text (tokens/s)" in out
    assert re.search(rf"texts at a time +3, .*; {totals['tokens_per_s_together']:.2f} tokens/s together", out)

    one = summary_of(alone)
    assert {(record["texts"], record["texts_beside"]) for record in records_of(alone)} == {(1, 0.0)}
    speed = one["totals"]["tokens_per_s_together"]
    assert speed == pytest.approx(one["totals"]["tokens_per_s_total"], rel=0.1)
    gain = summary["speedup"]
    assert (gain["tokens_per_s"], gain["tokens_per_s_total"]) == (None, None)
    assert gain["tokens_per_s_together"] == pytest.approx(totals["tokens_per_s_together"] / speed)
    assert "texts: 3 against 1" in gain["differences"]
    assert re.search(r"speed-up over \S+ +[\d.]+x all texts together", out)


def test_an_audit_is_in_no_time_of_the_texts_beside(options, tmp_path, monkeypatch):
    audit = Auditor.audit
    monkeypatch.setattr(Auditor, "audit", lambda *a, **k: time.sleep(1.0) or audit(*a, **k))
    shape = ["benchmark=aime", "benchmark.max_samples=2", "decoding.texts=2", "audit=true"]
    run(tmp_path, *options, *shape)
    first, second = records_of(tmp_path)
    assert second["texts_beside"] > 0
    for record in (first, second):
        assert max(record["prefill_s"], record["decode_s"], *record["block_s"], record["loop_s"]) < 1


def test_a_text_that_cannot_go_on_ends_the_run_and_those_that_ended_with_it_are_kept(options, tmp_path, monkeypatch):
    step = Scheduler.step

    def fail(self):
        ended = step(self)
        if len(ended) > 1:
            ended[0].error = RuntimeError("damaged")
        return ended

    monkeypatch.setattr(Scheduler, "step", fail)
    shape = ["decoding.texts=3", "decoding.max_new_tokens=1", "decoding.prefill_chunk=4096", "warmup=0"]
    with pytest.raises(RuntimeError, match="damaged"):
        cli(*options, *shape, f"run_dir={tmp_path}")
    assert [record["sample_index"] for record in records_of(tmp_path)] == [1, 2]


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("count", [1, 6])
def test_a_stopped_run_goes_on(options, alone, tmp_path, count):
    killed_after(count, *options, "decoding.texts=3", f"run_dir={tmp_path}")
    before = records_of(tmp_path)
    assert len(before) == count
    run(tmp_path, "resume=true")
    records = records_of(tmp_path)
    assert records[:count] == before
    assert texts_of(tmp_path) == texts_of(alone)
    assert summary_of(tmp_path)["counts"] == summary_of(alone)["counts"]
    totals = summary_of(tmp_path)["totals"]
    assert totals["loop_s"] == pytest.approx(sum(record["loop_s"] for record in records))


def test_kill_9_costs_the_running_turns_only(options, alone, tmp_path):
    kill_after(2, tmp_path, Forked(*options, "decoding.texts=3", f"run_dir={tmp_path}"))
    run(tmp_path, "resume=true")
    assert texts_of(tmp_path) == texts_of(alone)


def test_figures_of_one_number_only(options, tmp_path):
    killed_after(2, *options, "decoding.texts=3", f"run_dir={tmp_path}")
    cli(f"run_dir={tmp_path}", "resume=true", "decoding.texts=2").refused(2, r"decoding\.texts: 3 -> 2")
    run(tmp_path, "resume=true", "decoding.texts=auto")  # as many as in the first session
    assert {record["texts"] for record in records_of(tmp_path)} == {3}
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    line = r"decoding\.texts comes to 2 now, and the records in .* of 3: set decoding\.texts=3"
    cli(f"run_dir={tmp_path}", "resume=true", "decoding.texts=2").refused(2, line)
