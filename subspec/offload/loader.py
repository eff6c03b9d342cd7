"""Build a streamed target and its fused substitute from a layer source, following a plan.

One exact layer at a time is on the device: it is quantized for the substitute, then written to its pinned buffer, as
it is or coded by the substitute (:mod:`subspec.codec.coded_load`). Host memory never holds more of the target than
what is kept there and the layer on its way; a layer that an earlier run coded is read straight into its buffer.
Resident layers are fetched a second time at the end, when the quantizer's temporaries are gone, and the first layers of
the substitute wait on the host where these need their room (``Plan.waiting_layers``), so that loading itself stays
inside the budget. An LM head that is coded (:mod:`subspec.codec.coded_head`) is quantized and coded first of all,
when there is most room.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from subspec.codec.coded_cache import CodedCache
from subspec.codec.coded_head import CodedHead, HeadCode, encode_head
from subspec.codec.coded_load import TargetCoding
from subspec.config.enums import Codec
from subspec.config.schema import Placement
from subspec.levels.build import LayerFuser, compact, fuse_model
from subspec.levels.model import FusedModel
from subspec.offload.streamed_target import StreamedTarget
from subspec.quant.level_linear import LevelLinear
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.targets.layer_bytes import PlainCodec, flat_layer, write_layer
from subspec.targets.meta_model import empty_model, fill
from subspec.targets.source import LayerSource
from subspec.utils.pinned import PinnedBuffer


class LoadingPlan(Protocol):
    """What loading follows (:class:`subspec.planning.plan.Plan`)."""

    @property
    def resident_layers(self) -> tuple[int, ...]: ...

    @property
    def ring_slots(self) -> int: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def embedding(self) -> Placement: ...

    @property
    def layer_bytes(self) -> int: ...

    @property
    def waiting_layers(self) -> int: ...

    @property
    def coded_head_bytes(self) -> int: ...


@dataclass
class LoadedStream:
    """A loaded target. Keep it alive as long as it runs: it owns the pinned memory.

    Attributes:
        decoder: the target.
        substitute: the fused substitute, or None without one.
        buffers: page-locked memory.
        resident: parameters of each resident layer by layer number, laid out by
            :func:`subspec.targets.layer_bytes.flat_views`.
        shared: embedding, final norm and, unless tied or coded, LM head, wherever they live.
        bits_per_weight: of the coded Linears of layers; None: nothing is coded.
        head_bits_per_weight: of the coded LM head; None: it is not.
        coded: where the coded layers came from; None: nothing is coded.
    """

    decoder: StreamedTarget
    substitute: FusedModel | None
    buffers: list[PinnedBuffer]
    resident: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    bits_per_weight: float | None = None
    head_bits_per_weight: float | None = None
    coded: CodedCache | None = None

    def close(self) -> None:
        """Unlock the host memory, once nothing runs any more."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize()
        for buffer in self.buffers:
            buffer.close()


