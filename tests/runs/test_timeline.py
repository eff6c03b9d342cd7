"""A timeline's shares by hand, and the files a run on the CPU leaves."""

import json

import pytest

from subspec.runs.timeline import LANES, Interval, busy_share, chrome_trace, draw, last_iterations
from tests.helpers.cli import done, records_of, tiny_run


def lane(name, *spans):
    return [Interval(name, name, begin, end) for begin, end in spans]


def test_shares_count_overlapping_intervals_once():
    intervals = lane("link", (0, 2), (1, 3), (1.5, 2.5), (5, 6)) + lane("host", (0, 10))
    assert busy_share(intervals, "link") == pytest.approx(0.4)
    assert busy_share(intervals, "host") == 1
    assert busy_share(intervals, "draft") == 0
    assert busy_share([], "link") == 0


def test_the_last_iterations_begin_with_a_draft_and_are_whole():
    drafts = [Interval("host", "draft", begin, begin + 1.0) for begin in range(0, 20, 2)]
    verifies = [Interval("target", "verify", draft.end, draft.end + 1) for draft in drafts]
    shown = last_iterations(sorted(drafts + verifies, key=lambda i: i.begin), count=3)
    assert [i.name for i in shown] == ["draft", "verify"] * 3
    assert shown[0].begin == 0
    assert max(i.end for i in shown) == 6


def test_the_trace_is_what_perfetto_reads():
    events = chrome_trace([Interval("target", "layer 3", 0.5, 0.75)])["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    (event,) = (e for e in events if e["ph"] == "X")
    assert set(names.values()) == set(LANES)
    assert (names[event["tid"]], event["ts"], event["dur"]) == ("target", 0.5e6, 0.25e6)


def test_a_text_of_one_token_can_be_drawn(tmp_path):
    draw(last_iterations(lane("host", (0.0, 0.1))), tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("draft", ["subspec", "none"])
def test_a_run_with_a_timeline_counts_as_one_without(checkpoint, tmp_path, draft):
    arguments = [f"draft={draft}", "tree.depth=4"]
    for folder, profile in (("with", "timeline"), ("without", "none")):
        ran = done(*tiny_run(checkpoint, tmp_path / folder), *arguments, f"profile={profile}")
        assert (f"timeline: {tmp_path / folder / 'timeline.png'}" in ran.out) == (profile == "timeline")
    emitted = [[r["token_ids"] for r in records_of(tmp_path / name)] for name in ("with", "without")]
    assert emitted[0] == emitted[1]
    assert not (tmp_path / "without" / "timeline.json").exists()
    trace = json.loads((tmp_path / "with" / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {event["name"] for event in trace if event["ph"] == "X"}
    assert {"prefill", "draft", "verify", "accept"} <= names
    assert all(event["dur"] >= 0 for event in trace if event["ph"] == "X")
    assert (tmp_path / "with" / "timeline.png").read_bytes().startswith(b"\x89PNG")
