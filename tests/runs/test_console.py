import contextlib
import io
import os
import pty
import re
import time

import pytest

from subspec.records.metrics import LinkInfo, speedup, summarise
from subspec.records.summary_table import ON_CPU, PLANTED_DRAFT, PLANTED_WEIGHTS, SAMPLE_PROMPTS, banners
from subspec.runs.console import RunConsole, RunProgress
from subspec.runs.turn import skipped_record
from subspec.utils.terminal import one_line
from tests.helpers.cli import Forked
from tests.helpers.records import CONTEXT, record


def printed(width, *arguments):
    stream = io.StringIO()
    RunConsole(stream, width=width).table(*arguments)
    return stream.getvalue()


def skipped(index):
    return skipped_record(CONTEXT, sample_id=f"s{index}", sample_index=index, prompt_tokens=500, limit=400)


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("width", [50, 80, 120])
def test_the_final_table_is_legible(width):
    link = LinkInfo(gb_per_s=25.0, bytes_per_pass=13_050_000_000)
    records = [record(index, link=link, peak_vram_gib=7.89) for index in range(4)]
    records.append(skipped(9))
    summary = summarise(records)
    text = printed(width, summary, speedup(summary, summarise(records[:2]), "plain"))
    body = text.split("note: ")[0]
    assert max(map(len, body.splitlines())) <= width
    assert "\x1b" not in text
    assert "…" not in text, "nothing is cut"
    totals = summary["totals"]
    rate = summary["per_turn"]["tokens_per_s"]
    spread = f" {rate['mean']:.2f} ± {rate['sd']:.2f}" if width > 50 else " "
    for part in (
        f"decode speed (tokens/s) {totals['tokens_per_s']:.2f}{spread}",
        f"acceptance length tau {totals['tau']:.2f}",
        f"roofline {totals['roofline_tokens_per_s']:.2f} tokens/s",
        "target tiny, draft subspec, benchmark gsm8k, cpu, seed 3",
        "correct answers 2 of 3 checked (66.7 %)",
        "passed: tokens exact 40, near-ties 4 (largest gap 0.003, margin 0.01), mismatches 0",
        "samples 4, turns 4; skipped prompts: prompt_too_long 1",
        *("finished by eos 4", "RAM 4.00 GiB, GPU 7.89 GiB", "data source file", "1:1.00"),
        *("speed-up over plain", "not the same samples: 4 against 2"),
    ):
        assert part in squeezed(text)


def test_what_would_mislead_is_said():
    def lines(**fields):
        return banners(summarise([record(0, **fields)]))

    assert lines(device="cuda") == []
    assert lines(device="cuda", source="sample") == [SAMPLE_PROMPTS]
    assert "packaged sample prompts, not the benchmark" in SAMPLE_PROMPTS
    assert lines(device="cuda", planted=True) == [PLANTED_WEIGHTS]
    assert lines(device="cuda", planted=True, draft="small_model") == [PLANTED_DRAFT]
    assert "means nothing" in PLANTED_DRAFT
    assert lines(device="cpu") == [ON_CPU]
    assert lines(device="cpu", draft="none") == []
    failed = lines(device="cuda", audit={"exact": 1, "near_tie": 0, "mismatch": 3, "max_gap": 2.0, "margin": 0.1})
    assert "AUDIT FAILED: 3 token(s)" in failed[0]
    text = squeezed(printed(80, summarise([record(0, source="sample", planted=True)])))
    for part in ("packaged sample prompts, not the", "planted weights", "target tiny (planted)", "gsm8k (sample)"):
        assert part in text


def test_an_empty_run_and_a_single_turn_have_a_table():
    assert "samples 0" in squeezed(printed(80, summarise([])))
    one = squeezed(printed(80, summarise([record(0, audit=None, correct=None)])))
    assert "±" not in one.split("median")[1], "one turn has no standard deviation"
    assert "not run (audit=true runs it)" in one
    assert "correct answers" not in one
    cut = squeezed(printed(80, summarise([record(0, audit=None, correct=None, finish_reason="length")])))
    assert "correct answers 0 of 0 checked; 1 cut before an answer" in cut


def test_a_deep_tree_still_fits():
    deep = record(0, drafted_by_depth=[4] * 48, accepted_by_depth=[2] * 48)
    text = printed(80, summarise([deep]))
    assert "1:0.50  2:0.50  4:0.50  8:0.50  16:0.50  32:0.50  48:0.50" in text


# ------------------------------------------------------------------------------------------------ progress


