"""Plots of a report. Each function takes rows and returns a matplotlib figure, or None without data for it.

The docstring of a function is the caption of its figure.
"""

from collections.abc import Callable, Sequence
from math import isclose

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subspec.records.method import config_group, method_label
from subspec.report import layout
from subspec.report.layout import bar_figure, panel_figure, styles_of, whisker_lengths
from subspec.report.rows import OVERALL, PLAIN, Row, grouped
from subspec.report.tables import number

PHASES = {
    "draft": ("drafting", "#E69F00", ""),
    "target": ("target pass and verification", "#0072B2", "//"),
    "other": ("other", "#999999", ".."),
}
SAME_PASS = 1.02  # ratio up to which passes are equally long; measurements of the link differ by as much
SAME_SPOT = 0.02  # relative distance up to which points cover each other

Drawing = Callable[[Sequence[Row]], Figure | None]


def speed(rows: Sequence[Row]) -> Figure | None:
    """Decoding speed: all tokens over all seconds; whiskers are 95 % bootstrap intervals over samples."""
    shown = [row for row in rows if row.speed is not None]
    styles = styles_of(sorted({row.draft for row in shown}))

    def draw(axis: Axes, place: int, row: Row) -> tuple[float, str]:
        bar = row.speed
        axis.barh(place, bar.value, height=0.7, color=styles[row.draft][0])
        if (whiskers := whisker_lengths(bar)) is not None:
            axis.errorbar(bar.value, place, xerr=whiskers, fmt="none", ecolor="black", capsize=3, linewidth=1)
        return bar.high or bar.value, number(bar.value)

    label = "decoding speed (tokens/s); whiskers: 95 % interval over samples"
    return bar_figure(shown, "Decoding speed by method", label, draw)


def tau_by_method(rows: Sequence[Row]) -> Figure | None:
    """Tokens per target pass, the bonus token included; independent of the hardware."""
    shown = [row for row in rows if row.draft != PLAIN and row.totals["tau"] is not None]
    styles = styles_of(sorted({row.draft for row in rows}))  # the colours of the plot of speeds

    def draw(axis: Axes, place: int, row: Row) -> tuple[float, str]:
        tau = row.totals["tau"]
        axis.barh(place, tau, height=0.7, color=styles[row.draft][0])
        axis.axvline(1.0, color="black", linewidth=1, linestyle=":")
        return tau, number(tau)

    label = "tau (tokens per target pass); dotted: plain decoding"
    return bar_figure(shown, "Acceptance length by method", label, draw)


def time_split(rows: Sequence[Row]) -> Figure | None:
    """Time of an iteration by phase, prefill excluded."""
    shown = [row for row in rows if row.iteration is not None]

    def draw(axis: Axes, place: int, row: Row) -> tuple[float, str]:
        left = 0.0
        for phase, (name, colour, hatch) in PHASES.items():
            length, look = 1e3 * row.iteration[phase], {"color": colour, "hatch": hatch, "edgecolor": "white"}
            axis.barh(place, length, left=left, height=0.7, linewidth=0, label=name, **look)
            left += length
        return left, f"{number(left)} ms"

    label = "milliseconds per iteration (one draft tree and one target pass)"
    return bar_figure(shown, "Where the time of an iteration goes", label, draw, legend=3, room=1.18)


def acceptance(rows: Sequence[Row]) -> Figure | None:
    """Share of the passes that accepted a depth, of those that drafted it."""
    label = "accepted / drafted at this depth"
    return _curves(rows, "Acceptance by depth of the draft tree", label, "accept_rate_by_depth")


def conditional_acceptance(rows: Sequence[Row]) -> Figure | None:
    """Share of the passes that accepted a depth, of those that drafted it and accepted the one before."""
    label = "accepted, given the depth before"
    return _curves(rows, "Conditional acceptance by depth", label, "conditional_accept_rate_by_depth")


def accepted_lengths(rows: Sequence[Row]) -> Figure | None:
    """Share of the passes by number of accepted draft tokens."""
    return _curves(rows, "Accepted draft tokens per pass", "share of passes", "accepted_histogram")


def _curves(rows: Sequence[Row], title: str, label: str, field: str) -> Figure | None:
    """A curve per method of the total ``field``, a list by depth."""
    shown = [row for row in rows if row.totals["drafted_by_depth"] and row.totals[field]]
    styles = styles_of(sorted({row.method for row in rows}))  # one method per draft: the colours of its bars
    counts = field == "accepted_histogram"

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        for row in members:
            values = enumerate(row.totals[field], start=0 if counts else 1)
            scale = row.totals["iterations"] if counts else 1
            points = [(depth, value / scale) for depth, value in values if value is not None]
            colour, dash, marker = styles[row.method]
            look = {"color": colour, "marker": marker, "markersize": 4, "label": row.method}
            steps = "steps-mid" if counts else "default"
            every = 4 if len(points) > 16 else 1
            axis.plot(*zip(*points, strict=True), dash, markevery=every, drawstyle=steps, **look)
        axis.set_xlabel("accepted draft tokens" if counts else "depth (draft tokens)")
        axis.set_ylabel(label)
        axis.set_ylim(0, None if counts else 1.03)
        axis.set_xlim(left=-0.5 if counts else 0)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return panel_figure(grouped(shown, layout.place_label), title, draw)


