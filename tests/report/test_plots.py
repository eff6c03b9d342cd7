"""What the pictures say, read off matplotlib's own objects."""

import pytest
from matplotlib.colors import to_rgba

from subspec.records.metrics import LinkInfo
from subspec.records.summary_table import ON_CPU, PLANTED_DRAFT, PLANTED_WEIGHTS, SAMPLE_PROMPTS
from subspec.report.layout import PALETTE, save, styles_of
from subspec.report.plots import (
    DRAWINGS,
    acceptance,
    accepted_lengths,
    conditional_acceptance,
    roofline,
    speed,
    speedup_by_category,
    tau_by_bits,
    tau_by_category,
    tau_by_method,
    time_split,
)

from .runs import config_of, plain_run, rows_below, turns, write_run

LINK = LinkInfo(50.0, 5_000_000_000)
TAU = "tau (tokens per target pass)"
LABELS = {
    speed: ("decoding speed (tokens/s)", ""),
    tau_by_method: (TAU, ""),
    acceptance: ("depth (draft tokens)", "accepted / drafted"),
    conditional_acceptance: ("depth (draft tokens)", "accepted, given the depth before"),
    accepted_lengths: ("accepted draft tokens", "share of passes"),
    tau_by_category: ("", TAU),
    speedup_by_category: ("", "speed-up over the baseline"),
    tau_by_bits: ("bits per weight", TAU),
    time_split: ("milliseconds per iteration", ""),
    roofline: (TAU, "decoding speed (tokens/s)"),
}


@pytest.fixture(params=[False, True], ids=["real", "planted"])
def rows(request, tmp_path):
    """Two methods at two widths of bits and plain decoding, streamed over a link."""
    source = "sample" if request.param else "hub"
    options = {"planted": request.param, "source": source, "link": LINK, "category": "algebra"}
    plain_run(tmp_path / "plain", **options)
    for bits, tau in ((4, 3), (3, 2)):
        quant = {"name": "hqq", "bits": bits}
        write_run(tmp_path / str(bits), turns([30.0, 20.0], tau=tau, **options), config_of(quant=quant))
    return rows_below(tmp_path)


