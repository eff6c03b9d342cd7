"""The plan of ``offload=stream`` with ``device=cpu``: what stays in memory, and what a disk delivers in every pass.

``offload.ram_gib`` bounds the memory of the process, the interpreter and its libraries included; null: what is free. As
many decoder layers as fit beside everything else stay in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from subspec.config.enums import AUTO, Codec, VramCounts
from subspec.config.schema import Config, NoDraftConfig, Placement, StreamOffloadConfig
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.drafts.check_config import one_text_key
from subspec.drafts.registry import spec_of
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, headroom, least_budget
from subspec.memory.draft_memory import DraftMemory, SizingInputs, kv_bytes, tree_bytes
from subspec.memory.trace import target_trace
from subspec.offload.disk import ALIGNMENT
from subspec.planning.budget import Budget
from subspec.planning.memory_layout import AUDIT_ROWS, CHUNK_GOAL, SLOT_PAGES, pass_peaks, spread
from subspec.planning.plan import Bandwidth, Plan, most_texts, with_texts
from subspec.planning.refusal import SHORTEST, arithmetic, ceil_gib
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

    def most(self, budget: int) -> int | None:
        """Most resident layers within ``budget`` bytes and its headroom; None: not even none."""
        room = budget - headroom(budget)
        return next((n for n in range(self.layers, -1, -1) if self.needed(n) <= room), None)


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
    least, texts = _least_chunk(config), config.decoding.texts
    if texts == AUTO:

        def streamed_beside(texts: int) -> int | None:
            tried = _sizes(with_texts(config, texts), model, itemsize, process_bytes, least)
            found = _resident(tried, offload, budget)
            return None if found is None else layers - found

        texts = 1 if one_text_key(config) else most_texts(streamed_beside)
        config = with_texts(config, texts)
    for chunk in (max(least, min(CHUNK_GOAL, config.decoding.max_length)), least):
        sizes = _sizes(config, model, itemsize, process_bytes, chunk)
        resident = _resident(sizes, offload, budget)
        if resident is not None:
            break
    else:
        raise _refusal(config, model, itemsize, process_bytes, budget, by_free=budget == free)
    plain = _sizes(_plainly(config), model, itemsize, process_bytes, chunk).most(budget)
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
        texts=texts,
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


def _least_chunk(config: Config) -> int:
    return min(config.decoding.prefill_chunk, config.decoding.max_length)


def _resident(sizes: _Sizes, offload: StreamOffloadConfig, budget: int) -> int | None:
    """The number of resident layers that is asked for, or as many as fit; None: the budget is too small."""
    if (asked := offload.resident_layers) is None:
        return sizes.most(budget)
    return asked if sizes.needed(asked) <= budget - headroom(budget) else None


def _plainly(config: Config) -> Config:
    return replace(config, draft=NoDraftConfig(name="none"))


def _refusal(
    config: Config, model: PretrainedConfig, itemsize: int, process: int, budget: int, *, by_free: bool
) -> ConfigError:
    offload = config.offload
    assert isinstance(offload, StreamOffloadConfig)

    def least(changed: Config) -> tuple[int, list[Allocation]]:
        sizes = _sizes(changed, model, itemsize, process, _least_chunk(changed))
        assert isinstance(changed.offload, StreamOffloadConfig)
        items = sizes.items(changed.offload.resident_layers or 0)
        return least_budget(sum(item.bytes for item in items)), items

    needed, items = least(config)
    helps = next((text for text, changed in _changes(config) if least(changed)[0] <= budget), None)
    remedy = f"or {helps}" if helps else "or choose a smaller target"
    items.append(_item("kept free", "", (needed - sum(item.bytes for item in items), 1)))
    if by_free:
        return ConfigError(
            f"offload=stream with device=cpu needs {ceil_gib(needed)} GiB: {arithmetic(items)}; {budget / GIB:.2f} GiB "
            f"are free: free some memory, {remedy}"
        )
    return ConfigError(
        f"offload.ram_gib={offload.ram_gib:g} cannot hold this run, which needs {ceil_gib(needed)} GiB: "
        f"{arithmetic(items)}; raise offload.ram_gib to at least {ceil_gib(needed)}, {remedy}"
    )


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Single changes that save memory, the cheapest first: (what to set, the changed configuration)."""
    offload, decoding = config.offload, config.decoding
    assert isinstance(offload, StreamOffloadConfig)
    if offload.resident_layers:
        yield ("set offload.resident_layers=null", replace(config, offload=replace(offload, resident_layers=None)))
    if decoding.texts > 1:
        yield "set decoding.texts=1", with_texts(config, 1)
    for length in (decoding.max_length // 2, decoding.max_length // 4):
        if length >= max(SHORTEST, 2 * (decoding.max_new_tokens or 0)):
            shorter = replace(decoding, max_length=length)
            yield f"set decoding.max_length={length}", replace(config, decoding=shorter)
    if offload.ring_slots > 1:
        yield (
            "set offload.ring_slots=1 (slower: the disk then waits for the CPU)",
            replace(config, offload=replace(offload, ring_slots=1)),
        )
    if not isinstance(config.draft, NoDraftConfig):
        yield "set draft=none (plain decoding)", _plainly(config)
