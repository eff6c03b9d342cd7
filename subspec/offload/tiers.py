"""Layers on their way to a device from two tiers: pinned host memory, and a disk by way of a ring in pinned memory.

Protocol: the thread that runs the model asks a :class:`TieredStreamer` for layers in order, as it asks any ring. One
further thread, the copier, begins all copies in their order. Before the copy of a layer from the disk it waits until
the :class:`~subspec.offload.disk.DiskRing` has read the layer, and behind the copy until the layer has left the ring's
slot; no other thread asks the disk's ring for layers. So reads go on while the model drafts and computes, and the
model's thread waits only where it needs a layer that has not been read. Errors of the copier are raised there, before
any kernel reads the layer; the copier then begins nothing more until the streamer is rewound.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from subspec.offload.disk import DiskRing
from subspec.offload.stream import LayerStreamer
from subspec.targets.layer_bytes import PlainCodec, parameter_views


class TieredStreamer(LayerStreamer):
    """Copies layers to device buffers, those of a disk by way of its ring.

    A layer from the disk lies in its buffer as :func:`~subspec.targets.layer_bytes.parameter_views` says.

    Args:
        pinned: uint8 [bytes] each, pinned, by layer number.
        disk: reads the other layers; it is page-locked, and closed with this ring.
        slots: number of ring buffers on ``device``, at least 1 and at most one per layer.

    Raises:
        SubspecError: the disk's ring cannot be page-locked.
    """

    def __init__(self, pinned: Mapping[int, Tensor], disk: DiskRing, slots: int, device: torch.device) -> None:
        layers = dict(pinned)
        for stored in disk.layers:
            size = PlainCodec(stored.dtype.itemsize).layer_bytes(stored.shapes)
            layers[stored.index] = torch.empty(size, dtype=torch.uint8, device="meta")
        super().__init__([layers[index] for index in sorted(layers)], slots, device)
        if self._cuda:
            disk.lock()
        self.disk = disk
        self._copier = ThreadPoolExecutor(1, "copier")
        self._begun: list[Future[None] | None] = [None] * slots
        self._failure: BaseException | None = None

    def _fill(self, slot: int, layer: int) -> None:
        from_disk = self.layers[layer].is_meta
        begin = self._begin_stored if from_disk else super()._fill
        self._begun[slot] = self._copier.submit(self._unless_failed, begin, slot, layer)
        if from_disk:
            self._copier.submit(self._unless_failed, self._leave, slot)

    def _unless_failed(self, step: Callable[..., None], *arguments: int) -> None:
        """In the copier: a step of the sequence, which ends with the first that fails."""
        if self._failure is not None:
            raise self._failure
        try:
            with torch.inference_mode():
                step(*arguments)
        except BaseException as error:
            self._failure = error
            raise

    def _begin_stored(self, slot: int, layer: int) -> None:
        at = self.disk.acquire()
        stored, read = self.disk.layer_in(at), self.disk.parameters(at)
        places = parameter_views(self.slots[slot], stored.shapes, stored.dtype)
        self._copy(slot, layer, [(places[name], read[name]) for name in places])

    def _leave(self, slot: int) -> None:
        if self._cuda:
            self._copied[slot].synchronize()
        self.disk.release()

    def _wait(self, slot: int) -> None:
        begun = self._begun[slot]
        assert begun is not None
        begun.result()
        super()._wait(slot)

    def _settle(self) -> None:
        self._copier.submit(int).result()  # behind everything that was begun
        super()._settle()
        self._failure = None
        self.disk.restart()  # also where the first layer's read has failed

    def close(self) -> None:
        self._copier.shutdown(cancel_futures=True)
        if self._cuda:
            self._stream.synchronize()
        self.disk.close()