def load_streamed(
    source: LayerSource,
    plan: LoadingPlan,
    device: torch.device,
    *,
    fuser: LayerFuser | None,
    skip_layers: frozenset[int] = frozenset(),
    coded: CodedCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedStream:
    """Load a target for streaming.

    Args:
        plan: which layers are resident, how many ring slots there are, where the embedding lives.
        fuser: makes the substitute's layers; None without a draft.
        skip_layers: layers that stay exact in the substitute.
        coded: of what earlier runs coded with this substitute.
        progress: called with (layers done, layers).

    Raises:
        SubspecError: host memory cannot be locked.
    """
    pin, cpu = device.type == "cuda", torch.device("cpu")
    model = empty_model(source.config, source.dtype, device)
    buffers: list[PinnedBuffer] = []
    shared = dict(source.shared(device))
    if plan.embedding is Placement.host:
        name = "model.embed_tokens.weight"
        table = shared.pop(name)
        buffer = PinnedBuffer(table.numel() * table.element_size(), pin=pin)
        shared[name] = buffer.tensor.view(table.dtype).view(table.shape)
        shared[name].copy_(table)
        buffers.append(buffer)
        del table
    plain = PlainCodec(source.dtype.itemsize)
    head: LevelLinear | None = None
    code: HeadCode | None = None
    if plan.coded_head_bytes and fuser is not None:
        head, code = _code_head(shared, fuser, plain.layer_bytes(source.layer_shapes(0)))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    fill(model, shared)
    if source.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    layers = source.config.num_hidden_layers
    resident = set(plan.resident_layers)
    streamed, fused = {}, []
    coding = TargetCoding(resident, coded) if plan.codec is Codec.substitute else None

    def locked(buffer: PinnedBuffer) -> torch.Tensor:
        if pin:
            buffer.lock()
        buffers.append(buffer)
        return buffer.tensor

    def pinned(nbytes: int) -> torch.Tensor:
        return locked(PinnedBuffer(nbytes, pin=False))

    for index in range(layers):
        restored = None
        if coding is not None and fuser is not None and index not in skip_layers:
            restored = coding.restore(index, source, fuser, device, locked)
        if restored is not None:
            fused.append(restored)
        elif fuser is not None or index not in resident:
            tensors = source.layer(index, device)
            codes: dict[str, QuantizedWeight] = {}
            if fuser is not None:
                exact = index in skip_layers
                keep = None if coding is None else codes
                fused.append(fuser.fuse(tensors, device, exact=exact, index=index, keep=keep))
            if coding is not None and codes:
                coding.add(index, tensors, codes, fused[-1], pinned)
            elif index not in resident:
                streamed[index] = pinned(plain.layer_bytes(source.layer_shapes(index)))
                write_layer(streamed[index], tensors, source.dtype)
            del tensors, codes
        if fuser is not None and index < plan.waiting_layers:
            compact(fused[index], cpu)
        if progress is not None:
            progress(index + 1, layers)
    if fuser is not None and code is None:
        head = fuser.fuse_head(shared.get("lm_head.weight", shared["model.embed_tokens.weight"]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for layer in fused[: plan.waiting_layers]:
        compact(layer, device)
    # By way of the host: a layer on its way would need room on the device beside its place.
    decoding = decoded_head = None
    if coding is not None:
        kept = sum(index in coding.layers for index in resident)
        room = (kept + plan.ring_slots) * plan.layer_bytes
        if code is not None:
            room -= max(0, code.nbytes - plan.coded_head_bytes)
        coding.shrink(room, plan.ring_slots, pinned)
        streamed |= coding.streamed
        decoding = coding.decoder(fused, source.layer_shapes(0), device)
        if code is not None and head is not None:
            assert decoding is not None  # the plan codes no head where no layer is coded
            decoded_head = CodedHead(code, head, decoding.buffer)
    exact = {
        index: flat_layer(source.layer(index, cpu), source.dtype, device)
        for index in sorted(resident - (set(coding.layers) if coding else set()))
    }
    decoder = StreamedTarget(model, exact, streamed, plan.ring_slots, device, decoding, decoded_head)
    substitute = None
    if fuser is not None:
        substitute = fuse_model(source.config, fused, shared, decoder.base.rotary_emb, head)
    bits = coding.bits_per_weight if coding is not None and coding.layers else None
    return LoadedStream(
        decoder,
        substitute,
        buffers,
        exact,
        shared,
        bits,
        None if code is None else code.bits_per_weight,
        coded if coding else None,
    )


def _code_head(shared: dict[str, torch.Tensor], fuser: LayerFuser, room: int) -> tuple[LevelLinear, HeadCode]:
    """The draft's LM head and the exact one coded by it, which is taken out of ``shared`` and forgotten.

    Args:
        room: bytes of the buffer that layers are decoded into.
    """
    exact, codes = shared.pop("lm_head.weight"), list[QuantizedWeight]()
    head = fuser.fuse_head(exact, codes)
    assert head is not None  # the plan codes no head where the draft has none
    return head, encode_head(exact, codes[0], head, room)
