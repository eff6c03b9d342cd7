"""Layer feeds: where the weights of a streamed target's decoder layers come from during a pass.

A feed serves some of the layers, in the order of the model. A further tier (another GPU) is one more feed.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
from torch import nn

from subspec.codec.coded_layer import LayerRestorer
from subspec.offload.disk import DiskRing
from subspec.offload.stream import LayerRing, LayerStreamer
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
    streamer: LayerRing | None = None

    @abstractmethod
    def acquire(self, index: int) -> nn.Module:
        """A module that holds the parameters of decoder layer ``index`` until :meth:`release`."""

    def release(self, index: int) -> None:  # noqa: B027 (optional)
        """The kernels that read layer ``index`` are enqueued."""

    def close(self) -> None:
        """Close files; no layer is asked for any more."""
        if self.streamer is not None:
            self.streamer.close()


class ResidentFeed(LayerFeed):
    """Layers whose parameters are on the device."""

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        self._modules = modules
        self.layers = self.resident = sorted(modules)

    def acquire(self, index: int) -> nn.Module:
        return self._modules[index]


class RingFeed(LayerFeed):
    """Layers whose parameters are copied to ring slots on the device.

    Args:
        template: a decoder layer, copied once per slot; the copies' parameters are views into their slot.
        streamer: copies them; their bytes are laid out by :func:`~subspec.targets.layer_bytes.parameter_views`.
    """

    streamer: LayerStreamer

    def __init__(
        self, template: nn.Module, layers: Collection[int], streamer: LayerStreamer, dtype: torch.dtype
    ) -> None:
        self.layers, self.streamer = sorted(layers), streamer
        shapes = {name: parameter.shape for name, parameter in template.named_parameters()}
        self._modules: list[nn.Module] = []
        for slot in streamer.slots:
            module = copy.deepcopy(template)
            fill(module, parameter_views(slot, shapes, dtype))
            self._modules.append(module)

    def acquire(self, index: int) -> nn.Module:
        return self._modules[self.streamer.acquire()]

    def release(self, index: int) -> None:
        self.streamer.release()


class DiskFeed(LayerFeed):
    """Layers that are read from a disk to slots in host memory, for a target that runs on the CPU.

    Args:
        template: a decoder layer, copied once; the copy's parameters are views into the slot of the layer in use.
    """

    streamer: DiskRing

    def __init__(self, template: nn.Module, ring: DiskRing) -> None:
        self.layers, self.streamer = [layer.index for layer in ring.layers], ring
        self._module = copy.deepcopy(template)

    def acquire(self, index: int) -> nn.Module:
        fill(self._module, self.streamer.parameters(self.streamer.acquire()))
        return self._module

    def release(self, index: int) -> None:
        self.streamer.release()


class CodedFeed(LayerFeed):
    """Coded layers, restored into one buffer from bytes on the device or in a ring slot.

    A layer that is restored slice by slice keeps its slot until it is released.

    Args:
        template: a decoder layer; the copy's parameters are the restorer's.
        restorer: restores a layer from its coded bytes; holds those of the resident layers.
        streamer: copies the bytes of the layers that are not resident; None: all are.
    """

    streamer: LayerStreamer | None

    def __init__(self, template: nn.Module, restorer: LayerRestorer, streamer: LayerStreamer | None) -> None:
        self.restorer, self.streamer = restorer, streamer
        self.layers, self.resident = sorted(restorer.layers), sorted(restorer.resident)
        self._module = copy.deepcopy(template)
        fill(self._module, restorer.parameters)
        self._sliced = restorer.passes is not None
        if self._sliced:
            self._module.restorer = restorer

    def acquire(self, index: int) -> nn.Module:
        restorer, streamer = self.restorer, self.streamer
        coded = restorer.resident.get(index)
        if coded is not None:
            restorer.restore(index, coded)
            return self._module
        assert streamer is not None
        slot = streamer.slots[streamer.acquire()]
        restorer.restore(index, slot[: restorer.layers[index].nbytes])
        if not self._sliced:
            streamer.release()  # the layer is in the buffer: its slot can be refilled at once
        return self._module

    def release(self, index: int) -> None:
        if self._sliced and self.streamer is not None and index not in self.restorer.resident:
            self.streamer.release()
