"""Load a streamed target from a layer source, following a plan.

Layers pass through the device one at a time and are handed to every consumer: the substitute's builder
quantizes them, the coder codes them given the substitute (:mod:`subspec.codec.coded_load`), a store copies them to
pinned memory as they are. Host memory holds the layers that are kept there and the one on its way; a layer that an
earlier run coded is read straight into its buffer.

To keep loading inside the budget, resident layers are fetched again at the end, when the quantizer's temporaries are
gone, and the substitute's first layers are staged on the host if these need their room (``Plan.waiting_layers``). An LM
head that is coded (:mod:`subspec.codec.coded_head`) is quantized and coded first, when most memory is free.

Streamed layers lie in pinned host memory. Those that the plan leaves to a disk (``Plan.disk_layers``) are read from it
in every pass: coded ones from the files of the cache of coded layers, others from the target's files or from a copy.
"""

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from subspec.codec.coded_cache import CodedCache
from subspec.codec.coded_head import CodedHead, HeadCode, encode_head
from subspec.codec.coded_layer import restored_bytes
from subspec.codec.coded_load import TargetCoding
from subspec.config.enums import Codec
from subspec.config.schema import Placement
from subspec.decoding.pass_shapes import PassShapes
from subspec.errors import SubspecError
from subspec.levels.build import SubstituteBuilder, compact, layers_together, level_model
from subspec.levels.model import LevelLayer, LevelModel
from subspec.offload.disk import DiskRing, StoredLayer
from subspec.offload.feeds import CodedFeed, DiskFeed, LayerFeed, ResidentFeed, RingFeed
from subspec.offload.stream import LayerStreamer
from subspec.offload.streamed_target import StreamedTarget
from subspec.offload.tiers import TieredStreamer
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.targets.layer_bytes import PlainCodec, flat_layer, write_layer
from subspec.targets.meta_model import empty_model, fill
from subspec.targets.source import LayerSource
from subspec.utils.console import Note, print_note
from subspec.utils.pinned import PinnedBuffer

CPU = torch.device("cpu")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class LoadingPlan(Protocol):
    """The part of a plan that loading follows (:class:`subspec.planning.plan.Plan`)."""

    resident_layers: tuple[int, ...]
    disk_layers: tuple[int, ...]
    coded_in_files: bool
    ring_slots: int
    codec: Codec
    embedding: Placement
    layer_bytes: int
    waiting_layers: int
    coded_head_bytes: int
    texts: int
    restored_bytes: int
    spare: int | None


class LayerConsumer(Protocol):
    """Takes decoder layers as they pass through the device."""

    def needs(self, index: int) -> bool:
        """Whether to take decoder layer ``index``; asked once per layer, in order."""

    def take(self, index: int, layer: Mapping[str, Tensor]) -> None:
        """Take the exact parameters of decoder layer ``index``, which are not kept otherwise."""


class PinnedMemory:
    """Page-locked host memory of a target; plain memory where there is no GPU to copy to."""

    def __init__(self, device: torch.device) -> None:
        self._locks = device.type == "cuda"
        self.buffers: list[PinnedBuffer] = []

    def allocate(self, nbytes: int) -> Tensor:
        """Uint8 [nbytes].

        Raises:
            SubspecError: host memory cannot be locked.
        """
        return self.adopt(PinnedBuffer(nbytes, pin=False))

    def adopt(self, buffer: PinnedBuffer) -> Tensor:
        """Lock a buffer that is already filled; returns its bytes."""
        if self._locks:
            buffer.lock()
        self.buffers.append(buffer)
        return buffer.tensor

    def release(self, tensor: Tensor) -> None:
        """Free a buffer by its bytes, which nothing may read any more."""
        (place,) = (n for n, own in enumerate(self.buffers) if own.tensor.data_ptr() == tensor.data_ptr())
        self.buffers.pop(place).close()

    def close(self) -> None:
        """Unlock all of it; nothing may read it any more."""
        for buffer in self.buffers:
            buffer.close()


class PlainStore:
    """Copies layers to pinned memory as they are: ``layers``, flat bytes by layer number."""

    def __init__(self, source: LayerSource, elsewhere: set[int], memory: PinnedMemory) -> None:
        self._source, self._elsewhere, self._memory = source, elsewhere, memory
        self.layers: dict[int, Tensor] = {}

    def needs(self, index: int) -> bool:
        return index not in self._elsewhere

    def take(self, index: int, layer: Mapping[str, Tensor]) -> None:
        source = self._source
        nbytes = PlainCodec(source.dtype.itemsize).layer_bytes(source.layer_shapes(index))
        self.layers[index] = flat = self._memory.allocate(nbytes)
        write_layer(flat, layer, source.dtype)


