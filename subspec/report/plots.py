"""Plots of a report. Each function takes rows and returns a matplotlib figure, or None without data for it.

Every figure carries the warnings about planted weights and sample prompts, because it is shown without the page around
it. Colours are those of Okabe and Ito, which colour-blind readers and grey prints can tell apart; markers, dashes or
hatches repeat their information. Figures are made without pyplot, whose state is shared by all threads of a process.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspec.records.method import config_group, method_label
from subspec.records.summary_table import FROM_NOISE
from subspec.report.bootstrap import Interval
from subspec.report.rows import Row
from subspec.report.tables import number

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One more than colours: the eighth name repeats the first colour with another shape."""
PHASES = {"draft": ("#E69F00", ""), "target": ("#0072B2", "//"), "other": ("#999999", "..")}
PHASE_NAMES = {"draft": "drafting", "target": "target pass and verification", "other": "other"}

WIDTH = 9.0
"""Width of every figure in inches."""

BAR = 0.36
"""Inches per bar."""

LABEL = 38
"""Characters per line of a method's label."""

FOOT = 0.45
"""Inches of a footnote of up to two lines."""

FOOT_LINE = 0.14
"""Inches of each further line."""

LEGEND_LINE, LEGEND_EDGE = 0.18, 0.2
"""Inches of a legend's line and of its frame."""

SAME_PASS = 1.02
"""Ratio up to which passes count as equally long; measurements of the link differ by as much."""

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

    def draw(axis: Axes, place: int, row: Row) -> float:
        bar = row.speed
        axis.barh(place, bar.value, height=0.7, color=styles[row.draft][0])
        if (whiskers := _whiskers(bar)) is not None:
            axis.errorbar(bar.value, place, xerr=whiskers, fmt="none", ecolor="black", capsize=3, linewidth=1)
        edge = bar.high if bar.high is not None else bar.value
        axis.text(edge, place, f" {number(bar.value)}", va="center", ha="left", fontsize=8)
        return bar.high or bar.value

    styles = _styles(sorted({row.draft for row in shown}))
    label = "decoding speed (tokens/s); whiskers: 95 % interval over samples"
    return _bars(shown, "Decoding speed by method", label, draw)


def tau_by_method(rows: Sequence[Row]) -> Figure | None:
    """Tokens per target pass by method and benchmark; independent of the hardware."""
    shown = [row for row in rows if row.draft != "none" and row.totals["tau"] is not None]

    def draw(axis: Axes, place: int, row: Row) -> float:
        tau = row.totals["tau"]
        axis.barh(place, tau, height=0.7, color=styles[row.draft][0])
        axis.text(tau, place, f" {number(tau)}", va="center", ha="left", fontsize=8)
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
        return tau

    styles = _styles(sorted({row.draft for row in rows}))  # the colours of the plot of speeds
    label = "tau (tokens per target pass); dotted: plain decoding"
    return _bars(shown, "Acceptance length by method", label, draw)


def time_split(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per iteration: drafting, the target's pass, and the rest."""
    shown = [row for row in rows if row.iteration is not None]

    def draw(axis: Axes, place: int, row: Row) -> float:
        left = 0.0
        for phase, (colour, hatch) in PHASES.items():
            length, look = 1e3 * row.iteration[phase], {"color": colour, "hatch": hatch, "edgecolor": "white"}
            axis.barh(place, length, left=left, height=0.7, linewidth=0, label=PHASE_NAMES[phase], **look)
            left += length
        axis.text(left, place, f" {number(left)} ms", va="center", ha="left", fontsize=8)
        return left

    label = "milliseconds per iteration (one draft tree and one target pass)"
    return _bars(shown, "Where the time of an iteration goes", label, draw, legend=3, room=1.18)


def acceptance(rows: Sequence[Row]) -> Figure | None:
    """Share of the passes that drafted a depth and accepted it. Adaptive trees seldom draft deep levels."""
    shown = [row for row in rows if row.totals["drafted_by_depth"]]
    styles = _styles(sorted({row.method for row in rows}))  # one method per draft: the colours of its bars

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        for row in members:
            rates = enumerate(row.totals["accept_rate_by_depth"], start=1)
            depths, values = zip(*[(depth, rate) for depth, rate in rates if rate is not None], strict=True)
            colour, dash, marker = styles[row.method]
            look = {"color": colour, "marker": marker, "markersize": 4, "label": row.method}
            axis.plot(depths, values, dash, markevery=4 if len(depths) > 16 else 1, **look)
        axis.set_xlabel("depth (draft tokens)")
        axis.set_ylabel("accepted / drafted at this depth")
        axis.set_ylim(0, 1.03)
        axis.set_xlim(left=0)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return _panels(shown, _places(shown), "Acceptance by depth of the draft tree", draw)


def tau_by_bits(rows: Sequence[Row]) -> Figure | None:
    """Acceptance length against bits per weight of the substitute; None unless the bits differ."""
    shown = [row for row in rows if row.nominal_bits is not None and row.totals["tau"] is not None]
    stored = all(row.bits is not None for row in shown)
    if len({_bits(row, stored) for row in shown}) < 2:
        return None
    styles = _styles(sorted({_without_bits(row) for row in shown}))

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        for name, series in _grouped(members, _without_bits).items():
            points = sorted((_bits(row, stored), row.totals["tau"]) for row in series)
            colour, dash, marker = styles[name]
            axis.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markersize=6, label=name)
        axis.set_xlabel("bits per weight" + (", scales and zeros included" if stored else " (nominal)"))
        axis.set_ylabel("tau (tokens per target pass)")
        axis.margins(0.12)
        axis.set_ylim(bottom=0)

    return _panels(shown, _grouped(shown, _target), "Acceptance length by bits of the substitute", draw)


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Tokens per second against tau, under the link's limit: tau / (bytes per pass / bandwidth)."""
    shown = [row for row in rows if row.ceilings and row.speed is not None and row.totals["tau"] is not None]
    styles = _styles(sorted({row.method for row in rows}))

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        most = 1.15 * max(row.totals["tau"] for row in members)
        for index, (name, passes, methods) in enumerate(_ceilings(members)):
            colour = styles[methods[0]][0] if len(methods) == 1 else "#666666"
            ends = dict.fromkeys(number(1e3 * seconds) for seconds in (passes[0], passes[-1]))
            label = f"ceiling, {name}: {' to '.join(ends)} ms a pass"
            line, dash = [0, most * len(passes) / sum(passes)], DASHES[index % len(DASHES)]
            axis.plot([0, most], line, dash, color=colour, linewidth=1.2, alpha=0.8, label=label)
        for row in members:
            colour, _, marker = styles[row.method]
            look = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 7, "label": row.method}
            axis.errorbar(row.totals["tau"], row.speed.value, yerr=_whiskers(row.speed), **look)
        axis.set_xlabel("tau (tokens per target pass)")
        axis.set_ylabel("decoding speed (tokens/s)")
        axis.set_xlim(0, most)
        axis.set_ylim(0, 1.25 * max(row.totals["roofline_tokens_per_s"] for row in members))

    return _panels(shown, _grouped(shown, _target), "Speed under the link's ceiling (roofline)", draw)


