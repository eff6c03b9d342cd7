"""Refusals of the planner: the arithmetic, and the change that would make the run fit, in one line."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.enums import Codec
from subspec.config.schema import (
    AdaptiveTreeConfig,
    Config,
    NoDraftConfig,
    Placement,
)
from subspec.errors import ConfigError
from subspec.planning.layout import CHUNK_STEP, Choice, Item, Layout
from subspec.planning.sizes import GIB, least_budget

SMALL = GIB // 20
"""Pieces below 0.05 GiB are summed up as the rest."""

SHORTEST = 256
"""Tokens below which no shorter ``decoding.max_length`` is proposed: a chat turn needs as much."""

SHALLOWEST = 4
"""Levels below which no smaller ``tree.depth`` is proposed."""


def refuse_device(
    layout: Layout, model: PretrainedConfig, budget: int, choose: Callable[[Layout], Choice | None]
) -> ConfigError:
    """The budget cannot hold the run even with the fewest layers resident and the smallest prefill chunk.

    Args:
        choose: finds a choice of a changed layout within the same budget, or None.
    """
    least = least_choice(layout)
    items = [item for item in layout.items(least) if item.place is Placement.device]
    used = sum(item.bytes for item in items)
    needed = least_budget(used)
    items.append(Item("kept free", needed - used, Placement.device))
    helps = next((text for text, changed in _changes(layout) if _fits(layout, changed, model, choose)), None)
    remedy = f"or {helps}" if helps else "no other single change is enough"
    return ConfigError(
        f"offload.vram_gib={layout.offload.vram_gib:g} cannot hold this run, which needs {ceil_gib(needed)} GiB: "
        f"{arithmetic(items)}; raise offload.vram_gib to at least {ceil_gib(needed)}, {remedy}"
    )


def refuse_host(
    layout: Layout, items: Sequence[Item], choice: Choice, limit: int, budget: int
) -> ConfigError:
    """Host memory cannot hold what is not on the device; the machine would swap."""
    host = [item for item in items if item.place is Placement.host]
    needed = sum(item.bytes for item in host)
    remedies = ["free some"]
    asked = layout.offload.ram_gib
    if asked is not None and asked * GIB <= limit:
        remedies = [f"raise offload.ram_gib to at least {ceil_gib(needed)} if the machine has it"]
    more = math.ceil((needed - limit) / layout.layer_bytes)
    streamed = layout.shapes.layers - choice.resident
    if more <= streamed and not layout.coded:  # coded layers wait on the host while loading, wherever they go
        wanted = least_budget(layout.device_bytes(replace(choice, resident=choice.resident + more)))
        if wanted > budget:
            remedies.append(
                f"raise offload.vram_gib to {ceil_gib(wanted)} (each resident layer takes "
                f"{layout.layer_bytes / GIB:.2f} GiB off the host)"
            )
        else:
            remedies.append(f"set offload.resident_layers={choice.resident + more}")
    remedies.append("choose a smaller target")
    source = "offload.ram_gib allows" if asked is not None and asked * GIB <= limit else "are free"
    return ConfigError(
        f"host memory cannot hold this run, which needs {ceil_gib(needed)} GiB: {arithmetic(host)}; "
        f"{limit / GIB:.1f} GiB {source}: {_either(remedies)}"
    )


def least_choice(layout: Layout) -> Choice:
    """The choice that takes the least device memory."""
    pinned = layout.offload.resident_layers
    resident = len(layout.forced) if pinned is None else pinned
    return Choice(resident, layout.least_chunk, layout.placements()[-1])


def arithmetic(items: Sequence[Item]) -> str:
    """``substitute 3.4 + LM head 1.0 + ... + rest 0.1``, in GiB, largest first."""
    shown = sorted((item for item in items if item.bytes >= SMALL), key=lambda item: -item.bytes)
    rest = sum(item.bytes for item in items) - sum(item.bytes for item in shown)
    parts = [f"{item.name} {item.bytes / GIB:.2f}" for item in shown]
    return " + ".join([*parts, *([f"rest {rest / GIB:.2f}"] if rest >= GIB / 200 else [])])


def ceil_gib(size: int) -> str:
    """Bytes as GiB, rounded up to two decimals: a budget of this size suffices."""
    return f"{math.ceil(100 * size / GIB) / 100:g}"


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, or {parts[-1]}"


def _fits(
    layout: Layout, config: Config, model: PretrainedConfig, choose: Callable[[Layout], Choice | None]
) -> bool:
    try:
        return choose(Layout(config, model)) is not None
    except ConfigError:
        return False


def _changes(layout: Layout) -> Iterator[tuple[str, Config]]:
    """Single changes, those that cost least first: (what to set, the configuration with it set).

    Fewer bits are not among them: what they cost in acceptance depends on the target.
    """
    config, offload, decoding, tree = (
        layout.config,
        layout.offload,
        layout.config.decoding,
        layout.config.tree,
    )

    def changed(group: str, **values: Any) -> tuple[str, Config]:
        text = ", ".join(f"{group}.{key}={_yaml(value)}" for key, value in values.items())
        return f"set {text}", replace(config, **{group: replace(getattr(config, group), **values)})

    if offload.resident_layers is not None:
        yield changed("offload", resident_layers=None)
    if offload.embedding is Placement.device and not layout.shapes.tied:
        yield changed("offload", embedding=Placement.host)
    if offload.ring_slots > 2:
        yield changed("offload", ring_slots=2)
    if decoding.prefill_chunk > 256:
        yield changed("decoding", prefill_chunk=256)
    shortest = max(
        SHORTEST, (decoding.max_new_tokens or 0) + max(CHUNK_STEP, config.benchmark.max_prompt_tokens or 0)
    )
    for share in (0.75, 0.5, 0.25, 0.125):
        length = int(decoding.max_length * share) // CHUNK_STEP * CHUNK_STEP
        if length >= shortest:
            yield changed("decoding", max_length=length)
    if not isinstance(config.draft, NoDraftConfig):
        for share in (0.75, 0.5, 0.25):
            depth = int(tree.depth * share)
            if depth >= SHALLOWEST:
                extra = (
                    {"min_depth": depth}
                    if isinstance(tree, AdaptiveTreeConfig) and tree.min_depth > depth
                    else {}
                )
                yield changed("tree", depth=depth, **extra)
    if offload.ring_slots > 1:
        text, other = changed("offload", ring_slots=1)
        yield f"{text} (slower: copies then wait for the layer being computed)", other
    plain, also = replace(config, draft=NoDraftConfig(name="none")), ""
    if offload.codec is Codec.substitute:  # which keeps the substitute even where nothing drafts
        plain, also = replace(plain, offload=replace(offload, codec=Codec.none)), " and offload.codec=none"
    if not isinstance(config.draft, NoDraftConfig):
        yield f"set draft=none{also} (plain decoding)", plain
    elif also:
        yield "set offload.codec=none", plain


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return value.value if isinstance(value, Placement) else str(value)
