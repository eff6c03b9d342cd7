"""``profile=timeline``: trace and picture of link, draft, target and host during a few iterations.

A gap in the link's lane is unused bandwidth. ``timeline.json`` opens in Perfetto or chrome://tracing; ``timeline.png``
shows the same intervals.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from subspec.decoding.engine import Engine
from subspec.decoding.timing import Span

LANES = {
    "link": ("#3b6fb6", "copies of layers"),
    "draft": ("#d98b2b", "drafting"),
    "decode": ("#7b5aa6", "restoring coded layers"),
    "target": ("#4a9b5d", "target's layers or passes"),
    "host": ("#8a8a8a", "host at work"),
}
"""Colour and meaning of every lane."""
WAITING = ("#c44e52", "host waiting for the device")
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
    """Trace one generation, and write ``timeline.json`` and ``timeline.png`` into ``folder``; returns both."""
    intervals = trace(engine, prompt_ids)
    trace_file, picture = folder / "timeline.json", folder / "timeline.png"
    trace_file.write_text(json.dumps(chrome_trace(intervals)), encoding="utf-8")
    draw(last_iterations(intervals), picture)
    return [trace_file, picture]


def trace(engine: Engine, prompt_ids: Sequence[int]) -> list[Interval]:
    """Generate a short text and return the intervals of every lane."""
    target: Any = engine.target
    logged = []  # lane, what its events are of, and the attribute that they are appended to
    base: torch.cuda.Event | None = None
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
        base = torch.cuda.Event(enable_timing=True)
        base.record()
        torch.cuda.synchronize(target.device)
        streamer, restorer = getattr(target, "streamer", None), getattr(target, "restorer", None)
        logs = (target, "layer_log"), (streamer, "copy_log"), (restorer, "log")
        names = ("target", "layer"), ("link", "copy"), ("decode", "decode")
        logged = [(*name, *log) for name, log in zip(names, logs, strict=True) if hasattr(*log)]
    spans: list[Span] = []
    zero, engine.trace = time.perf_counter(), spans
    for *_, owner, attribute in logged:
        setattr(owner, attribute, [])
    depth = engine.policy.max_depth if engine.policy is not None else 0
    try:
        engine.generate(prompt_ids, max_new_tokens=(depth + 1) * (ITERATIONS + 2), ignore_eos=True)
    finally:
        engine.trace = None
        events = [
            (lane, f"{what} {index}", begin, end)
            for lane, what, owner, attribute in logged
            for index, begin, end in getattr(owner, attribute)
        ]
        for *_, owner, attribute in logged:
            setattr(owner, attribute, None)
    found = [Interval("host", span.name, span.host_begin - zero, span.host_end - zero) for span in spans]
    layers = any(lane == "target" for lane, *_ in events)
    for span, host in zip(spans, tuple(found), strict=True):
        lane = {"draft": "draft", "prefill": "target", "verify": "target"}.get(span.name)
        if lane and base is None:
            found.append(replace(host, lane=lane))
        elif lane == "draft" or (lane and not layers):
            events.append((lane, span.name, span.device_begin, span.device_end))
    if base is not None:
        torch.cuda.synchronize(target.device)
        for lane, name, *pair in events:
            found.append(Interval(lane, name, *(base.elapsed_time(event) / 1e3 for event in pair)))
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
    row = {lane: number for number, lane in enumerate(LANES)}
    names = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": row[lane], "args": {"name": lane}} for lane in LANES]
    events = [
        {"name": i.name, "ph": "X", "pid": 1, "tid": row[i.lane], "ts": i.begin * 1e6, "dur": (i.end - i.begin) * 1e6}
        for i in intervals
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


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
        colour, _ = LANES[lane]
        if lane == "host":
            colours = [WAITING[0] if i.name.startswith("wait") else colour for i in own]
        else:
            colours = [(colour, (1.0, 0.5)[n % 2]) for n in range(len(own))]
        axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=colours, linewidth=0)
    axes.set_yticks(range(len(lanes)), [f"{lane}\n{100 * busy_share(intervals, lane):.0f} % busy" for lane in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_xlim(left=0)
    axes.set_title("Activity during the last iterations of a text (shades tell neighbours apart)", fontsize=10)
    patches = [Patch(color=colour, label=meaning) for colour, meaning in (*(LANES[lane] for lane in lanes), WAITING)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
