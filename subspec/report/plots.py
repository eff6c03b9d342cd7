"""The report's pictures. Each function takes rows and returns a matplotlib figure, or None where nothing fits it.

No figure goes without the words for planted weights and sample prompts: a picture travels further than the page
around it. Colours are those of Okabe and Ito, which stay apart for colour-blind readers and in grey; nothing is told
by colour alone. Figures are made without pyplot, whose state is shared by all threads of a process.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspec.records.method import config_group, method_label
from subspec.records.table import FROM_NOISE
from subspec.report.bootstrap import Interval
from subspec.report.rows import Row
from subspec.report.tables import number

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One more than colours: the eighth name has the first one's colour and another shape."""
PHASES = {"draft": ("#E69F00", ""), "target": ("#0072B2", "//"), "other": ("#999999", "..")}
PHASE_NAMES = {"draft": "drafting", "target": "target pass and verification", "other": "other"}

WIDTH = 9.0
"""Inches of a figure with one column of panels."""

BAR = 0.36
"""Inches of height per bar."""

LABEL = 38
"""Characters of a method's label before it is broken onto a second line."""

FOOT = 0.45
"""Inches at the bottom for a footnote of two lines."""

FOOT_LINE = 0.14
"""Inches of another line of it."""

LEGEND_LINE, LEGEND_EDGE = 0.18, 0.2
"""Inches of a legend's line, and of its frame."""

SAME_PASS = 1.02
"""Passes of one length, up to what measurements of the link differ by."""

PLANTED = (
    "PLANTED weights: made-up, real speed but no language model; acceptance comes from quantization noise."
)
PLANTED_DRAFT = (
    "PLANTED weights: made-up, real speed but no language model; acceptance means nothing but a substitute's."
)
SAMPLE = "SAMPLE prompts packaged with the project, not the benchmark: do not compare with published figures."
CPU = (
    "On a CPU there is no link to hide behind: speeds here say nothing about offloading. Look at acceptance."
)

Drawing = Callable[[Sequence[Row]], Figure | None]


