"""A plan as a table: every allocation with its share of the budget, and the ceilings that the link sets.

Example::

    RunConsole().rich.print(plan_table(plan))
"""

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from subspec.config.enums import Codec
from subspec.config.schema import Placement
from subspec.memory.allocator import GIB
from subspec.planning.plan import TAUS, Plan

BAR, NARROW_BAR = 12, 8
"""Columns of a full bar (the whole budget), and on a console of less than ``NARROW`` columns."""

NARROW = 100

LAYERS_SHOWN = 8
"""Resident layers listed by number; more are given as their first and last ones."""


class _PlanTable:
    """Renders for a console's width and encoding, which may lack block characters."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plan = self.plan
        parts: list[Any] = [Text(title(plan), style="bold")]
        for place, limit, whole in (
            (Placement.device, plan.budget, "budget"),
            (Placement.host, plan.host_limit, "host memory"),
        ):
            if plan.total(place):
                parts.append(_items(plan, place, limit, whole, options))
        parts.append(_facts(plan))
        if plan.pass_seconds:
            parts += [Text(), _ceilings(plan)]
        yield Group(*parts, *[Text(f"note: {note}", style="yellow") for note in plan.notes])


def plan_table(plan: Plan) -> _PlanTable:
    return _PlanTable(plan)


def title(plan: Plan) -> str:
    card = f" on {plan.card.name}" if plan.card else ""
    return f"plan: target {plan.target}, draft {plan.draft}, {gib(plan.budget)} GiB{card}"


def fact_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Label and text of the lines between the tables, without unknown figures."""
    layers = len(plan.resident_layers) + len(plan.streamed_layers)
    yield "resident layers", _numbers(plan.resident_layers, layers)
    if plan.streamed_layers:
        size = plan.layer_bytes / GIB
        coded = ", coded by the substitute" if plan.codec is Codec.substitute else ""
        disk = f"; {len(plan.disk_layers)} of them from a disk" if plan.disk_layers else ""
        yield "streamed layers", f"{len(plan.streamed_layers)} of {layers}, {size:.3f} GiB each{coded}{disk}"
    if plan.total(Placement.device):
        yield "embedding table", f"on the {plan.embedding.value}"
    yield "prefill", f"{plan.prefill_chunk} tokens per sweep over the weights"
    if plan.link is not None:
        yield "link", f"{plan.link.gb_per_s:.1f} GB/s ({plan.link.source})"
    two_links = bool(plan.disk_layers) and plan.disk is not plan.link
    if two_links:
        known = plan.disk and f"{plan.disk.gb_per_s:.1f} GB/s ({plan.disk.source})"
        yield "disk", known or "measured when the run starts; offload.disk_gb_per_s=X plans with it"
    if plan.streamed_layers:
        floor = "" if plan.pass_seconds is None else f", at least {plan.pass_seconds:.3f} s"
        slower = f" (the {plan.slower_link} is slower)" if floor and two_links else ""
        disk = f", {plan.disk_bytes_per_pass / 1e9:.2f} GB from the disk" if two_links else ""
        yield "target pass", f"{plan.streamed_bytes_per_pass / 1e9:.2f} GB over the link{disk}{floor}{slower}"
    if plan.level_read_bytes:
        read = f"{plan.level_read_bytes / 1e9:.2f} GB of device memory"
        if plan.card is not None and plan.level_seconds is not None:
            read += f", at least {1e3 * plan.level_seconds:.1f} ms at {plan.card.memory_gb_per_s:.0f} GB/s"
        yield "draft level", read


def gib(size: int) -> str:
    """Bytes as GiB with two decimals; ``<0.01`` for sizes that would read 0.00."""
    value = size / GIB
    return f"{value:.2f}" if value >= 0.005 or not size else "<0.01"


def _items(plan: Plan, place: Placement, limit: int | None, whole: str, options: ConsoleOptions) -> Table:
    bar = BAR if options.max_width >= NARROW else NARROW_BAR
    full, empty = ("#", ".") if options.ascii_only else ("█", "░")

    def share(size: int) -> list[str]:
        if not limit:
            return []
        filled = round(bar * size / limit)
        return [f"{full * filled}{empty * (bar - filled)} {100 * size / limit:3.0f} %"]

    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    table.add_column(f"on the {place.value}", no_wrap=True, min_width=19)
    table.add_column("GiB", justify="right", no_wrap=True, min_width=5)
    if limit:
        table.add_column(f"of the {whole}", no_wrap=True, min_width=bar + 6)
    table.add_column("", style="dim", overflow="fold")
    for item in plan.items:
        if item.place is place:
            table.add_row(item.name, gib(item.bytes), *share(item.bytes), item.note)
    table.add_section()
    total = plan.total(place)
    left = f"{gib(limit - total)} GiB left" if limit else ""
    if limit and place is Placement.device:
        left = f"{gib(limit - total)} left, {gib(plan.headroom)} kept free"
    table.add_row("total", gib(total), *share(total), left, style="bold")
    if place is Placement.device and not plan.vram.items:
        cuda = plan.vram.cuda
        table.add_row(cuda.name, gib(cuda.bytes), "", f"beside the budget; {cuda.note}")
    return table


def _facts(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, text in fact_lines(plan):
        table.add_row(Text(label), Text(text))
    return table


def _ceilings(plan: Plan) -> Table:
    """Ceilings of the link: tau / seconds per pass, and plain decoding in the same budget."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
    table.add_column(f"ceiling of the {plan.slower_link} at", no_wrap=True)
    for tau in TAUS:
        table.add_column(f"tau {tau}", justify="right", no_wrap=True)
    table.add_column("plain decoding", justify="right", no_wrap=True)
    cells = [_number(plan.ceiling(tau)) for tau in TAUS]
    plain = _number(plan.plain_ceiling)
    if plan.plain_resident is not None:
        plain += f" ({plan.plain_resident} resident)"
    table.add_row("tokens/s", *cells, plain)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _numbers(layers: tuple[int, ...], count: int) -> str:
    if not layers or len(layers) == count:
        return "all" if layers else "none"
    if len(layers) > LAYERS_SHOWN:
        shown = [*map(str, layers[: LAYERS_SHOWN - 2]), "...", str(layers[-1])]
    else:
        shown = [*map(str, layers)]
    return f"{len(layers)} of {count}: {', '.join(shown)}"
