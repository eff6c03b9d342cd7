"""Layout of a report's figures: bars and panels, one legend, and the warnings at the bottom.

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

from subspec.records.summary_table import PLANTED_DRAFT, PLANTED_WEIGHTS, banners
from subspec.report.bootstrap import Interval
from subspec.report.rows import Row, grouped

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours: the eighth name has another shape

# Inches.
WIDTH = 9.0
BAR = 0.36
FOOT = 0.45  # a footnote of up to two lines
FOOT_LINE = 0.14  # each further line
LEGEND_LINE, LEGEND_EDGE = 0.18, 0.2

LABEL, FOOT_CHARACTERS = 38, 150  # characters per line


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``; the same figure gives the same bytes."""
    files = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    with rc_context({"svg.hashsalt": "subspec", "svg.fonttype": "none"}):
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def target_label(row: Row) -> str:
    """Title of a panel of all prompts."""
    return f"{row.target} (PLANTED)" if row.planted else row.target


def place_label(row: Row) -> str:
    """Title of a panel of one benchmark."""
    return f"{target_label(row)}, {row.benchmark} ({'sample prompts' if row.sample else row.source})"


def bar_figure(
    rows: Sequence[Row],
    title: str,
    label: str,
    draw: Callable[[Axes, int, Row], tuple[float, str]],
    legend: int = 0,
    room: float = 1.14,
) -> Figure | None:
    """A column of panels with a labelled bar per row, drawn at its place by ``draw``; None without rows.

    Args:
        label: of the lowest axis.
        draw: returns the length of the bar and the text at its end.
        legend: columns of the legend; 0: none.
        room: length of the axis over the longest bar.
    """
    if not rows:
        return None
    panels = grouped(rows, place_label)
    heights = [BAR * max(len(members), 2) + 0.5 for members in panels.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    several = len({row.experiment for row in rows}) > 1
    for axis, (name, members) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, fontsize=9, loc="left")
        labels = [f"{row.experiment}: {row.method}" if row.experiment and several else row.method for row in members]
        axis.set_yticks(range(len(members)), [textwrap.fill(one, LABEL) for one in labels], fontsize=8)
        axis.set_ylim(len(members) - 0.4, -0.6)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        ends = [draw(axis, place, row) for place, row in enumerate(members)]
        for place, (end, text) in enumerate(ends):
            axis.text(end, place, f" {text}", va="center", ha="left", fontsize=8)
        axis.set_xlim(0, room * max(end for end, _ in ends))
    axes[-1].set_xlabel(label)
    figure.suptitle(title, fontsize=12)
    return _finish(figure, rows, legend)


def panel_figure(
    panels: Mapping[str, Sequence[Row]], title: str, draw: Callable[[Axes, Sequence[Row]], None]
) -> Figure | None:
    """Panels in two columns with a common legend; a single panel takes the whole width. None without panels."""
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
    return _finish(figure, [row for members in panels.values() for row in members], legend=2)


def _finish(figure: Figure, rows: Sequence[Row], legend: int) -> Figure:
    """Add a legend of ``legend`` columns with each entry once, the warnings below it, and room for both."""
    lines = [line for note in _warnings(rows) for line in textwrap.wrap(note, FOOT_CHARACTERS)]
    foot = FOOT + FOOT_LINE * max(0, len(lines) - 2) if lines else 0.0
    entries: dict[str, Any] = {}
    for axis in figure.axes if legend else ():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(legend, len(entries))
    room = foot + (LEGEND_LINE * -(-len(entries) // columns) + LEGEND_EDGE if entries else 0.0)
    height = figure.get_figheight() + room
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, room / height, 1, 1 - room / height))
    if entries:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, foot / height)}
        figure.legend(entries.values(), entries.keys(), ncols=columns, fontsize=8, **place)
    if lines:
        figure.text(0.01, 0.1 / height, "\n".join(lines), fontsize=7.5, va="bottom", ha="left", color="#8a2b00")
    return figure


def _warnings(rows: Sequence[Row]) -> list[str]:
    notes = dict.fromkeys(text.removeprefix("note: ") for row in rows for text in banners(row.summary))
    if PLANTED_DRAFT in notes:  # it says more of the same
        notes.pop(PLANTED_WEIGHTS, None)
    drafts = ", ".join(sorted({row.draft for row in rows if PLANTED_DRAFT in banners(row.summary)}))
    texts = [f"{note} ({drafts})" if note == PLANTED_DRAFT else note for note in notes]
    return [text[0].upper() + text[1:] for text in texts]


def whisker_lengths(interval: Interval) -> list[list[float]] | None:
    """Lengths below and above the estimate, which rounding may place just outside its interval."""
    if interval.low is None or interval.high is None:
        return None
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, dash and marker by name; dashes change after the last colour."""
    return {
        name: (PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }
