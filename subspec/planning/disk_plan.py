"""The plan of ``offload=stream`` with ``device=cpu``: what stays in memory, and what a disk delivers in every pass.

``offload.ram_gib`` bounds the memory of the process, the interpreter and its libraries included; null: what is free. As
many decoder layers as fit beside everything else stay in memory.
"""

from collections.abc import Callable
from dataclasses import replace

from transformers import PretrainedConfig

from subspec.config.enums import AUTO, Codec, VramCounts
from subspec.config.schema import Config, NoDraftConfig, Placement, StreamOffloadConfig
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, headroom, least_budget
from subspec.offload.disk import ALIGNMENT
from subspec.planning.budget import Budget
from subspec.planning.choose import with_most_texts
from subspec.planning.memory_layout import spread
from subspec.planning.plan import Bandwidth, Plan
from subspec.planning.refusal import arithmetic, ceil_gib, changes
from subspec.planning.run_memory import LOADING_LAYERS, SLOT_PAGES, RunMemory


class DiskLayout(RunMemory):
    """Sizes of a run on a CPU whose layers stream from a disk. All memory is of the host.

    Args:
        process_bytes: memory of this process before anything is loaded.

    Attributes:
        layer_bytes: of a layer as it is.
    """

    def __init__(self, config: Config, model: PretrainedConfig, itemsize: int, process_bytes: int) -> None:
        super().__init__(config, model, itemsize)
        spec = self.spec
        shared = sum(shape.numel() for shape in spec.shared.values()) * itemsize
        self.layer_bytes = sum(shape.numel() for shape in spec.layer.values()) * itemsize
        self._weights = [
            Allocation("process", ((process_bytes, 1),), "interpreter and libraries, now"),
            *self.draft.allocations,
            Allocation("embedding, norm, LM head", ((shared, 1),), "tied" if spec.tied else ""),
        ]

    def allocations(self, resident: int, chunk: int) -> list[Allocation]:
        """Every allocation; what loading takes gives way to the ring and the resident layers."""
        slots, layer = self.ring_slots(resident), self.layer_bytes
        later = [
            Allocation("resident layers", ((layer, resident),), f"{resident} of {self.spec.layers}, exact"),
            Allocation("ring", ((layer + SLOT_PAGES * ALIGNMENT, slots),), f"{slots} layers in flight"),
        ]
        loading = max(0, LOADING_LAYERS * layer - sum(item.bytes for item in later))
        note = "before the layers are there: what that takes beyond them"
        found = [*self._weights, *self.run_allocations(chunk), *later, Allocation("loading", ((loading, 1),), note)]
        return [replace(item, place=Placement.host) for item in found if item.bytes]

    def resident(self, asked: int | None, chunk: int, budget: int) -> int | None:
        """``asked`` resident layers, or as many as fit ``budget`` bytes and its headroom; None: these do not fit."""
        room = budget - headroom(budget)
        for count in range(self.spec.layers, -1, -1) if asked is None else (asked,):
            if sum(item.bytes for item in self.allocations(count, chunk)) <= room:
                return count
        return None


def plan_disk(config: Config, model: PretrainedConfig, *, itemsize: int, process_bytes: int, host_free: int) -> Plan:
    """Plan a run whose layers stream from a disk; nothing is loaded.

    Args:
        itemsize: bytes per weight.
        process_bytes: memory of this process before anything is loaded.
        host_free: free memory beside that.

    Raises:
        ConfigError: the run does not fit, with the arithmetic and the remedy.
    """
    offload = config.offload
    assert isinstance(offload, StreamOffloadConfig)
    if offload.codec is Codec.substitute:
        raise ConfigError(
            "offload.codec=substitute is for a GPU, which restores coded layers: set offload.codec=none with device=cpu"
        )
    layers = model.num_hidden_layers
    if offload.resident_layers is not None and offload.resident_layers > layers:
        raise ConfigError(f"offload.resident_layers={offload.resident_layers}: the target has {layers} layers")
    free = host_free + process_bytes
    budget = free if offload.ram_gib is None else min(free, int(offload.ram_gib * GIB))

    def layout_of(config: Config) -> DiskLayout:
        return DiskLayout(config, model, itemsize, process_bytes)

    def streamed_of(config: Config) -> int | None:
        layout = layout_of(config)
        resident = layout.resident(offload.resident_layers, layout.least_chunk, budget)
        return None if resident is None else layers - resident

    if config.decoding.texts == AUTO:
        config = with_most_texts(config, streamed_of)
    layout = layout_of(config)
    for chunk in (layout.goal, layout.least_chunk):
        resident = layout.resident(offload.resident_layers, chunk, budget)
        if resident is not None:
            break
    else:
        raise _refusal(layout, layout_of, budget, by_free=budget == free)
    plain = layout_of(replace(config, draft=NoDraftConfig(name="none"))).resident(None, chunk, budget)
    kept = spread(range(layers), resident)
    streamed = tuple(index for index in range(layers) if index not in kept)
    notes = () if streamed else ("every layer fits in memory: nothing is read from the disk while decoding",)
    key = "link_gb_per_s" if offload.disk_gb_per_s is None else "disk_gb_per_s"
    link = getattr(offload, key) and Bandwidth(getattr(offload, key), f"offload.{key}")
    return Plan(
        target=config.target.name,
        draft=config.draft.name,
        card=None,
        vram=Budget(budget, VramCounts.allocator, Allocation("CUDA", ())),  # none: the budget is of host memory
        host_limit=budget,
        items=tuple(layout.allocations(resident, chunk)),
        resident_layers=kept,
        streamed_layers=streamed,
        ring_slots=layout.ring_slots(resident),
        codec=Codec.none,
        embedding=Placement.device,  # of the run, which is the CPU: where it is loaded to anyway
        prefill_chunk=chunk,
        layer_bytes=layout.layer_bytes,
        streamed_bytes_per_pass=len(streamed) * layout.layer_bytes,
        plain_bytes_per_pass=None if plain is None else (layers - plain) * layout.layer_bytes,
        plain_resident=plain,
        level_read_bytes=0,
        link=link,
        notes=notes,
        texts=config.decoding.texts,
        disk_layers=streamed,
        disk=link,
    )


def _refusal(
    layout: DiskLayout, layout_of: Callable[[Config], DiskLayout], budget: int, *, by_free: bool
) -> ConfigError:
    def least(layout: DiskLayout) -> tuple[int, list[Allocation]]:
        items = layout.allocations(layout.offload.resident_layers or 0, layout.least_chunk)
        return least_budget(sum(item.bytes for item in items)), items

    needed, items = least(layout)
    found = changes(layout.config, layout.spec)
    helps = next((text for text, changed in found if least(layout_of(changed))[0] <= budget), None)
    remedy = f"or {helps}" if helps else "or choose a smaller target"
    items.append(Allocation("kept free", ((needed - sum(item.bytes for item in items), 1),)))
    shown = arithmetic(items)
    if by_free:
        return ConfigError(
            f"offload=stream with device=cpu needs {ceil_gib(needed)} GiB: {shown}; {budget / GIB:.2f} GiB are free: "
            f"free some memory, {remedy}"
        )
    return ConfigError(
        f"offload.ram_gib={budget / GIB:g} cannot hold this run, which needs {ceil_gib(needed)} GiB: {shown}; raise "
        f"offload.ram_gib to at least {ceil_gib(needed)}, {remedy}"
    )