DRAWINGS: dict[str, Drawing] = {
    "speed": speed,
    "tau_by_method": tau_by_method,
    "acceptance": acceptance,
    "tau_by_bits": tau_by_bits,
    "time_split": time_split,
    "roofline": roofline,
}
"""By file name, in the order of the report."""

MISSING = {
    "speed": "no run has decoded anything",
    "tau_by_method": "no run drafts",
    "acceptance": "no run drafts",
    "tau_by_bits": "no two runs quantize their draft to different bits",
    "time_split": "no run has an iteration",
    "roofline": "no run streams weights over a measured link (offload=stream)",
}
"""Reason of a missing figure."""


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with rc_context({"svg.hashsalt": "subspec", "svg.fonttype": "none"}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


# ------------------------------------------------------------------------------------------------ parts


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by ``key``, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _places(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by target, benchmark and source."""

    def title(row: Row) -> str:
        source = "sample prompts" if row.sample else row.source
        return f"{_target(row)}, {row.benchmark} ({source})"

    return _grouped(rows, title)


def _target(row: Row) -> str:
    return f"{row.target} (PLANTED)" if row.planted else row.target


def _bars(
    rows: Sequence[Row],
    title: str,
    label: str,
    draw: Callable[[Axes, int, Row], float],
    legend: int = 0,
    room: float = 1.14,
) -> Figure | None:
    """A column of panels with a labelled bar per row; None without rows.

    Args:
        title, label: of the figure and of the lowest axis.
        draw: draws the bar of a row at its place and returns its length.
        legend: columns of the legend; 0: none.
        room: length of the axis over the longest bar.
    """
    panels = _places(rows)
    if not panels:
        return None
    heights = [BAR * max(len(members), 2) + 0.5 for members in panels.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    several = len({row.experiment for row in rows}) > 1
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        labels = [textwrap.fill(_label(row, several), LABEL) for row in members]
        axis.set_yticks(range(len(members)), labels, fontsize=8)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.set_xlim(0, room * max(draw(axis, place, row) for place, row in enumerate(members)))
    axes[-1].set_xlabel(label)
    figure.suptitle(title, fontsize=12)
    return _finish(figure, rows, _legend(figure, axes, legend) if legend else 0.0)


def _panels(
    rows: Sequence[Row],
    panels: Mapping[str, Sequence[Row]],
    title: str,
    draw: Callable[[Axes, Sequence[Row]], None],
) -> Figure | None:
    """Panels in two columns with a common legend; a single panel takes the whole width. None without rows."""
    if not panels:
        return None
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 3.6 * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, members) in zip(axes, panels.items(), strict=False):
        draw(axis, members)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    return _finish(figure, rows, _legend(figure, axes[: len(panels)], columns=2))


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> float:
    """Add one legend below all panels, each entry once; returns its height in inches."""
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
    """Add the warnings at the bottom, below the legend of ``legend`` inches, and make room for both."""
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
    """Lengths below and above the estimate, which rounding may place just outside its interval."""
    if interval.low is None or interval.high is None:
        return None
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def _styles(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, dash and marker by name; dashes change after the last colour."""
    return {
        name: (
            PALETTE[index % len(PALETTE)],
            DASHES[index // len(PALETTE) % len(DASHES)],
            MARKERS[index % len(MARKERS)],
        )
        for index, name in enumerate(names)
    }


def _label(row: Row, several: bool) -> str:
    """Name of a bar, with its experiment if the figure shows ``several``."""
    return f"{row.experiment}: {row.method}" if row.experiment and several else row.method


def _bits(row: Row, stored: bool) -> float:
    return row.bits if stored and row.bits is not None else float(row.nominal_bits or 0)


def _without_bits(row: Row) -> str:
    """Label of the line of rows that differ in bits alone."""
    config = {**row.runs[0].config, "quant": {}}
    quantizer = config_group(row.runs[0].config, "quant").get("name")
    return f"{row.benchmark}: {method_label(config, row.runs[0].facts)}, {quantizer}"


def _ceilings(rows: Sequence[Row]) -> list[tuple[str, list[float], list[str]]]:
    """Distinct ceilings, the highest first: kind of streamed weights, ascending seconds per pass, methods.

    Passes within :data:`SAME_PASS` of the fastest share a ceiling, because every run measures the link anew.
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