def footnote(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ").lower()


def bar_labels(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


@pytest.mark.parametrize("draw", DRAWINGS, ids=lambda draw: draw.__name__)
def test_every_picture_has_titles_labels_units_and_what_must_be_said(rows, draw):
    figure = draw(rows)
    assert figure.get_suptitle()
    horizontal, vertical = LABELS[draw]
    assert figure.axes[-1].get_xlabel().startswith(horizontal)
    assert figure.axes[-1].get_ylabel().startswith(vertical)
    said = footnote(figure)
    assert (PLANTED_WEIGHTS in said) == rows[0].planted
    assert (SAMPLE_PROMPTS.removeprefix("note: ") in said) == rows[0].sample
    if rows[0].planted:
        assert all("(PLANTED)" in axis.get_title("left") + axis.get_title() for axis in figure.axes)


def test_a_legend_and_the_footnote_have_room_of_their_own(rows):
    for draw in DRAWINGS:
        figure = draw(rows)
        figure.draw_without_rendering()
        boxes = [legend.get_window_extent() for legend in figure.legends]
        boxes += [text.get_window_extent() for text in figure.texts if "prompts" in text.get_text()]
        for index, box in enumerate(boxes):
            others = [*boxes[index + 1 :], *(axis.get_tightbbox() for axis in figure.axes)]
            assert not any(box.overlaps(other) for other in others), draw.__name__


def test_a_draft_of_one_method_has_one_colour_in_all_pictures(tmp_path):
    drafts = ("eagle2", "small_model", "subspec")
    plain_run(tmp_path / "plain", link=LINK)
    for draft in drafts:
        write_run(tmp_path / draft, turns([30.0, 20.0], draft=draft, link=LINK), config_of(draft))
    rows = rows_below(tmp_path)
    bars = {row.draft: bar.get_facecolor() for row, bar in zip(rows, speed(rows).axes[0].patches, strict=True)}
    for picture in (acceptance(rows), roofline(rows)):
        handles, labels = picture.axes[0].get_legend_handles_labels()
        drawn = {
            label.split()[0].rstrip(","): to_rgba(getattr(handle, "lines", [handle])[0].get_color())
            for handle, label in zip(handles, labels, strict=True)
        }
        assert {draft: drawn[draft] for draft in drafts} == {draft: bars[draft] for draft in drafts}


def test_twenty_methods_look_different():
    names = [f"method {index}" for index in range(20)]
    assert len({(colour, marker) for colour, _, marker in styles_of(names).values()}) == len(names)


def test_a_picture_of_planted_drafts_does_not_call_them_noise(tmp_path):
    plain_run(tmp_path / "plain", planted=True)
    write_run(tmp_path / "a", turns([30.0], draft="small_model", planted=True), config_of("small_model"))
    said = footnote(speed(rows_below(tmp_path)))
    assert f"{PLANTED_DRAFT} (small_model)" in said
    assert PLANTED_WEIGHTS not in said


@pytest.mark.parametrize(
    ("draft", "device", "said"), [("subspec", "cpu", True), ("subspec", "cuda", False), ("none", "cpu", False)]
)
def test_a_cpu_says_what_its_speeds_are_not(tmp_path, draft, device, said):
    write_run(tmp_path / "run", turns([30.0, 20.0], draft=draft, device=device), config_of(draft))
    assert (ON_CPU.removeprefix("note: ").lower() in footnote(speed(rows_below(tmp_path)))) == said


# ------------------------------------------------------------------------------------------------- bars


def test_bars_are_as_long_as_speeds_with_whiskers_to_the_interval(rows):
    (axis,) = speed(rows).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([row.speed.value for row in rows])
    assert bar_labels(axis) == [row.method for row in rows]
    ends = [segment for lines in axis.collections for segment in lines.get_segments()]
    assert [(low[0], high[0]) for low, high in ends] == [pytest.approx((row.speed.low, row.speed.high)) for row in rows]


def test_bars_name_their_experiment_where_there_are_several(tmp_path):
    for experiment in ("first", "second"):
        write_run(tmp_path / experiment, turns([10.0]), config_of(experiment=experiment))
    rows = rows_below(tmp_path)
    assert [label.partition(":")[0] for label in bar_labels(speed(rows).axes[0])] == ["first", "second"]
    assert ":" not in bar_labels(speed(rows[:1]).axes[0])[0]


def test_taus_are_bars_of_their_length_without_plain_decoding(rows):
    (axis,) = tau_by_method(rows).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([2.0, 3.0])
    assert not any("plain" in label for label in bar_labels(axis))


def test_the_phases_of_an_iteration_add_up(rows):
    (axis,) = time_split(rows).axes
    bars = [bar.get_width() for bar in axis.patches]
    for row, phases in zip(rows, zip(bars[::3], bars[1::3], bars[2::3], strict=True), strict=True):
        assert sum(phases) == pytest.approx(1e3 * row.totals["decode_s"] / row.totals["iterations"])


def test_bars_of_categories_are_as_long_as_their_figures(rows):
    (axis,) = tau_by_category(rows).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["algebra", "Overall"]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([2.0, 2.0, 3.0, 3.0])
    (axis,) = speedup_by_category(rows).axes
    drafted = [row.baseline for row in rows if row.draft != "none"]
    gains = [gain.value for base in drafted for gain in (base.by_category["algebra"], base.speedup)]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx(gains)


# ------------------------------------------------------------------------------------- curves and points


@pytest.mark.parametrize(
    ("draw", "field"),
    [(acceptance, "accept_rate_by_depth"), (conditional_acceptance, "conditional_accept_rate_by_depth")],
)
def test_acceptance_curves_are_the_rates(rows, draw, field):
    (axis,) = draw(rows).axes
    drafted = [row for row in rows if row.draft != "none"]
    for line, row in zip(axis.lines, drafted, strict=True):
        assert list(line.get_ydata()) == row.totals[field]
        assert line.get_label() == row.method
        assert line.get_color() in PALETTE


def test_shares_of_accepted_lengths_add_up(rows):
    (axis,) = accepted_lengths(rows).axes
    assert len(axis.lines) == 2
    for line in axis.lines:
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        assert sum(line.get_ydata()) == pytest.approx(1)


def test_tau_over_bits_is_one_line_per_tree(rows):
    (axis,) = tau_by_bits(rows).axes
    (line,) = axis.lines
    assert list(line.get_xdata()) == [3, 4]
    assert list(line.get_ydata()) == pytest.approx([2.0, 3.0])
    assert axis.get_xlabel() == "bits per weight (nominal)"
    assert tau_by_bits([row for row in rows if row.nominal_bits != 3]) is None, "one width is no curve"


def test_points_on_one_spot_are_all_seen(tmp_path):
    for draft in ("subspec", "eagle2", "small_model"):
        write_run(tmp_path / draft, turns([10.0], draft=draft, link=LINK), config_of(draft))
    (axis,) = roofline(rows_below(tmp_path)).axes
    markers = [container.lines[0] for container in axis.containers]
    looks = [(line.get_fillstyle(), line.get_markersize()) for line in markers]
    assert looks == [("none", 17), ("none", 12), ("full", 7)]


def test_the_ceiling_has_the_slope_of_the_link(rows):
    (axis,) = roofline(rows).axes
    ceiling = next(line for line in axis.lines if str(line.get_label()).startswith("ceiling"))
    (x0, x1), (y0, y1) = ceiling.get_xdata(), ceiling.get_ydata()
    assert (y1 - y0) / (x1 - x0) == pytest.approx(50.0 / 5.0)
    assert ceiling.get_label() == "ceiling, plain weights: 100 ms a pass"


def test_passes_that_differ_by_the_links_measurement_share_a_ceiling(tmp_path):
    for seed, link in enumerate([LINK, LinkInfo(50.5, 5_000_000_000), LinkInfo(50.0, 6_000_000_000)]):
        draft = {"name": "subspec", "temperature": 1.0 + seed}
        write_run(tmp_path / str(seed), turns([10.0], link=link), config_of(draft))
    (axis,) = roofline(rows_below(tmp_path)).axes
    labels = [label for label in axis.get_legend_handles_labels()[1] if label.startswith("ceiling")]
    assert labels == ["ceiling, plain weights: 99.0 to 100 ms a pass", "ceiling, plain weights: 120 ms a pass"]


def test_nothing_is_drawn_of_nothing(tmp_path):
    plain_run(tmp_path / "plain")
    rows = rows_below(tmp_path)
    assert {draw for draw in DRAWINGS if draw(rows) is not None} == {speed, time_split}
    assert all(draw([]) is None for draw in DRAWINGS)


def test_files_are_pictures_and_repeatable(rows, tmp_path):
    first, again = ([file.read_bytes() for file in save(speed(rows), tmp_path / name)] for name in ("one", "two"))
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
    assert b"decoding speed (tokens/s)" in first[1], "text stays text"
    assert first[1] == again[1]
