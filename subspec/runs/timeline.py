"""``profile=timeline``: trace and picture of link, draft, target and host during a few iterations.

A gap in the link's lane is unused bandwidth. ``timeline.json`` opens in Perfetto or chrome://tracing; ``timeline.png``
shows the same intervals.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from subspec.decoding.engine import Engine
from subspec.decoding.timing import Span

LANES = ("link", "draft", "decode", "target", "host")
COLOURS = {"link": "#3b6fb6", "draft": "#d98b2b", "target": "#4a9b5d", "decode": "#7b5aa6", "host": "#8a8a8a"}
WAITING = "#c44e52"
MEANINGS = {
    "link": "copies of layers",
    "draft": "drafting",
    "decode": "restoring coded layers",
    "target": "target's layers or passes",
    "host": "host at work",
}
ITERATIONS = 4
"""Iterations shown; a few more are traced, so that the first one shown is typical."""


@dataclass(frozen=True)
class Interval:
    """A busy interval of a lane, in seconds since the trace began."""

    lane: str
    name: str
    begin: float
    end: float


def record_timeline(engine: Engine, prompt_ids: Sequence[int], folder: Path) -> list[Path]:
    """Trace one generation and write ``timeline.json`` and ``timeline.png`` into ``folder``.

    Returns:
        The files written.
    """
    intervals = trace(engine, prompt_ids)
    trace_file, picture = folder / "timeline.json", folder / "timeline.png"
    trace_file.write_text(json.dumps(chrome_trace(intervals)), encoding="utf-8")
    draw(last_iterations(intervals), picture)
    return [trace_file, picture]


def trace(engine: Engine, prompt_ids: Sequence[int], iterations: int = ITERATIONS + 2) -> list[Interval]:
    """Generate a short text and return the intervals of every lane."""
    device = engine.target.device
    spans: list[Span] = []
    layers: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
    copies: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
    decodes: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
    decoder: Any = engine.target
    streamer = getattr(decoder, "streamer", None)
    decoding = getattr(decoder, "restorer", None)
    cuda = device.type == "cuda"
    base: torch.cuda.Event | None = None
    if cuda:
        torch.cuda.synchronize(device)
        base = torch.cuda.Event(enable_timing=True)
        base.record()
        torch.cuda.synchronize(device)
        if hasattr(decoder, "layer_log"):
            decoder.layer_log = layers
        if streamer is not None:
            streamer.copy_log = copies
        if decoding is not None:
            decoding.log = decodes
    zero = time.perf_counter()
    engine.trace = spans
    depth = engine.policy.max_depth if engine.policy is not None else 0
    try:
        engine.generate(prompt_ids, max_new_tokens=(depth + 1) * iterations, ignore_eos=True)
    finally:
        engine.trace = None
        if hasattr(decoder, "layer_log"):
            decoder.layer_log = None
        if streamer is not None:
            streamer.copy_log = None
        if decoding is not None:
            decoding.log = None
    if cuda:
        torch.cuda.synchronize(device)
    logs = {"target": layers, "link": copies, "decode": decodes}
    return _intervals(spans, logs, base, zero)


def _intervals(
    spans: list[Span],
    logs: Mapping[str, Sequence[tuple[int, torch.cuda.Event, torch.cuda.Event]]],
    base: torch.cuda.Event | None,
    zero: float,
) -> list[Interval]:
    found = [Interval("host", span.name, span.host_begin - zero, span.host_end - zero) for span in spans]
    lanes = {"draft": "draft", "prefill": "target", "verify": "target"}
    for span in spans:
        lane = lanes.get(span.name)
        if lane is None:
            continue
        if base is None:
            found.append(Interval(lane, span.name, span.host_begin - zero, span.host_end - zero))
        elif lane == "draft" or not logs["target"]:
            assert span.device_begin is not None
            assert span.device_end is not None
            begin, end = (base.elapsed_time(e) / 1e3 for e in (span.device_begin, span.device_end))
            found.append(Interval(lane, span.name, begin, end))
    what = {"target": "layer", "link": "copy", "decode": "decode"}
    for lane, log in logs.items():
        for index, begin, end in log:
            assert base is not None
            times = [base.elapsed_time(event) / 1e3 for event in (begin, end)]
            found.append(Interval(lane, f"{what[lane]} {index}", *times))
    return sorted(found, key=lambda interval: interval.begin)


def last_iterations(intervals: list[Interval], count: int = ITERATIONS) -> list[Interval]:
    """Intervals of the last ``count`` whole iterations, with times from the first of them."""
    starts = [i.begin for i in intervals if i.lane == "host" and i.name == "draft"]
    if len(starts) < 2:
        return intervals
    begin, end = starts[max(0, len(starts) - 1 - count)], starts[-1]
    inside = [i for i in intervals if i.end > begin and i.begin < end]
    return [Interval(i.lane, i.name, i.begin - begin, min(i.end, end) - begin) for i in inside]


def chrome_trace(intervals: Sequence[Interval]) -> dict[str, Any]:
    """The intervals in the Trace Event format (complete events, microseconds)."""
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": LANES.index(lane), "args": {"name": lane}} for lane in LANES
    ]
    events += [
        {
            "name": interval.name,
            "ph": "X",
            "pid": 1,
            "tid": LANES.index(interval.lane),
            "ts": interval.begin * 1e6,
            "dur": (interval.end - interval.begin) * 1e6,
        }
        for interval in intervals
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def busy_share(intervals: Sequence[Interval], lane: str) -> float:
    """Busy share of the lane in the shown time."""
    if not intervals:
        return 0.0
    end = max(i.end for i in intervals)
    begin = min(max(i.begin, 0.0) for i in intervals)
    covered, reached = 0.0, begin
    for interval in sorted((i for i in intervals if i.lane == lane), key=lambda i: i.begin):
        covered += max(0.0, interval.end - max(interval.begin, reached))
        reached = max(reached, interval.end)
    return covered / (end - begin) if end > begin else 0.0


def draw(intervals: Sequence[Interval], file: Path) -> None:
    """Draw one row per lane, time from left to right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(14, 3.6), constrained_layout=True)
    lanes = [lane for lane in LANES if any(i.lane == lane for i in intervals)]
    for row, lane in enumerate(lanes):
        own = [i for i in intervals if i.lane == lane]
        bars = [(i.begin * 1e3, (i.end - i.begin) * 1e3) for i in own]
        alternating = [COLOURS[lane], _lighter(COLOURS[lane])]
        if lane == "host":
            colours = [WAITING if i.name.startswith("wait") else COLOURS[lane] for i in own]
        else:
            colours = [alternating[n % 2] for n in range(len(own))]
        axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=colours, linewidth=0)
    shares = {lane: busy_share(intervals, lane) for lane in lanes}
    axes.set_yticks(range(len(lanes)), [f"{lane}\n{100 * shares[lane]:.0f} % busy" for lane in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_xlim(left=0)
    axes.set_title("Activity during the last iterations of a text (shades tell neighbours apart)", fontsize=10)
    entries = {MEANINGS[lane]: COLOURS[lane] for lane in lanes} | {"host waiting for the device": WAITING}
    patches = [Patch(color=colour, label=meaning) for meaning, colour in entries.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _lighter(colour: str) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)
