"""A prediction as text for people, and as a picture."""

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from subspec.planning.predict import Prediction

PLANTED = "planted weights: the speed is real, but they are no language model and their acceptance is not a text's"


def depth_table(prediction: Prediction) -> Table:
    """Tokens per second over tree depths; ``<`` marks the fastest."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for heading in ("depth", "tau", "resident", "draft s", "pass s", "tokens/s", "x plain", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    best, plain = prediction.best, prediction.plain
    for one in prediction.depths:
        way, fastest = one.iteration, one is best
        speed = Text(f"{way.tokens_per_s:.1f}{' <' if fastest else '  '}", style="bold" if fastest else "")
        table.add_row(
            f"{one.depth}{'*' * one.extrapolated}",
            f"{way.tau:.2f}",
            f"{one.resident}",
            f"{way.draft_s:.3f}",
            f"{way.pass_s:.3f}",
            speed,
            "-" if plain is None else f"{way.tokens_per_s / plain.tokens_per_s:.1f}",
            "-" if way.ceiling is None else f"{way.tokens_per_s / way.ceiling:.2f}",
        )
    return table


def remarks(prediction: Prediction, planted: bool, level_source: str) -> list[str]:
    """Assumptions and remarks behind the figures, one line each."""
    machine, plain = prediction.machine, prediction.plain
    lines = [
        f"link {machine.link_gb_per_s:.1f} GB/s, device memory {machine.memory_gb_per_s:.0f} GB/s",
        f"acceptance: {prediction.acceptance.source}",
        f"{_unit(prediction)}: {1e3 * prediction.level_s:.2f} ms ({level_source})",
    ]
    if machine.disk_gb_per_s is not None:
        lines[0] += f", disk {machine.disk_gb_per_s:.1f} GB/s"
    if prediction.acceptance.passes < 1:
        how = "the proposer's weights are read; the host's work is left out"
        how = how if machine.proposals_s is None else "proposals_ms, set by hand"
        lines.append(f"proposals for a pass: {1e3 * prediction.proposals_s:.2f} ms ({how})")
    if plain is None:
        lines.append("plain decoding: does not fit this budget")
    else:
        lines.append(f"plain streaming in this budget: {plain.tokens_per_s:.2f} tokens/s")
    way = prediction.best.iteration
    over = f", {way.tokens_per_s / plain.tokens_per_s:.1f} times plain streaming" if plain else ""
    depth = prediction.best.depth
    levels = prediction.acceptance.levels(depth)
    average = f" ({levels:.1f} levels on average)" if levels < depth else ""
    lines.append(f"best: depth {depth}{average}, {way.tokens_per_s:.1f} tokens/s{over}")
    if prediction.adaptive and not prediction.acceptance.drafted:
        lines.append("tree=adaptive stops by itself at about the best depth")
    if way.ceiling is not None and way.pass_s > 1.1 * way.tau / way.ceiling:
        lines.append(
            "a pass waits for the GPU, not for the link: it restores coded layers and multiplies the tree's rows"
        )
    lines.append("pass s: what is left of a pass after drafting, during which the link has filled the ring")
    lines.append("share: of the link's ceiling at that tau")
    if any(one.extrapolated for one in prediction.depths):
        lines.append(f"* deeper than acceptance was measured for ({prediction.acceptance.depth}): extrapolated")
    if prediction.too_deep:
        lines.append(f"depths that do not fit the budget: {', '.join(map(str, prediction.too_deep))}")
    lines += prediction.acceptance.notes
    lines.append(
        "a model, not a measurement: decoding only, no prefill; experiments/predict states its errors on real runs"
    )
    if planted:
        lines.append(PLANTED)
    return lines


def plot(prediction: Prediction, title: str, planted: bool, file: Path) -> None:
    """Tokens per second over depth, under the link's ceiling.

    ``file`` ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    depths = prediction.depths
    speeds = [one.iteration.tokens_per_s for one in depths]
    axes.plot([one.depth for one in depths], speeds, "-o", color="#0072B2", label="draft, then verify")
    ceilings = [(one.depth, one.iteration.ceiling) for one in depths if one.iteration.ceiling is not None]
    if ceilings:
        axes.plot(*zip(*ceilings, strict=True), ":", color="#666666", label="ceiling of the link at that tau")
    if prediction.plain is not None:
        axes.axhline(prediction.plain.tokens_per_s, color="#009E73", linestyle="-.", label="plain streaming")
    axes.set_xlabel("depth of the draft tree (levels)")
    axes.set_ylabel("predicted decoding speed (tokens/s)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)  # inside, it would cover a line
    words = f"{title}\npredicted" + (", PLANTED weights" if planted else "")
    axes.set_title(words, fontsize=10)
    figure.savefig(file, dpi=150)


def _unit(prediction: Prediction) -> str:
    """A draft level, or a pass of a cascade, which grows several."""
    return "draft level" if prediction.acceptance.passes == 1 else f"pass of the substitute, {prediction.rows} rows"
