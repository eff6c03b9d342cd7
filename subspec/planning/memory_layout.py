"""The allocations of a run on the device and the host, for any decision of the planner.

A :class:`MemoryLayout` holds what a configuration fixes; :meth:`MemoryLayout.allocations` lists every allocation for a
:class:`Decision`. The planner searches the best decision that fits the budget; budgets are unknown here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from subspec.codec.coding import SubstituteCodec, codec_of, coded_head_bytes, decoding_only, draft_head
from subspec.config.enums import Codec, Kernel
from subspec.config.schema import Config, Device, Dtype, HiggsConfig, NoDraftConfig, Placement, SubstituteDraftConfig
from subspec.decoding.bitwise import unsupported
from subspec.decoding.pass_shapes import PassShapes
from subspec.decoding.text_loop import ROW_MULTIPLE
from subspec.drafts.registry import spec_of
from subspec.drafts.substitute_memory import substitute_allocations
from subspec.drafts.vocabulary import known_tokens
from subspec.errors import ConfigError
from subspec.levels.build import layers_together
from subspec.levels.quantization import LevelQuantization, level_quantization
from subspec.memory.allocator import ALLOCATOR_BYTES, GIB, LIBRARY_BYTES, Allocation, rounded
from subspec.offload.disk import ALIGNMENT
from subspec.planning.loading_memory import head_loading_bytes, loading_bytes
from subspec.planning.run_memory import LOADING_LAYERS, SLOT_PAGES, RunMemory
from subspec.targets.layer_bytes import LayerCodec, PlainCodec
from subspec.targets.model_spec import ModelSpec
from subspec.utils.rounding import evenly

PROCESS_BYTES = GIB
"""Host memory that the CUDA context and its libraries take after planning (an estimate)."""

POST_LOAD = ("resident layers", "ring", "restored weights", "KV cache", "tree", "workspace", "draft level", "audit")
"""Device allocations made after weight loading has finished."""


@dataclass(frozen=True)
class Decision:
    """Number of resident layers, tokens per prefill chunk, and place of the embedding table.

    ``disk``: number of streamed layers on a disk. ``in_files``: whether coded layers wait in files until loading ends.
    """

    resident: int
    chunk: int
    embedding: Placement
    disk: int = 0
    in_files: bool = False


class MemoryLayout(RunMemory):
    """Sizes of a run on a GPU.

    Attributes:
        required_resident: layers that must be resident because the draft needs them exact on the device.
        coded: whether exact weights are coded by the substitute.
        exact_bytes: of a layer as it is. layer_bytes: of a streamed one, coded or not.
        coded_head_bytes: of the exact LM head if it is coded by the draft's own; else 0 (no such head, or the
            embedding is tied to it).
        head_loading_bytes: peak while the coded head is made, before other allocations but the embedding; or 0.
        loading_bytes: peak while a layer is loaded and quantized, before the allocations in :data:`POST_LOAD`; or 0.
        packed_bytes: of a substitute's layer, its quantized Linears alone.

    Raises:
        ConfigError: a draft or quantizer that has no plan, or keys that contradict the target.
    """

    def __init__(self, config: Config, model: PretrainedConfig) -> None:
        spec, itemsize = ModelSpec.of(model), _itemsize(config)
        exact = len(set(getattr(config.quant, "skip_layers", ())))
        config = draft_head(config, codes=not spec.tied and exact < spec.layers)
        self.coded = codec_of(config) is Codec.substitute
        self.quantizes = self.coded or isinstance(config.draft, SubstituteDraftConfig)
        quantization = _quantization(config, spec) if self.quantizes else None
        super().__init__(
            config,
            model,
            itemsize,
            bitwise=_bitwise(config, model, itemsize),
            coded=self.coded,
            row_multiple=ROW_MULTIPLE if spec_of(config.draft) else 1,
            quantization=quantization,
        )
        plain = PlainCodec(itemsize)
        passes = PassShapes.of(model, itemsize, sliced=True) if self.bitwise else None
        codec: LayerCodec = plain
        if self.coded and quantization is not None:
            codec = SubstituteCodec(quantization, passes)
        self.exact_bytes, self.layer_bytes = plain.layer_bytes(spec.layer), codec.layer_bytes(spec.layer)
        self.scratch_bytes = codec.scratch_bytes(spec.layer)
        self._restored_note = f"{'a slice' if passes else 'a layer'} at a time, bfloat16"
        self.table_bytes = spec.vocab * spec.hidden * itemsize
        self.required_resident = self.draft.required_resident
        self._check()

        # A substitute that restores the exact layers exists even if it does not draft.
        substitute = self.draft.allocations
        self.loading_bytes = self.packed_bytes = self.coded_head_bytes = self.head_loading_bytes = 0
        if quantization is not None:
            self._size_loading(quantization)
            if not self.drafts:
                substitute = substitute_allocations(quantization, spec.layers, 0, "decodes; ")
        vectors = tuple((size, spec.layers) for size in spec.vector_sizes(itemsize))
        head = self.coded_head_bytes or self.table_bytes
        self._weights = [
            *substitute,
            Allocation("norms and biases", (*vectors, (spec.hidden * itemsize, 1))),
            Allocation(
                "embedding and LM head" if spec.tied else "LM head",
                ((head, 1),),
                f"{spec.vocab} x {spec.hidden}{', coded' * bool(self.coded_head_bytes)}",
            ),
        ]

    def _size_loading(self, quantization: LevelQuantization) -> None:
        spec, room = self.spec, self.scratch_bytes
        head, coded = (spec.vocab, spec.hidden), self.layer_bytes * self.coded
        # The head is restored into the buffer of restored layers, which needs a coded layer.
        whole = quantization.shapes.get("head") == head
        if self.coded and whole and not spec.tied and len(self.required_resident) < spec.layers:
            self.coded_head_bytes = own = coded_head_bytes(quantization, room)
            if own:
                peak = head_loading_bytes(quantization, head, room, own)
                self.head_loading_bytes = quantization.head_bytes + peak
        self.loading_bytes = loading_bytes(
            quantization, spec.layer, head, self.itemsize, coded, head_is_coded=self.coded_head_bytes > 0
        )
        self.packed_bytes = quantization.layer_bytes

    def _check(self) -> None:
        offload, layers = self.offload, self.spec.layers
        wrong = [index for index in self.required_resident if not 0 <= index < layers]
        if wrong:
            raise ConfigError(f"quant.skip_layers: no layer {wrong[0]} in a target with layers 0..{layers - 1}")
        resident, required = offload.resident_layers, len(self.required_resident)
        if resident is not None and not 0 <= resident <= layers:
            raise ConfigError(f"offload.resident_layers={resident}: the target has {layers} layers")
        if resident is not None and resident < required:
            raise ConfigError(
                f"offload.resident_layers={resident}, but {self.draft.required_by} {required} layers exact on the "
                f"device: set it to at least {required}, or to null"
            )
        if self.spec.tied and offload.embedding is Placement.host:
            raise ConfigError(
                "offload.embedding=host, but the target ties its embedding to the LM head, which every draft level "
                "multiplies with: leave it at auto"
            )

    def placements(self) -> tuple[Placement, ...]:
        """Possible places of the embedding table, the preferred one first."""
        if self.spec.tied:
            return (Placement.device,)
        asked = self.offload.embedding
        return (Placement.device, Placement.host) if asked is Placement.auto else (asked,)

    def device_bytes(self, decision: Decision) -> int:
        return sum(allocation.bytes for allocation in self._device(decision))

    def host_bytes(self, decision: Decision) -> int:
        return sum(allocation.bytes for allocation in self.host_allocations(decision))

    def allocations(self, decision: Decision) -> list[Allocation]:
        """Every allocation on the device and on the host, without empty ones."""
        return [one for one in [*self._device(decision), *self.host_allocations(decision)] if one.bytes]

    def _device(self, decision: Decision) -> list[Allocation]:
        spec, resident, required = self.spec, decision.resident, len(self.required_resident)
        slots = self.ring_slots(resident)
        restores = resident < spec.layers or (self.coded and resident > required)
        own_table = int(decision.embedding is Placement.device and not spec.tied)
        more = self.layer_bytes if self.coded else self.exact_bytes
        draft = self.draft if self.drafts else None
        multiplies = not self.bitwise or bool(draft and draft.library)
        multiplies |= self.quantizes and isinstance(self.config.quant, HiggsConfig)  # which rotates
        streams = int(multiplies) + int(bool(draft and draft.captured and draft.library_levels))
        plain = required if self.coded else resident
        kind = "exact" if plain == resident else f"coded{f', {plain} plain' * bool(plain)}"
        found = [
            *self._weights,
            Allocation("embedding", ((self.table_bytes, own_table),), f"{spec.vocab} x {spec.hidden}"),
            Allocation(
                "resident layers",
                ((self.exact_bytes, required), (more, resident - required)),
                f"{resident} of {spec.layers}, {kind}",
            ),
            Allocation("ring", ((self.layer_bytes, slots),), f"{slots} layers in flight"),
            Allocation("restored weights", ((self.scratch_bytes, int(restores)),), self._restored_note),
            *self.run_allocations(decision.chunk),
            Allocation("cuBLAS", ((LIBRARY_BYTES, streams),), f"workspaces: {streams}"),
        ]
        extra = sum(one.rounding for one in found) - self._spared(resident, slots) + ALLOCATOR_BYTES
        found.append(Allocation("allocator", ((extra, 1),), "rounding, segments in part"))
        making = self.head_loading_bytes and self.head_loading_bytes + self.table_bytes * own_table
        short = max(0, making - sum(one.bytes for one in found))
        note = "before the rest is there: what that takes beyond it"
        return [*found, Allocation("coding the LM head", ((short, 1),), note)]

    def _spared(self, resident: int, slots: int) -> int:
        """Rounding that the substitute's layers do without, because loading lays them side by side."""
        size, count = self.packed_bytes, self.spec.layers - len(self.required_resident)
        together = max(1, min(count, layers_together(size, (resident + slots) * self.layer_bytes)))
        runs, rest = divmod(count, together)
        return count * rounded(size) - runs * rounded(together * size) - rounded(rest * size)

    def staged_layers(self, decision: Decision) -> int:
        """Layers of the substitute that are staged on the host until loading has finished.

        When the last layer is made, the device holds the substitute and the peak of loading. If the allocations that
        follow (:data:`POST_LOAD`) leave less room than that, as many layers as it takes are staged.
        """
        room = sum(one.bytes for one in self._device(decision) if one.name in POST_LOAD)
        short = max(0, self.loading_bytes - room)
        return min(self.spec.layers, math.ceil(short / max(1, self.packed_bytes)))

    def host_allocations(self, decision: Decision) -> list[Allocation]:
        """Every allocation on the host, empty ones included."""
        host, resident, disk = Placement.host, decision.resident, decision.disk
        pinned, table = self.spec.layers - resident - disk, int(decision.embedding is host)
        staged, slots = self.staged_layers(decision), min(self.offload.ring_slots, disk)
        # Resident layers are coded to the host too, and copied to the device after quantization.
        coded = (resident - len(self.required_resident)) * self.coded * (not decision.in_files)
        ring = slots * (self.layer_bytes + SLOT_PAGES * ALIGNMENT)
        behind = ring + self.layer_bytes * pinned * (self.coded and decision.in_files)  # made when loading has ended
        loading = self.exact_bytes * LOADING_LAYERS + self.packed_bytes * staged + self.layer_bytes * coded
        parts = [f"{LOADING_LAYERS} layers", *[f"{coded} coded"] * bool(coded)]
        parts += [*[f"{staged} of the substitute"] * bool(staged), "1 GiB for CUDA"]
        return [
            Allocation("streamed layers", ((self.layer_bytes, pinned),), f"{pinned} layers, pinned", host),
            Allocation("disk ring", ((ring, 1),), f"{slots} layers in flight, pinned", host),
            Allocation("embedding table", ((self.table_bytes, table),), "pinned; only looked up", host),
            Allocation(
                "loading and process", ((max(0, loading - behind), 1), (PROCESS_BYTES, 1)), ", ".join(parts), host
            ),
        ]

    def spread(self, resident: int) -> tuple[int, ...]:
        """Numbers of the resident layers: the required ones, and the others evenly over the depth.

        The link fetches a streamed layer while the device computes a resident one. A pass begins with a streamed layer,
        whose slot the link refills from then on, and ends with one, so that nothing is left to compute when the last
        copy has come.
        """
        others = [index for index in range(self.spec.layers) if index not in self.required_resident]
        chosen = spread(others, resident - len(self.required_resident))
        return tuple(sorted([*self.required_resident, *chosen]))

    def without_draft(self, model: PretrainedConfig) -> "MemoryLayout":
        """The layout of plain decoding, streamed uncoded, with as many resident layers as fit."""
        offload = replace(self.offload, resident_layers=None, codec=Codec.none)
        return MemoryLayout(replace(self.config, draft=NoDraftConfig(name="none"), offload=offload), model)


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` of ``layers``, evenly, with others at both ends; whichever are fewer lie evenly."""
    if 2 * count < len(layers):
        return tuple(layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count))
    others = set(evenly(len(layers), len(layers) - count))
    return tuple(layer for number, layer in enumerate(layers) if number not in others)


def _bitwise(config: Config, model: PretrainedConfig, itemsize: int) -> bool:
    """Whether passes run in batch-invariant arithmetic."""
    reason = unsupported(model)
    if itemsize != 2:
        reason = reason or "it is for bfloat16 and float16, and this run computes in float32"
    if reason and config.decoding.bitwise is True:
        raise ConfigError(f"decoding.bitwise=true: {reason}; set decoding.bitwise=auto")
    return not reason and config.decoding.bitwise is not False


def _quantization(config: Config, spec: ModelSpec) -> LevelQuantization:
    if isinstance(config.draft, NoDraftConfig):
        config = decoding_only(config)
    kernel = getattr(config.draft, "kernel", Kernel.auto).value
    head = known_tokens(config.draft, spec.vocab), spec.hidden
    return level_quantization(config.quant, spec.layer, head, kernel=kernel)


def _itemsize(config: Config) -> int:
    """Bytes per weight. Streaming is for GPUs, where ``auto`` is bfloat16, also when planned without one."""
    dtype = config.target.dtype
    card = getattr(config.offload, "card", None)
    if dtype is Dtype.float32 or (dtype is Dtype.auto and config.device is Device.cpu and card is None):
        return 4
    return 2
