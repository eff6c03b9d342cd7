"""Coding a target while it is loaded: layer by layer on the device, the codes to the host, the resident ones back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from subspec.drafts.fused import FusedLayer
from subspec.offload.coded_layer import CodedLayer, LayerDecoder, encode_layer
from subspec.quant.codes import QuantizedWeight

Pinned = Callable[[int], Tensor]
"""Makes page-locked memory of so many bytes: uint8."""


class TargetCoding:
    """Collects coded layers.

    Args:
        resident: layers that the plan keeps on the device.

    Attributes:
        layers: what each coded layer's bytes mean.
        streamed: pinned bytes of the coded layers that stream.
    """

    def __init__(self, resident: set[int]) -> None:
        self._planned = resident
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
            self._resident[index] = flat.cpu()
        else:
            self.streamed[index] = pinned(flat.numel())
            self.streamed[index].copy_(flat)

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
    ) -> LayerDecoder | None:
        """The step that rebuilds the coded layers, with the resident ones' bytes on ``device``; None: none is coded."""
        if not self.layers:
            return None
        resident = {index: flat.to(device) for index, flat in sorted(self._resident.items())}
        self._resident.clear()
        return LayerDecoder(self.layers, substitute, shapes, resident, device)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one coded weight takes, on average."""
        parts = [part for layer in self.layers.values() for part in layer.parts]
        words = sum(part.words for part in parts)
        return 32 * words / max(1, sum(part.shape.numel() for part in parts))