def speed(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second by method and benchmark, with 95 % bootstrap intervals over samples."""
    shown = [row for row in rows if row.speed is not None]
    panels = _places(shown)
    if not panels:
        return None
    figure, axes = _bars(panels, "Decoding speed by method")
    styles = _styles(sorted({row.draft for row in shown}))
    for axis, members in zip(axes, panels.values(), strict=True):
        for place, row in enumerate(members):
            bar = row.speed
            axis.barh(place, bar.value, height=0.7, color=styles[row.draft][0])
            if bar.low is not None:
                axis.errorbar(
                    bar.value, place, xerr=_whiskers(bar), fmt="none", ecolor="black", capsize=3, linewidth=1
                )
            edge = bar.high if bar.high is not None else bar.value
            axis.text(edge, place, f" {number(bar.value)}", va="center", ha="left", fontsize=8)
        axis.set_xlim(0, 1.14 * max((row.speed.high or row.speed.value) for row in members))
    axes[-1].set_xlabel("decoding speed (tokens/s); whiskers: 95 % interval over samples")
    return _finish(figure, shown)


def tau_by_method(rows: Sequence[Row]) -> Figure | None:
    """Tokens per target pass by method and benchmark: what a draft is worth wherever it runs."""
    shown = [row for row in rows if row.draft != "none" and row.totals["tau"] is not None]
    panels = _places(shown)
    if not panels:
        return None
    figure, axes = _bars(panels, "Acceptance length by method")
    styles = _styles(sorted({row.draft for row in rows}))  # as in the picture of speeds
    for axis, members in zip(axes, panels.values(), strict=True):
        for place, row in enumerate(members):
            tau = row.totals["tau"]
            axis.barh(place, tau, height=0.7, color=styles[row.draft][0])
            axis.text(tau, place, f" {number(tau)}", va="center", ha="left", fontsize=8)
        axis.set_xlim(0, 1.14 * max(row.totals["tau"] for row in members))
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
    axes[-1].set_xlabel("tau (tokens per target pass); dotted: plain decoding")
    return _finish(figure, shown)


def time_split(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per iteration: drafting, the target's pass, and the rest."""
    shown = [row for row in rows if row.iteration is not None]
    panels = _places(shown)
    if not panels:
        return None
    figure, axes = _bars(panels, "Where the time of an iteration goes")
    for axis, members in zip(axes, panels.values(), strict=True):
        for place, row in enumerate(members):
            left = 0.0
            for phase, (colour, hatch) in PHASES.items():
                length = 1e3 * row.iteration[phase]
                axis.barh(
                    place,
                    length,
                    left=left,
                    height=0.7,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0,
                    label=PHASE_NAMES[phase],
                )
                left += length
            axis.text(left, place, f" {number(left)} ms", va="center", ha="left", fontsize=8)
        axis.set_xlim(0, 1.18 * max(1e3 * sum(row.iteration.values()) for row in members))
    axes[-1].set_xlabel("milliseconds per iteration (one draft tree and one target pass)")
    return _finish(figure, shown, _legend(figure, axes, columns=3))


def acceptance(rows: Sequence[Row]) -> Figure | None:
    """Of the passes that drafted a depth, the share that accepted it. Deep levels of an adaptive tree are few."""
    shown = [row for row in rows if row.totals["drafted_by_depth"]]
    panels = _places(shown)
    if not panels:
        return None
    figure, axes = _grid(len(panels), "Acceptance by depth of the draft tree")
    styles = _styles(sorted({row.method for row in rows}))  # one method per draft: the colours of its bars
    for axis, (title, members) in zip(axes, panels.items(), strict=True):
        for row in members:
            rates = [
                (d, r) for d, r in enumerate(row.totals["accept_rate_by_depth"], start=1) if r is not None
            ]
            colour, dash, marker = styles[row.method]
            depths, values = zip(*rates, strict=True)
            many = len(depths) > 16
            axis.plot(
                depths,
                values,
                dash,
                color=colour,
                marker=marker,
                markevery=4 if many else 1,
                markersize=4,
                label=row.method,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("depth (draft tokens)")
        axis.set_ylabel("accepted / drafted at this depth")
        axis.set_ylim(0, 1.03)
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    return _finish(figure, shown, _legend(figure, axes, columns=2))


def tau_by_bits(rows: Sequence[Row]) -> Figure | None:
    """Mean acceptance length against the bits per weight of the substitute; None unless they differ somewhere."""
    shown = [row for row in rows if row.nominal_bits is not None and row.totals["tau"] is not None]
    stored = all(row.bits is not None for row in shown)
    targets: dict[str, list[Row]] = {}
    for row in shown:
        targets.setdefault(_target(row), []).append(row)
    if len({_bits(row, stored) for row in shown}) < 2:
        return None
    figure, axes = _grid(len(targets), "Acceptance length by bits of the substitute")
    styles = _styles(sorted({_without_bits(row) for row in shown}))
    for axis, (title, members) in zip(axes, targets.items(), strict=True):
        series: dict[str, list[Row]] = {}
        for row in members:
            series.setdefault(_without_bits(row), []).append(row)
        for name, points in series.items():
            points = sorted(points, key=lambda row: _bits(row, stored))
            colour, dash, marker = styles[name]
            bits = [_bits(row, stored) for row in points]
            taus = [row.totals["tau"] for row in points]
            axis.plot(bits, taus, dash, color=colour, marker=marker, markersize=6, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("bits per weight" + (", scales and zeros included" if stored else " (nominal)"))
        axis.set_ylabel("tau (tokens per target pass)")
        axis.margins(0.12)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    return _finish(figure, shown, _legend(figure, axes, columns=2))


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second against tau, under what the link allows: tau / (bytes per pass / bandwidth)."""
    shown = [row for row in rows if row.ceilings and row.speed is not None and row.totals["tau"] is not None]
    targets: dict[str, list[Row]] = {}
    for row in shown:
        targets.setdefault(_target(row), []).append(row)
    if not targets:
        return None
    figure, axes = _grid(len(targets), "Speed under the link's ceiling (roofline)")
    styles = _styles(sorted({row.method for row in rows}))
    for axis, (title, members) in zip(axes, targets.items(), strict=True):
        most = 1.15 * max(row.totals["tau"] for row in members)
        for index, (name, passes, methods) in enumerate(_ceilings(members)):
            colour = styles[methods[0]][0] if len(methods) == 1 else "#666666"
            ends = dict.fromkeys(number(1e3 * seconds) for seconds in (passes[0], passes[-1]))
            axis.plot(
                [0, most],
                [0, most * len(passes) / sum(passes)],
                DASHES[index % len(DASHES)],
                color=colour,
                linewidth=1.2,
                alpha=0.8,
                label=f"ceiling, {name}: {' to '.join(ends)} ms a pass",
            )
        for row in members:
            colour, _, marker = styles[row.method]
            axis.errorbar(
                row.totals["tau"],
                row.speed.value,
                yerr=_whiskers(row.speed),
                fmt=marker,
                color=colour,
                capsize=3,
                markersize=7,
                label=row.method,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tau (tokens per target pass)")
        axis.set_ylabel("decoding speed (tokens/s)")
        axis.set_xlim(0, most)
        axis.set_ylim(0, 1.25 * max(row.totals["roofline_tokens_per_s"] for row in members))
        axis.grid(alpha=0.3)
    return _finish(figure, shown, _legend(figure, axes, columns=2))


DRAWINGS: dict[str, Drawing] = {
    "speed": speed,
    "tau_by_method": tau_by_method,
    "acceptance": acceptance,
    "tau_by_bits": tau_by_bits,
    "time_split": time_split,
    "roofline": roofline,
}
"""By the name of their files, in the order of the report."""

MISSING = {
    "speed": "no run has decoded anything",
    "tau_by_method": "no run drafts",
    "acceptance": "no run drafts",
    "tau_by_bits": "no two runs quantize their draft to different bits",
    "time_split": "no run has an iteration",
    "roofline": "no run streams weights over a measured link (offload=stream)",
}
"""Why a figure is not there."""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with rc_context({"svg.hashsalt": "subspec", "svg.fonttype": "none"}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


# ------------------------------------------------------------------------------------------------ parts


def _places(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by panel title, in order."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        sample = " (sample prompts)" if row.sample else f" ({row.source})"
        panels.setdefault(f"{_target(row)}, {row.benchmark}{sample}", []).append(row)
    return panels


def _target(row: Row) -> str:
    return f"{row.target} (PLANTED)" if row.planted else row.target


def _bars(panels: Mapping[str, Sequence[Row]], title: str) -> tuple[Figure, list[Axes]]:
    """A column of panels with a labelled place for a bar per row."""
    counts = [len(members) for members in panels.values()]
    heights = [BAR * max(count, 2) + 0.5 for count in counts]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    several = len({row.experiment for members in panels.values() for row in members}) > 1
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        labels = [textwrap.fill(_label(row, several), LABEL) for row in members]
        axis.set_yticks(range(len(members)), labels, fontsize=8)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=12)
    return figure, list(axes)


def _grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Panels in two columns; one panel takes the whole width."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 3.6 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=12)
    return figure, list(axes[:count])


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> float:
    """One legend below all panels, each entry once; returns the inches it takes."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(columns, len(entries))
    height = LEGEND_LINE * -(-len(entries) // columns) + LEGEND_EDGE
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=columns, fontsize=8)
    return height


def _finish(figure: Figure, rows: Sequence[Row], legend: float = 0.0) -> Figure:
    """Say what must be said at the bottom, with the legend (``legend`` inches) above it, in room of their own."""
    lines = []
    if any(row.planted for row in rows):
        other = {row.draft for row in rows if row.planted} - FROM_NOISE
        lines.append(PLANTED_DRAFT if other else PLANTED)
    if any(row.sample for row in rows):
        lines.append(SAMPLE)
    if any(row.on_cpu and row.draft != "none" for row in rows):
        lines.append(CPU)
    foot = FOOT + FOOT_LINE * max(0, len(lines) - 2) if lines else 0.0
    figure.set_figheight(figure.get_figheight() + foot)
    height = figure.get_figheight()
    share = (foot + legend) / height
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    for box in figure.legends:
        box.set_bbox_to_anchor((0.5, foot / height), figure.transFigure)
    if lines:
        text = "\n".join(lines)
        figure.text(0.01, 0.1 / height, text, fontsize=7.5, va="bottom", ha="left", color="#8a2b00")
    return figure


def _whiskers(interval: Interval) -> list[list[float]] | None:
    """Lengths below and above; rounding may put an estimate a hair outside its own interval."""
    if interval.low is None or interval.high is None:
        return None
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, dash and marker by name: dashes change once the colours are used up."""
    return {
        name: (
            PALETTE[index % len(PALETTE)],
            DASHES[index // len(PALETTE) % len(DASHES)],
            MARKERS[index % len(MARKERS)],
        )
        for index, name in enumerate(names)
    }


def _label(row: Row, several: bool) -> str:
    """A bar's name; with its experiment where the picture has bars of ``several``."""
    return f"{row.experiment}: {row.method}" if row.experiment and several else row.method


def _bits(row: Row, stored: bool) -> float:
    return row.bits if stored and row.bits is not None else float(row.nominal_bits or 0)


def _without_bits(row: Row) -> str:
    """Rows that differ in bits alone make one line."""
    config = {**row.runs[0].config, "quant": {}}
    quantizer = config_group(row.runs[0].config, "quant").get("name")
    return f"{row.benchmark}: {method_label(config, row.runs[0].facts)}, {quantizer}"


def _ceilings(rows: Sequence[Row]) -> list[tuple[str, list[float], list[str]]]:
    """Distinct ceilings, the highest first: what is streamed, ascending seconds of its passes, the methods under it.

    Passes within :data:`SAME_PASS` of the fastest share a ceiling: the link is measured anew by every run.
    """
    found: list[tuple[str, list[float], list[str]]] = []
    each = sorted((name, seconds, row.method) for row in rows for name, seconds in row.ceilings)
    for name, seconds, method in each:
        if not found or found[-1][0] != name or seconds > found[-1][1][0] * SAME_PASS:
            found.append((name, [], []))
        _, passes, methods = found[-1]
        passes.append(seconds)
        if method not in methods:
            methods.append(method)
    return sorted(found, key=lambda one: one[1])
