"""Layer feeds: where the weights of a streamed target's decoder layers come from during a pass.

A feed serves some of the layers, in the order of the model. A further tier (a disk, another GPU) is one more feed.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from subspec.codec.coded_layer import LayerRestorer
from subspec.offload.stream import LayerStreamer
from subspec.targets.layer_bytes import parameter_views
from subspec.targets.meta_model import fill


class LayerFeed(ABC):
    """Serves decoder layers one at a time.

    Attributes:
        layers: numbers of the layers that it serves.
        resident: those of them whose bytes stay on the device.
        streamer: the copies over the link; None: no layer crosses it.
    """

    layers: Collection[int]
    resident: Collection[int] = ()
    streamer: LayerStreamer | None = None

    @abstractmethod
    def acquire(self, index: int) -> nn.Module:
        """A module that holds the parameters of decoder layer ``index`` until :meth:`release`."""

    def release(self, index: int) -> None:  # noqa: B027 (optional)
        """The kernels that read layer ``index`` are enqueued."""


class ResidentFeed(LayerFeed):
    """Layers whose parameters are on the device."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self._modules = modules
        self.layers = self.resident = sorted(modules)

    def acquire(self, index: int) -> nn.Module:
        return self._modules[index]


class RingFeed(LayerFeed):
    """Layers whose parameters are copied from pinned host memory to ring slots.

    Args:
        template: a decoder layer, copied once per slot; the copies' parameters are views into their slot.
        layers: flat pinned bytes (uint8) by layer number.
        slots: ring slots; clamped to 1 .. number of layers.
    """

    def __init__(
        self,
        template: nn.Module,
        layers: Mapping[int, Tensor],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layers = sorted(layers)
        self.streamer = _streamer(layers, slots, device)
        shapes = {name: parameter.shape for name, parameter in template.named_parameters()}
        self._modules: list[nn.Module] = []
        for slot in self.streamer.slots:
            module = copy.deepcopy(template)
            fill(module, parameter_views(slot, shapes, dtype))
            self._modules.append(module)

    def acquire(self, index: int) -> nn.Module:
        assert self.streamer is not None
        return self._modules[self.streamer.acquire()]

    def release(self, index: int) -> None:
        assert self.streamer is not None
        self.streamer.release()


class CodedFeed(LayerFeed):
    """Coded layers, restored into one buffer from bytes on the device or in a ring slot.

    Args:
        template: a decoder layer; the copy's parameters are views into the buffer.
        restorer: restores a layer from its coded bytes; holds those of the resident layers.
        streamed: flat pinned bytes (uint8) of the layers that are not resident, by layer number.
        slots: ring slots; clamped to 1 .. number of streamed layers.
    """

    def __init__(
        self,
        template: nn.Module,
        restorer: LayerRestorer,
        streamed: Mapping[int, Tensor],
        slots: int,
        device: torch.device,
    ) -> None:
        self.restorer = restorer
        self.layers, self.resident = sorted(restorer.layers), sorted(restorer.resident)
        if streamed:
            self.streamer = _streamer(streamed, slots, device)
        self._module = copy.deepcopy(template)
        fill(self._module, restorer.parameters)

    def acquire(self, index: int) -> nn.Module:
        restorer, streamer = self.restorer, self.streamer
        coded = restorer.resident.get(index)
        if coded is not None:
            restorer.restore(index, coded)
            return self._module
        assert streamer is not None
        slot = streamer.slots[streamer.acquire()]
        restorer.restore(index, slot[: restorer.layers[index].nbytes])
        streamer.release()  # the layer is in the buffer: its slot can be refilled at once
        return self._module


def _streamer(layers: Mapping[int, Tensor], slots: int, device: torch.device) -> LayerStreamer:
    slots = min(max(slots, 1), len(layers))
    return LayerStreamer([layers[index] for index in sorted(layers)], slots, device)
