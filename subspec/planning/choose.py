"""The search for the best decision that fits a budget."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from subspec.config.defaults import MOST_TEXTS
from subspec.config.schema import Config, Placement
from subspec.drafts.check_config import one_text_key
from subspec.memory.allocator import headroom
from subspec.planning.memory_layout import Decision, MemoryLayout

CHUNK_STEP = 64
"""Prefill chunks are multiples of this."""


def choose(layout: MemoryLayout, budget: int) -> Decision | None:
    """The best decision whose device allocations and headroom fit ``budget`` bytes: most resident layers first.

    None if none fits.
    """
    found = [_choose(layout, budget - headroom(budget), placement) for placement in layout.placements()]
    # Resident layers, and the chunk up to its goal, matter more than the table's place.
    fitting = [one for one in found if one is not None]
    return max(fitting, key=lambda one: (one.resident, min(one.chunk, layout.goal)), default=None)


def _choose(layout: MemoryLayout, room: int, embedding: Placement) -> Decision | None:
    def used(resident: int, chunk: int) -> int:
        return layout.device_bytes(Decision(resident, chunk, embedding))

    least, most = len(layout.required_resident), layout.spec.layers
    if layout.offload.resident_layers is not None:
        least = most = layout.offload.resident_layers
    chunks, ceiling = _chunks(layout.goal, layout.most_chunk), room
    resident = next((n for n in range(most, least - 1, -1) if used(n, layout.goal) <= room), None)
    if resident is not None:
        taken = used(resident, layout.goal)
        ceiling = taken + (room - taken) // 2
    elif used(least, layout.least_chunk) <= room:
        resident, chunks = least, _chunks(layout.least_chunk, layout.goal)
    else:
        return None
    # The largest chunk that fits; the smallest one does, and larger ones take more.
    place = bisect_left(chunks, True, lo=1, key=lambda chunk: used(resident, chunk) > ceiling)
    return Decision(resident, chunks[place - 1], embedding)


def _chunks(least: int, most: int) -> list[int]:
    """Candidate chunk sizes, ascending: both bounds and the multiples of 64 between them."""
    first = (least // CHUNK_STEP + 1) * CHUNK_STEP
    return sorted({least, *range(first, most, CHUNK_STEP), most})


def least_decision(layout: MemoryLayout) -> Decision:
    pinned = layout.offload.resident_layers
    resident = len(layout.required_resident) if pinned is None else pinned
    return Decision(resident, layout.least_chunk, layout.placements()[-1])


def with_tiers(layout: MemoryLayout, decision: Decision, limit: int | None) -> Decision | None:
    """``decision`` with the fewest layers on a disk whose host allocations fit ``limit`` bytes; None: none fits.

    Without ``offload.ram_gib`` no layer is left to a disk.
    """
    tried = [decision]
    if layout.offload.ram_gib is not None:
        most = layout.spec.layers - decision.resident
        tried += [replace(decision, disk=disk, in_files=True) for disk in range(most + 1)]
    return next((one for one in tried if limit is None or layout.host_bytes(one) <= limit), None)


def with_most_texts(config: Config, streamed: Callable[[Config], int | None]) -> Config:
    """``config`` with the number of texts that is worth the most side by side; 1 if its draft runs one at a time.

    Args:
        streamed: streamed layers of a configuration; None: it does not fit.
    """

    def with_texts(texts: int) -> Config:
        return replace(config, decoding=replace(config.decoding, texts=texts))

    return with_texts(1 if one_text_key(config) else most_texts(lambda texts: streamed(with_texts(texts))))


def most_texts(streamed: Callable[[int], int | None]) -> int:
    """The number of texts that is worth the most: a pass takes the time of its streamed layers, and one layer more.

    Args:
        streamed: layers beside a number of texts; None: they do not fit.
    """
    best, worth = 1, 0.0
    for texts in range(1, MOST_TEXTS + 1):
        layers = streamed(texts)
        if layers is None:
            break
        if texts / (1 + layers) >= worth:
            best, worth = texts, texts / (1 + layers)
    return best