@dataclass
class LoadedStream:
    """A loaded target. Keep it alive as long as it runs: it owns the pinned memory.

    ``builder`` has built the substitute, if there is one; the coded layers came from ``coded``, if they are kept.
    """

    target: StreamedTarget
    memory: PinnedMemory
    builder: SubstituteBuilder | None = None
    coded: CodedCache | None = None

    @property
    def substitute(self) -> LevelModel | None:
        """The substitute's levels; None without one."""
        builder = self.builder
        return None if builder is None else level_model(self.target.model, builder.layers, builder.head, builder.ids)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the coded Linears of layers; None: nothing is coded."""
        return None if self.target.restorer is None else self.target.restorer.bits_per_weight

    @property
    def head_bits_per_weight(self) -> float | None:
        """Of the coded LM head; None: it is not."""
        return None if self.target.coded_head is None else self.target.coded_head.code.bits_per_weight

    def facts(self) -> dict[str, Any]:
        """Facts about coded weights for the run's record."""
        facts = {
            "coded_bits_per_weight": self.bits_per_weight,
            "coded_head_bits_per_weight": self.head_bits_per_weight,
            "coded_cache": None if self.coded is None else self.coded.report(),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def close(self) -> None:
        """Unlock the host memory; the target must not run any more."""
        for feed in self.target.feeds:
            feed.close()
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()
        self.memory.close()


def load_streamed(
    source: LayerSource,
    plan: LoadingPlan,
    device: torch.device,
    *,
    builder: SubstituteBuilder | None = None,
    coded: CodedCache | None = None,
    stored: Sequence[StoredLayer] = (),
    passes: PassShapes | None = None,
    note: Note = print_note,
) -> LoadedStream:
    """Load a target for streaming.

    Args:
        builder: builds the substitute; None: there is none.
        coded: layers that earlier runs coded with this substitute; None: they are not kept.
        stored: layers in files; those that are not resident stream from there, and all others from host memory. Coded
            layers of ``plan.disk_layers`` stream from the files of ``coded``.
        passes: the batch-invariant passes that will run; None: transformers' modules.

    Raises:
        SubspecError: host memory cannot be locked, or a file cannot be written or read.
    """
    memory = PinnedMemory(device)
    model = empty_model(source.config, source.dtype, device)
    resident = set(plan.resident_layers)
    assert plan.codec is not Codec.none or set(plan.disk_layers) <= {layer.index for layer in stored}
    # Opened first: a file that changes while other weights are loaded from it is noticed.
    disk = _ring([layer for layer in stored if layer.index not in resident], plan, source, note)
    shared = _load_shared(source, plan, memory, device)
    head_code: HeadCode | None = None
    buffer_bytes = 0 if builder is None else restored_bytes(source.layer_shapes(0), builder.linears, passes)
    if plan.coded_head_bytes and builder is not None:
        head_code = _code_head(shared, builder, buffer_bytes)
        _release_temporaries(device)
    fill(model, shared)
    if source.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    coding = None
    if plan.codec is Codec.substitute and builder is not None:
        places = {"resident": resident, "on_disk": plan.disk_layers, "in_files": plan.coded_in_files}
        coding = TargetCoding(source, builder, memory, device, cache=coded, **places)
    store = PlainStore(source, resident.union(layer.index for layer in stored), memory)
    consumers: list[LayerConsumer] = [store] if builder is None else [builder, store]
    if coding is not None:
        consumers = [coding]
    _pass_layers(source, consumers, builder, plan.waiting_layers, device)

    if builder is not None and head_code is None:
        builder.head = builder.build_head(shared.get(HEAD, shared[EMBEDDING]))
    _release_temporaries(device)
    if builder is not None:
        room = (len(resident) + plan.ring_slots) * plan.layer_bytes
        _gather(builder.layers, plan.waiting_layers, room, device)
    restorer, coded_head = None, None
    if coding is not None and builder is not None:
        coded_resident = sum(index in coding.layers for index in resident)
        room = (coded_resident + plan.ring_slots) * plan.layer_bytes
        if head_code is not None:
            room -= head_code.nbytes - plan.coded_head_bytes
        # Passes may turn out not to be batch-invariant: the buffer is larger then, and libraries need what is left.
        larger = max(0, buffer_bytes - plan.restored_bytes)
        spare = None if larger else plan.spare
        coding.place(room - larger + (spare or 0), plan.ring_slots, more=spare is not None)
        restorer = coding.decoder(passes)
        if head_code is not None and builder.head is not None:
            assert restorer is not None  # the plan codes no head where no layer is coded
            coded_head = CodedHead(head_code, builder.head, restorer.buffer)
    coded_layers = () if coding is None else coding.layers
    modules = model.get_decoder().layers
    exact = {index: modules[index] for index in sorted(resident.difference(coded_layers))}
    for index, module in exact.items():
        # By way of the host: on the device, a layer on its way would need room beside its place.
        fill(module, flat_layer(source.layer(index, CPU), source.dtype, device))
    feeds: list[LayerFeed] = [ResidentFeed(exact)]
    if coding is not None and restorer is not None:
        if coding.on_disk:
            disk = _ring(_stored_code(coding, coded), plan, source, note)
        streamer = _streamer(coding.streamed, disk, plan.ring_slots, device)
        feeds.append(CodedFeed(modules[min(coding.layers)], restorer, streamer))
    elif disk is not None and not store.layers and device == CPU:  # which computes from the ring's slots
        feeds.append(DiskFeed(modules[disk.layers[0].index], disk))
    elif (streamer := _streamer(store.layers, disk, plan.ring_slots, device)) is not None:
        streamed = set(range(len(modules))) - resident
        feeds.append(RingFeed(modules[min(streamed)], streamed, streamer, source.dtype))
    return LoadedStream(StreamedTarget(model, feeds, device, coded_head), memory, builder, coded)


def _ring(stored: Sequence[StoredLayer], plan: LoadingPlan, source: LayerSource, note: Note) -> DiskRing | None:
    """Reads layers from a disk; None: there are none."""
    return DiskRing(stored, min(max(plan.ring_slots, 1), len(stored)), note, source) if stored else None


def _stored_code(coding: TargetCoding, cache: CodedCache | None) -> list[StoredLayer]:
    """The coded layers on the disk: a file's code, and the rest of it, which its checksum covers too.

    Raises:
        SubspecError: a file is gone.
    """
    assert cache is not None
    found = []
    for index in sorted(coding.on_disk):
        kept, code = cache.file(index), coding.layers[index].nbytes
        if kept is None:
            raise SubspecError(
                f"the file of the coded layer {index} in {cache.folder} is gone or cut off: start again, and leave the "
                "folder alone meanwhile"
            )
        shapes = {"code": torch.Size([code]), "layout": torch.Size([kept[0].stat().st_size - code])}
        places = {"code": (kept[0], 0), "layout": (kept[0], code)}
        found.append(StoredLayer(index, places, shapes, torch.uint8, kept[1]))
    return found


def _streamer(
    pinned: Mapping[int, Tensor], disk: DiskRing | None, slots: int, device: torch.device
) -> LayerStreamer | None:
    """Copies the layers of both tiers to the device; None: no layer is streamed."""
    slots = min(max(slots, 1), len(pinned) + (0 if disk is None else len(disk.layers)))
    if disk is not None:
        return TieredStreamer(pinned, disk, slots, device)
    return LayerStreamer([pinned[index] for index in sorted(pinned)], slots, device) if pinned else None


def _load_shared(
    source: LayerSource, plan: LoadingPlan, memory: PinnedMemory, device: torch.device
) -> dict[str, Tensor]:
    """Embedding (on the device or pinned, as planned), final norm and, unless tied, LM head."""
    shared = dict(source.shared(device))
    if plan.embedding is Placement.host:
        table = shared.pop(EMBEDDING)
        shared[EMBEDDING] = memory.allocate(table.nbytes).view(table.dtype).view(table.shape)
        shared[EMBEDDING].copy_(table)
    return shared


def _code_head(shared: dict[str, Tensor], builder: SubstituteBuilder, room: int) -> HeadCode:
    """Build the draft's LM head and code the exact one by it, which is removed from ``shared``.

    ``room``: bytes of the buffer that layers are restored into.
    """
    exact, codes = shared.pop(HEAD), list[QuantizedWeight]()
    builder.head = builder.build_head(exact, codes)
    assert builder.head is not None  # the plan codes no head where the draft has none
    return encode_head(exact, codes[0], builder.head, room)


def _pass_layers(
    source: LayerSource,
    consumers: Sequence[LayerConsumer],
    builder: SubstituteBuilder | None,
    staged_layers: int,
    device: torch.device,
) -> None:
    """Bring every layer that is needed to the device once.

    The substitute's first ``staged_layers`` are moved to the host as soon as they are built.
    """
    for index in range(source.config.num_hidden_layers):
        takers = [consumer for consumer in consumers if consumer.needs(index)]
        if takers:
            layer = source.layer(index, device)
            for consumer in takers:
                consumer.take(index, layer)
            del layer
        if builder is not None and index < staged_layers:
            compact([builder.layers[index]], CPU)


def _gather(layers: Sequence[LevelLayer], waiting: int, room: int, device: torch.device) -> None:
    """Bring the substitute's first ``waiting`` layers to ``device``, and on a GPU lay all layers side by side.

    Layers that were made one by one lie scattered among freed temporaries. The gaps between them, once half a GiB, are
    too short for what follows.

    Args:
        room: device bytes of allocations that follow, and that may be taken meanwhile.
    """
    sizes = [sum(tensor.nbytes for linear in layer.linears for tensor in linear.tensors) for layer in layers]
    together = layers_together(max(sizes), room)
    # Exact layers, which have no packed weights, stay where they are.
    moved = [layer for layer, size in zip(layers, sizes, strict=True) if size]
    if device.type == "cpu" or together < 2:
        moved, together = layers[:waiting], 1
    for first in range(0, len(moved), together):
        compact(moved[first : first + together], device)
    _release_temporaries(device)


def _release_temporaries(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):  # glibc keeps what was freed; other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)