def test_without_a_terminal_one_plain_line_per_sample():
    stream = io.StringIO()
    console = RunConsole(stream)
    assert not console.live
    with console.progress(total=4, done=1) as progress:
        for turn in (0, 1):
            progress.turn(record(1, turn))
        progress.sample_finished(record(1, 0), record(1, 1))
        console.note("a note [bold]not markup[/bold] :smile: " + "long " * 60)
        progress.sample_finished(skipped(2))
        mismatch = {"exact": 1, "near_tie": 0, "mismatch": 1, "max_gap": 9.0, "margin": 0.1}
        progress.sample_finished(record(3, audit=mismatch))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", stream.getvalue())
    assert lines[0].startswith("[2/4] s1  24 tokens  ")
    assert "tau 2.75" in lines[0]
    assert "wrong  wrong" in lines[0]
    assert lines[1].startswith("a note [bold]not markup[/bold] :smile: long")
    assert lines[2].startswith("[3/4] s2  skipped: prompt_too_long  elapsed 0:00:0")
    assert "AUDIT: 1 mismatch(es)" in lines[3]
    assert "left 0:00:00" in lines[3]
    assert f"so far {record(1)['tokens_per_s']:.2f} tokens/s, tau 2.75, correct 0/2" in lines[3]


@pytest.mark.parametrize("live", [False, True])
def test_progress_of_several_texts(live, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = RunConsole(FakeTerminal() if live else io.StringIO(), width=120)
    with console.progress(total=9, texts=3) as progress:
        progress.running = 3
        progress.turn(record(0, loop_s=2.0))
        progress.turn(record(1, loop_s=1.0))
        tokens = record(0)["new_tokens"] + record(1)["new_tokens"]
        assert progress.rates().startswith(f"{tokens / 3:.2f} tokens/s together, tau")
        if live:
            assert progress.figures().startswith("0/9 samples, 3 running  ")


def test_forced_colours_do_not_reach_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = RunConsole(stream)
    console.warn("careful")
    console.table(summarise([record(0)]))
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("warning: careful\n")


def test_time_left_counts_this_sessions_samples_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = RunProgress(RunConsole(io.StringIO()), total=12, done=10)
    assert progress.remaining_s is None
    assert (progress.tokens_per_s, progress.tau) == (None, None)
    now[0] = 130.0
    progress.turn(record(0))
    progress.sample_finished(record(0))
    assert progress.elapsed_s == 30.0
    assert progress.remaining_s == 30.0
    assert progress.tokens_per_s == record(0)["tokens_per_s"]


def test_messages_cannot_draw_on_the_screen():
    assert one_line("a\nb\x1b[31mc\u2028d\x07\t e") == "a b?[31mc d?  e"
    stream = io.StringIO()
    RunConsole(stream).error("two\nlines")
    assert stream.getvalue() == "error: two lines\n"
    RunConsole(stream).note("")
    assert stream.getvalue().count("\n") == 1


def test_an_encoding_without_the_signs():
    raw = io.BytesIO()
    console = RunConsole(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.table(summarise([record(0), record(1)]))
    console.note("sample «é»")
    text = raw.getvalue().decode("ascii")
    assert "+/-" in text
    assert "sample ?" in text


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("width", "kind", "colour"), [(50, "xterm", False), (100, "xterm", True), (50, "dumb", None)])
def test_progress_on_other_terminals(width, kind, colour, monkeypatch):
    """Narrow: the figures stay on one line. NO_COLOR: no colours. Dumb: no control codes at all."""
    monkeypatch.setenv("TERM", kind)
    (monkeypatch.delenv if colour else monkeypatch.setenv)("NO_COLOR", *([False] if colour else ["1"]))
    stream = FakeTerminal()
    console = RunConsole(stream, width=width)
    with console.progress(total=3) as progress:
        progress.turn(record(0))
        progress.sample_finished(record(0))
        console.warn("look here")
    codes = re.findall(r"\x1b\[([\d;]*)m", stream.getvalue())
    assert any(re.search(r"\b3\d\b", code) for code in codes) == bool(colour)
    assert ("\x1b" in stream.getvalue()) == (kind != "dumb")
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    assert any(re.search(r"1/3\b.* [\d.]+ tok\w*/s,? +tau 3\.33.* left 0:00:00", line) for line in lines)
    assert kind == "dumb" or max(map(len, lines)) <= width


def run_with_a_warning(_):
    console = RunConsole()
    with console.progress(total=3, done=1) as progress:
        for index in (0, 1):
            progress.turn(record(index))
            progress.sample_finished(record(index))
            console.warn("look here")


def test_a_terminal_gets_a_bar():
    parent, child = pty.openpty()
    env = {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": None}
    process = Forked(log=child, env=env, entry=run_with_a_warning)
    os.close(child)
    output = b""
    with contextlib.suppress(OSError):  # the terminal closes with its last process
        while chunk := os.read(parent, 65536):
            output += chunk
    os.close(parent)
    assert process.wait() == 0
    text = output.decode()
    assert "━" in text
    assert "warning: look here" in text
    last = text.rsplit("samples", 1)[0][-4:] + text.rsplit("samples", 1)[1]
    assert last.startswith("3/3 ")
    assert "tokens/s" in last
    assert "tau 3.00" in last
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor is shown again"
