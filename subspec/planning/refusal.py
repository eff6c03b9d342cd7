"""Refusals of the planner: the arithmetic, and the change that would make the run fit, in one line."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.enums import AUTO, Codec
from subspec.config.schema import AdaptiveTreeConfig, Config, NoDraftConfig, Placement, StreamOffloadConfig
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, least_budget
from subspec.planning.budget import Budget
from subspec.planning.choose import CHUNK_STEP, choose, least_decision
from subspec.planning.memory_layout import Decision, MemoryLayout
from subspec.targets.model_spec import ModelSpec

SMALL = GIB // 20
"""Allocations below 0.05 GiB are summed up as the rest."""

SHORTEST = 256
"""Shortest proposed ``decoding.max_length``: a chat turn needs as many tokens."""

SHALLOWEST = 4
"""Smallest proposed ``tree.depth``."""


def refuse_device(layout: MemoryLayout, model: PretrainedConfig, vram: Budget) -> ConfigError:
    """The refusal of a run that does not fit with the fewest resident layers and the smallest prefill chunk."""

    def fits(config: Config) -> bool:
        try:
            return choose(MemoryLayout(config, model), vram.allocator) is not None
        except ConfigError:
            return False

    least = least_decision(layout)
    items = [item for item in layout.allocations(least) if item.place is Placement.device]
    used = sum(item.bytes for item in items)
    needed = vram.least(used)
    items += [*vram.items, Allocation("kept free", ((least_budget(used) - used, 1),))]
    helps = next((text for text, changed in changes(layout.config, layout.spec) if fits(changed)), None)
    remedy = f"or {helps}" if helps else "no other single change is enough"
    asked, more = f"{vram.bytes / GIB:g}", f"raise offload.vram_gib to at least {ceil_gib(needed)}"
    if layout.offload.vram_gib == AUTO:
        asked, more = f"auto ({asked} GiB)", "free device memory"
    return ConfigError(
        f"offload.vram_gib={asked} cannot hold this run, which needs {ceil_gib(needed)} GiB: "
        f"{arithmetic(items)}; {more}, {remedy}"
    )


def refuse_host(layout: MemoryLayout, decision: Decision, limit: int, vram: Budget) -> ConfigError:
    """The refusal of a run whose host allocations exceed ``limit`` bytes; the machine would swap.

    With ``offload.ram_gib`` not even one whose streamed layers all lie on a disk fits.
    """
    streamed, asked = layout.spec.layers - decision.resident, layout.offload.ram_gib
    on_disk = replace(decision, disk=streamed, in_files=True)
    decision = decision if asked is None else on_disk
    needed = layout.host_bytes(decision)
    remedies, capped = ["free some"], asked is not None and int(asked * GIB) <= limit
    if capped:
        remedies = [f"raise offload.ram_gib to at least {ceil_gib(needed)} if the machine has it"]
    more = math.ceil((needed - limit) / layout.layer_bytes)
    # All coded layers are on the host while loading.
    if asked is None and more <= streamed and not layout.coded:
        wanted = vram.least(layout.device_bytes(replace(decision, resident=decision.resident + more)))
        if wanted > vram.bytes:
            remedies.append(
                f"raise offload.vram_gib to {ceil_gib(wanted)} (each resident layer takes "
                f"{layout.layer_bytes / GIB:.2f} GiB off the host)"
            )
        else:
            remedies.append(f"set offload.resident_layers={decision.resident + more}")
    if asked is None and layout.host_bytes(on_disk) <= limit:
        remedies.append(f"set offload.ram_gib={_floor_gib(limit)} to read the layers beyond it from a disk (slower)")
    remedies.append("choose a smaller target")
    source = "offload.ram_gib allows" if capped else "are free"
    return ConfigError(
        f"host memory cannot hold this run, which needs {ceil_gib(needed)} GiB: "
        f"{arithmetic(layout.host_allocations(decision))}; {limit / GIB:.1f} GiB {source}: {_either(remedies)}"
    )


def arithmetic(items: Sequence[Allocation]) -> str:
    """``substitute 3.4 + LM head 1.0 + ... + rest 0.1``, in GiB, largest first."""
    shown = sorted((item for item in items if item.bytes >= SMALL), key=lambda item: -item.bytes)
    rest = sum(item.bytes for item in items) - sum(item.bytes for item in shown)
    parts = [f"{item.name} {item.bytes / GIB:.2f}" for item in shown]
    return " + ".join([*parts, *([f"rest {rest / GIB:.2f}"] if rest >= GIB / 200 else [])])


def ceil_gib(size: int) -> str:
    """Bytes as GiB, rounded up to two decimals: a budget of this size suffices."""
    return f"{math.ceil(100 * size / GIB) / 100:g}"


def _floor_gib(size: int) -> str:
    return f"{math.floor(100 * size / GIB) / 100:g}"


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, or {parts[-1]}"


def changes(config: Config, spec: ModelSpec) -> Iterator[tuple[str, Config]]:
    """Single changes that save memory, the cheapest first: (what to set, the changed configuration).

    Fewer bits are not proposed: their cost in acceptance depends on the target.
    """
    offload, decoding, tree = config.offload, config.decoding, config.tree
    assert isinstance(offload, StreamOffloadConfig)

    def changed(group: str, **values: Any) -> tuple[str, Config]:
        text = ", ".join(f"{group}.{key}={_yaml(value)}" for key, value in values.items())
        return f"set {text}", replace(config, **{group: replace(getattr(config, group), **values)})

    if offload.resident_layers is not None:
        yield changed("offload", resident_layers=None)
    if offload.embedding is Placement.device and not spec.tied:
        yield changed("offload", embedding=Placement.host)
    if offload.ring_slots > 2:
        yield changed("offload", ring_slots=2)
    if decoding.prefill_chunk > 256:
        yield changed("decoding", prefill_chunk=256)
    for texts in sorted({decoding.texts // 2, 1}, reverse=True) if decoding.texts > 1 else ():
        yield changed("decoding", texts=texts)
    shortest = max(SHORTEST, (decoding.max_new_tokens or 0) + max(CHUNK_STEP, config.benchmark.max_prompt_tokens or 0))
    for share in (0.75, 0.5, 0.25, 0.125):
        length = int(decoding.max_length * share) // CHUNK_STEP * CHUNK_STEP
        if length >= shortest:
            yield changed("decoding", max_length=length)
    drafts = not isinstance(config.draft, NoDraftConfig)
    for depth in (int(tree.depth * share) for share in (0.75, 0.5, 0.25)) if drafts else ():
        if depth >= SHALLOWEST:
            adaptive = isinstance(tree, AdaptiveTreeConfig) and (tree.min_depth or 0) > depth
            yield changed("tree", depth=depth, **{"min_depth": depth} if adaptive else {})
    if offload.ring_slots > 1:
        text, other = changed("offload", ring_slots=1)
        yield f"{text} (slower: copies then wait for the layer being computed)", other
    coded = offload.codec is Codec.substitute  # keeps the substitute without a draft too
    plain = replace(config, draft=NoDraftConfig(name="none"), offload=replace(offload, codec=Codec.none))
    if drafts:
        yield f"set draft=none{' and offload.codec=none' * coded} (plain decoding)", plain
    elif coded:
        yield "set offload.codec=none", plain


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return value.value if isinstance(value, Placement) else str(value)
