"""Coding a target while it is loaded: layer by layer on the device, the codes to the host, the resident ones back.

What an earlier run coded is taken from the disk (:mod:`subspec.codec.coded_cache`), without the exact weights.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from subspec.codec.coded_cache import Checks, CodedCache, KeptLayer, codes_checksum
from subspec.codec.coded_layer import CodedLayer, LayerRestorer, encode_layer
from subspec.codec.restore import PieceRestorer
from subspec.levels.build import LayerFuser
from subspec.levels.model import FusedLayer
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.targets.layer_bytes import parameter_views
from subspec.targets.source import LayerSource
from subspec.utils.checksum import checksum
from subspec.utils.pinned import PinnedBuffer

Pinned = Callable[[int], Tensor]
"""Makes page-locked memory of so many bytes: uint8."""


class TargetCoding:
    """Collects coded layers.

    Args:
        resident: layers that the plan keeps on the device.
        cache: of what earlier runs coded; None: nothing is kept.

    Attributes:
        layers: what each coded layer's bytes mean.
        streamed: pinned bytes of the coded layers that stream.
    """

    def __init__(self, resident: set[int], cache: CodedCache | None = None) -> None:
        self._planned, self._cache = resident, cache
        self._resident: dict[int, Tensor] = {}
        self.layers: dict[int, CodedLayer] = {}
        self.streamed: dict[int, Tensor] = {}

    def add(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, QuantizedWeight],
        substitute: FusedLayer,
        pinned: Pinned,
    ) -> None:
        """Code a layer; its exact tensors may be forgotten afterwards.

        Raises:
            TypeError: its substitute's codes name no intervals.
        """
        layer, flat = encode_layer(tensors, codes, substitute)
        self.layers[index] = layer
        if index in self._planned:
            # To the host for now: the quantizer's temporaries and the resident layers need not fit at once.
            self._resident[index] = host = flat.cpu()
        else:
            self.streamed[index] = host = pinned(flat.numel())
            host.copy_(flat)
        if self._cache is not None:
            self._cache.coded += 1
            checks = {
                part.name: Checks(codes_checksum(codes[part.name]), checksum(tensors[part.name]))
                for part in layer.parts
                if self._cache.trouble is None
            }
            self._cache.keep(index, layer, checks, host)

    def restore(
        self,
        index: int,
        source: LayerSource,
        fuser: LayerFuser,
        device: torch.device,
        locked: Callable[[PinnedBuffer], Tensor],
    ) -> FusedLayer | None:
        """A layer as an earlier run coded it, checked as :mod:`subspec.codec.coded_cache` says.

        Args:
            source: of the exact weights, of which only a sample is read.
            locked: page-locks memory, and keeps it.

        Returns:
            The layer's substitute; None: the layer has to be read and coded.
        """
        cache = self._cache
        if cache is None or not cache.has(index):
            return None
        shapes = source.layer_shapes(index)
        linears = {name.removesuffix(".weight"): shapes[name] for name in cache.linears}
        found = cache.quantizer.layer(index, linears, device)
        kept = None if found is None else cache.find(index)
        if found is None or kept is None:
            return None
        # All layers are decoded into one buffer, and what is exact is copied there in one run.
        if list(kept.layer.exact.items()) != [own for own in shapes.items() if own[0] not in cache.linears]:
            cache.reject(index, "is laid out otherwise")
            return None
        codes = {f"{module}.weight": own for module, own in found.items()}
        if {name: own.codes for name, own in kept.checks.items()} != {
            name: codes_checksum(own) for name, own in codes.items()
        }:
            cache.reject(index, "is of another substitute")
            return None
        counted = fuser.modules, fuser.weights, fuser.stored_bytes
        host = kept.buffer.tensor
        exact = parameter_views(host, kept.layer.exact, torch.bfloat16)
        on_device = {name: tensor.to(device) for name, tensor in exact.items()}
        substitute = fuser.fuse(on_device, device, index=index, known=codes)
        modules = len(codes)
        del found, codes  # room for the decoded Linears
        if (problem := _problem(kept, substitute, source.sample(index), device)) is not None:
            fuser.modules, fuser.weights, fuser.stored_bytes = counted
            cache.reject(index, problem)
            return None
        cache.read += 1
        cache.quantizer.store.read += modules
        self.layers[index] = kept.layer
        if index in self._planned:
            self._resident[index] = host
        else:
            self.streamed[index] = locked(kept.buffer)
        return substitute

    def shrink(self, room: int, slots: int, pinned: Pinned) -> None:
        """Stream resident layers, last ones first, until codes that came out larger than planned fit.

        Args:
            room: device bytes that the plan has for resident coded layers and ring slots.
            slots: of the ring.
        """

        def taken() -> int:
            ring = max((flat.numel() for flat in self.streamed.values()), default=0)
            return sum(flat.numel() for flat in self._resident.values()) + max(slots, 1) * ring

        while self._resident and taken() > room:
            index, flat = self._resident.popitem()
            self.streamed[index] = pinned(flat.numel())
            self.streamed[index].copy_(flat)

    def decoder(
        self, substitute: Sequence[FusedLayer], shapes: Mapping[str, torch.Size], device: torch.device
    ) -> LayerRestorer | None:
        """The step that rebuilds the coded layers, with the resident ones' bytes on ``device``; None: none is coded."""
        if not self.layers:
            return None
        resident = {index: flat.to(device) for index, flat in sorted(self._resident.items())}
        self._resident.clear()
        return LayerRestorer(self.layers, substitute, shapes, resident, device)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one coded weight takes, on average."""
        parts = [part for layer in self.layers.values() for part in layer.parts]
        words = sum(part.words for part in parts)
        return 32 * words / max(1, sum(part.shape.numel() for part in parts))


def _problem(
    kept: KeptLayer, substitute: FusedLayer, sample: Mapping[str, Tensor], device: torch.device
) -> str | None:
    """Why a layer from the disk is not what it was made from; None: it is, bit for bit.

    Args:
        substitute: made of the codes that the layer was coded with.
        sample: of the target's weights as they are now.
    """
    host = kept.buffer.tensor
    exact = parameter_views(host, kept.layer.exact, torch.bfloat16)
    if not all(
        _same(tensor[:1] if tensor.dim() > 1 else tensor, sample.get(name)) for name, tensor in exact.items()
    ):
        return "is of other weights"
    flat = host.to(device)
    for part in kept.layer.parts:
        decoded = torch.empty(part.shape, dtype=torch.bfloat16, device=device)
        PieceRestorer([part.piece(decoded, substitute)])(flat)
        if checksum(decoded) != kept.checks[part.name].weight:
            return "is not rebuilt to what it was made from"
        if not _same(decoded[:1].cpu(), sample.get(part.name)):
            return "is of other weights"
    return None


def _same(kept: Tensor, now: Tensor | None) -> bool:
    """Bit for bit, where there is something to compare with."""
    return now is None or torch.equal(kept.view(torch.int16), now.contiguous().view(torch.int16))
