"""The plan of ``offload=stream`` with ``device=cpu``: what stays in memory, and what a disk delivers in every pass.

``offload.ram_gib`` bounds the memory of the process, the interpreter and its libraries included; null: what is free. As
many decoder layers as fit beside everything else stay in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from subspec.config.enums import AUTO, Codec, VramCounts
from subspec.config.schema import Config, NoDraftConfig, Placement, StreamOffloadConfig
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.drafts.registry import spec_of
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, headroom, least_budget
from subspec.memory.draft_memory import DraftMemory, SizingInputs, kv_bytes, tree_bytes
from subspec.memory.trace import target_trace
from subspec.offload.disk import ALIGNMENT
from subspec.planning.budget import Budget
from subspec.planning.memory_layout import AUDIT_ROWS, CHUNK_GOAL, SLOT_PAGES, pass_peaks, spread
from subspec.planning.plan import Bandwidth, Plan, with_most_texts
from subspec.planning.refusal import arithmetic, ceil_gib, changes
from subspec.targets.model_spec import ModelSpec

LOADING_LAYERS = 3
"""Layers in memory while a layer is quantized: itself, and what the quantizer works with."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes that do not depend on the number of resident layers."""

    fixed: tuple[Allocation, ...]
    loading: int
    layer: int
    slot: int
    layers: int
    slots: int

    def items(self, resident: int) -> list[Allocation]:
        """Every allocation; what loading takes gives way to the ring and the resident layers."""
        slots = min(self.slots, self.layers - resident)
        later = [
            _item("resident layers", f"{resident} of {self.layers}, exact", (self.layer, resident)),
            _item("ring", f"{slots} layers in flight", (self.slot, slots)),
        ]
        loading = max(0, self.loading - sum(item.bytes for item in later))
        note = "before the layers are there: what that takes beyond them"
        return [item for item in [*self.fixed, *later, _item("loading", note, (loading, 1))] if item.bytes]

    def needed(self, resident: int) -> int:
        """Bytes of all allocations."""
        return sum(item.bytes for item in self.items(resident))

    def resident(self, asked: int | None, budget: int) -> int | None:
        """``asked`` resident layers, or as many as fit ``budget`` bytes and its headroom; None: these do not fit."""
        room, counts = budget - headroom(budget), range(self.layers, -1, -1) if asked is None else (asked,)
        return next((count for count in counts if self.needed(count) <= room), None)


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
    least = min(config.decoding.prefill_chunk, config.decoding.max_length)

    def sizes_of(config: Config, chunk: int) -> _Sizes:
        return _sizes(config, model, itemsize, process_bytes, chunk)

    def streamed_of(config: Config) -> int | None:
        resident = sizes_of(config, least).resident(offload.resident_layers, budget)
        return None if resident is None else layers - resident

    if config.decoding.texts == AUTO:
        config = with_most_texts(config, streamed_of)
    for chunk in (max(least, min(CHUNK_GOAL, config.decoding.max_length)), least):
        sizes = sizes_of(config, chunk)
        resident = sizes.resident(offload.resident_layers, budget)
        if resident is not None:
            break
    else:
        raise _refusal(config, model, sizes_of, budget, by_free=budget == free)
    plain = sizes_of(replace(config, draft=NoDraftConfig(name="none")), chunk).resident(None, budget)
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
        items=tuple(sizes.items(resident)),
        resident_layers=kept,
        streamed_layers=streamed,
        ring_slots=min(sizes.slots, len(streamed)),
        codec=Codec.none,
        embedding=Placement.device,  # of the run, which is the CPU: where it is loaded to anyway
        prefill_chunk=chunk,
        layer_bytes=sizes.layer,
        streamed_bytes_per_pass=len(streamed) * sizes.layer,
        plain_bytes_per_pass=None if plain is None else (layers - plain) * sizes.layer,
        plain_resident=plain,
        level_read_bytes=0,
        link=link,
        notes=notes,
        texts=config.decoding.texts,
        disk_layers=streamed,
        disk=link,
    )


def _sizes(config: Config, model: PretrainedConfig, itemsize: int, process: int, chunk: int) -> _Sizes:
    spec, target = ModelSpec.of(model), target_trace(model, itemsize, bitwise=False)
    sampling, length = build_sampling(config), config.decoding.max_length
    layer = sum(shape.numel() for shape in spec.layer.values()) * itemsize
    draft, nodes, rows, levels, texts = DraftMemory(), 1, 1, 0, config.decoding.texts
    if (kind := spec_of(config.draft)) is not None:
        policy = build_tree_policy(config.tree)
        draft = kind.memory(SizingInputs(config, model, spec, target, itemsize, policy, sampling, texts=texts))
        nodes, rows, levels = policy.capacity, policy.pass_nodes, policy.max_depth
    shared = sum(shape.numel() for shape in spec.shared.values()) * itemsize
    tree = tree_bytes(nodes)
    cache = kv_bytes(spec, length, draft.shared_rows, rows, itemsize, texts)
    peaks = pass_peaks(target, draft, sampling, texts=texts, rows=rows, levels=levels, chunk=chunk, length=length)
    largest = max(peaks, key=lambda name: peaks[name])
    audit = 0
    if config.audit:
        judged = min(AUDIT_ROWS, length)
        audit = kv_bytes(spec, length, 0, judged, itemsize)
        audit += max(0, target.audit_bytes(judged, sampling) - peaks[largest])
    fixed = (
        _item("process", "interpreter and libraries, now", (process, 1)),
        *(replace(own, place=Placement.host) for own in draft.allocations),
        _item("embedding, norm, LM head", "tied" if spec.tied else "", (shared, 1)),
        _item("KV cache", f"{draft.shared_rows} + {length} + {rows} rows", (cache, 1)),
        _item("tree", f"{nodes} nodes", (tree, texts)),
        _item("workspace", f"largest: {largest}", (peaks[largest], 1)),
        _item("draft level", "", (draft.level, 1)),
        _item("audit", "its own cache and logits", (audit, 1)),
    )
    assert isinstance(config.offload, StreamOffloadConfig)
    slots = config.offload.ring_slots
    slot = layer + SLOT_PAGES * ALIGNMENT
    return _Sizes(fixed, LOADING_LAYERS * layer, layer, slot, spec.layers, slots)


def _item(name: str, note: str, *tensors: tuple[int, int]) -> Allocation:
    return Allocation(name, tensors, note, Placement.host)


def _refusal(
    config: Config, model: PretrainedConfig, sizes_of: Callable[[Config, int], _Sizes], budget: int, *, by_free: bool
) -> ConfigError:
    def least(config: Config) -> tuple[int, list[Allocation]]:
        chunk = min(config.decoding.prefill_chunk, config.decoding.max_length)
        assert isinstance(config.offload, StreamOffloadConfig)
        items = sizes_of(config, chunk).items(config.offload.resident_layers or 0)
        return least_budget(sum(item.bytes for item in items)), items

    needed, items = least(config)
    found = changes(config, ModelSpec.of(model))
    helps = next((text for text, changed in found if least(changed)[0] <= budget), None)
    remedy = f"or {helps}" if helps else "or choose a smaller target"
    items.append(_item("kept free", "", (needed - sum(item.bytes for item in items), 1)))
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