def tau_by_category(rows: Sequence[Row]) -> Figure | None:
    """Tokens per target pass by category of the samples."""
    shown = [row for row in rows if row.draft != PLAIN]
    return _categories(shown, rows, "Acceptance length by category", "tau (tokens per target pass)", "tau")


def speedup_by_category(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over the baseline by category of the samples."""
    shown = [row for row in rows if row.baseline and row.baseline.speedup]
    return _categories(shown, rows, "Speed-up by category", "speed-up over the baseline", "speedup")


def _categories(shown: Sequence[Row], rows: Sequence[Row], title: str, label: str, field: str) -> Figure | None:
    """Bars of the figure ``field`` by category and method."""
    shown = [row for row in shown if row.categories]
    styles = styles_of(sorted({row.method for row in rows}))

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        names = [*sorted({name for row in members for name in row.categories} - {OVERALL}), OVERALL]
        width = 0.8 / len(members)
        for index, row in enumerate(members):
            figures = {name: one[field] for name, one in row.categories.items() if one[field] is not None}
            heights = [getattr(figure, "value", figure) for figure in figures.values()]
            places = [names.index(name) + (index - (len(members) - 1) / 2) * width for name in figures]
            axis.bar(places, heights, width, color=styles[row.method][0], label=row.method)
        axis.set_axisbelow(True)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel(label)

    return panel_figure(grouped(shown, layout.place_label), title, draw)


def tau_by_bits(rows: Sequence[Row]) -> Figure | None:
    """Tokens per target pass against the bits of the substitute."""
    shown = [row for row in rows if row.nominal_bits is not None and row.totals["tau"] is not None]
    stored = all(row.bits is not None for row in shown)
    bits = {row: float(row.bits if stored else row.nominal_bits) for row in shown}
    if len(set(bits.values())) < 2:
        return None
    styles = styles_of(sorted({_without_bits(row) for row in shown}))

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        for name, series in grouped(members, _without_bits).items():
            points = sorted((bits[row], row.totals["tau"]) for row in series)
            colour, dash, marker = styles[name]
            axis.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, markersize=6, label=name)
        axis.set_xlabel("bits per weight" + (", scales and zeros included" if stored else " (nominal)"))
        axis.set_ylabel("tau (tokens per target pass)")
        axis.margins(0.12)
        axis.set_ylim(bottom=0)

    return panel_figure(grouped(shown, layout.target_label), "Acceptance length by bits of the substitute", draw)


def _without_bits(row: Row) -> str:
    """Label of the line of rows that differ in bits alone."""
    run = row.runs[0]
    quantizer = config_group(run.config, "quant").get("name")
    return f"{row.benchmark}: {method_label({**run.config, 'quant': {}}, run.facts)}, {quantizer}"


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Speed against tau, under tau / (streamed bytes / measured link bandwidth)."""
    shown = [row for row in rows if row.ceilings and row.speed is not None and row.totals["tau"] is not None]
    styles = styles_of(sorted({row.method for row in rows}))

    def draw(axis: Axes, members: Sequence[Row]) -> None:
        most = 1.15 * max(row.totals["tau"] for row in members)
        for index, (name, passes, methods) in enumerate(_ceilings(members)):
            colour = styles[methods[0]][0] if len(methods) == 1 else "#666666"
            ends = dict.fromkeys(number(1e3 * seconds) for seconds in (passes[0], passes[-1]))
            label = f"ceiling, {name}: {' to '.join(ends)} ms a pass"
            line, dash = [0, most * len(passes) / sum(passes)], layout.DASHES[index % len(layout.DASHES)]
            axis.plot([0, most], line, dash, color=colour, linewidth=1.2, alpha=0.8, label=label)
        points = [(row.totals["tau"], row.speed.value) for row in members]
        for index, (row, point) in enumerate(zip(members, points, strict=True)):
            colour, _, marker = styles[row.method]
            # Points that later ones cover are larger and hollow, so that all of them are seen.
            covered = sum(_is_close(point, later) for later in points[index + 1 :])
            look = {"fmt": marker, "color": colour, "capsize": 3, "markersize": 7 + 5 * covered}
            look |= {"fillstyle": "none" if covered else "full", "label": row.method}
            axis.errorbar(*point, yerr=whisker_lengths(row.speed), **look)
        axis.set_xlabel("tau (tokens per target pass)")
        axis.set_ylabel("decoding speed (tokens/s)")
        axis.set_xlim(0, most)
        axis.set_ylim(0, 1.25 * max(row.totals["roofline_tokens_per_s"] for row in members))

    return panel_figure(grouped(shown, layout.target_label), "Speed under the link's ceiling (roofline)", draw)


def _is_close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(isclose(*pair, rel_tol=SAME_SPOT) for pair in zip(one, other, strict=True))


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


DRAWINGS: dict[Drawing, str] = {
    speed: "no run has decoded anything",
    tau_by_method: "no run drafts",
    acceptance: "no run drafts",
    conditional_acceptance: "no run drafts, or an earlier version has recorded a run",
    accepted_lengths: "no run drafts",
    tau_by_category: "no run drafts for samples with categories",
    speedup_by_category: "no run of samples with categories has a baseline",
    tau_by_bits: "no two runs quantize their draft to different bits",
    time_split: "no run has an iteration",
    roofline: "no run streams weights over a measured link (offload=stream)",
}
"""In the order of the report, each with the reason why it may be missing. A figure's file has its function's name."""
