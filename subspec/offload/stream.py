"""Rings of layer buffers that are filled ahead of use, in the order of use.

The order of layers is cyclic: the last layers of one pass are followed by the first of the next, so the ring fills up
while the draft works. :class:`LayerStreamer` copies from pinned host memory to a device; a ring that reads from a disk
is in :mod:`subspec.offload.disk`, and the two in a row are in :mod:`subspec.offload.tiers`.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from subspec.kernels.timing import EventLog
from subspec.utils.rounding import round_up


class LayerRing(ABC):
    """Counts what a ring holds, for passes that use the layers in a fixed cyclic order.

    Args:
        sizes: bytes of each layer, in the order of use.
        count: number of ring slots, at least 1 and at most one per layer.
    """

    def __init__(self, sizes: Sequence[int], count: int) -> None:
        if not 1 <= count <= len(sizes):
            raise ValueError(f"{count} ring slots for {len(sizes)} streamed layers")
        self.sizes, self.count, self.bytes_per_pass = list(sizes), count, sum(sizes)
        # Copies begun so far; copy n takes layer n % len(sizes) to slot n % count.
        self._copied_count = 0
        self._used_count = 0  # layers whose readers are done, or enqueued
        self.bytes_copied = 0  # of all copies begun so far
        self._taken = (0, 0.0)
        self._waits = False  # from the wait for a layer on, until it has come: the wait may fail or be interrupted

    def prefetch(self) -> None:
        """Begin every copy that has a free slot."""
        while self._copied_count - self._used_count < self.count:
            layer = self._copied_count % len(self.sizes)
            self.bytes_copied += self.sizes[layer]
            self._fill(self._copied_count % self.count, layer)
            self._copied_count += 1

    def acquire(self) -> int:
        """The slot of the next layer; its readers find it filled."""
        self.prefetch()
        slot = self._used_count % self.count
        self._waits = True
        self._wait(slot)
        self._waits = False
        return slot

    def release(self) -> None:
        """The layer's readers are done, or enqueued: refill its slot behind them."""
        self._freed(self._used_count % self.count)
        self._used_count += 1
        self.prefetch()

    @property
    def position(self) -> int:
        """Number, among the layers, of the one that comes next."""
        return self._used_count % len(self.sizes)

    def rewind(self) -> None:
        """Make the first layer the next one, after a pass that failed or was interrupted."""
        if self._waits or self.position != 0:
            self.restart()

    def restart(self) -> None:
        """Make the first layer the next one, and begin its copy anew."""
        self._settle()
        # Both counters go on from a common multiple, so that slot and layer numbering start afresh.
        period = len(self.sizes) * self.count
        self._used_count = self._copied_count = round_up(max(self._copied_count, self._used_count), period)
        self._waits = False

    def take(self) -> tuple[int, float]:
        """(bytes of copies begun, seconds of finished copies) since the last call; never waits.

        Another thread may use the ring meanwhile: it only adds to both sums.
        """
        now, before = (self.bytes_copied, self._seconds()), self._taken
        self._taken = now
        return now[0] - before[0], now[1] - before[1]

    @abstractmethod
    def _fill(self, slot: int, layer: int) -> None:
        """Begin to fill ``slot`` with ``layer``."""

    @abstractmethod
    def _wait(self, slot: int) -> None:
        """Let readers wait until ``slot`` is filled."""

    def _freed(self, slot: int) -> None:  # noqa: B027 (optional)
        """The readers of ``slot`` are done, or enqueued."""

    @abstractmethod
    def _settle(self) -> None:
        """Wait for everything that was begun."""

    @abstractmethod
    def _seconds(self) -> float:
        """Seconds of all copies that have finished so far."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Wait for everything that was begun; the ring must not be used any more. May be called twice."""


class LayerStreamer(LayerRing):
    """Copies layers from pinned host memory to device buffers.

    Copies run on a stream of their own and never wait for Python: once a layer's kernels are *enqueued*, the host
    enqueues the copy that refills the layer's buffer behind them. Events order both directions: a layer's kernels wait
    until its copy has arrived, and a copy waits until the kernels that read the buffer's previous content have
    finished.

    Args:
        layers: uint8 [bytes] each, pinned, in the order of use; sizes may differ.
        slots: number of ring buffers, at least 1 and at most ``len(layers)``.
    """

    def __init__(self, layers: Sequence[Tensor], slots: int, device: torch.device) -> None:
        super().__init__([layer.numel() for layer in layers], slots)
        self.layers = list(layers)
        self.slots = [torch.empty(max(self.sizes), dtype=torch.uint8, device=device) for _ in range(slots)]
        self._cuda = device.type == "cuda"
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._finished = 0.0
        self.copy_log: EventLog | None = None
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event(blocking=True) for _ in range(slots)]
            self._released: list[torch.cuda.Event | None] = [None] * slots
            # The buffers were made on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def _wait(self, slot: int) -> None:
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._copied[slot])

    def _freed(self, slot: int) -> None:
        if self._cuda:
            released = torch.cuda.Event()
            released.record()
            self._released[slot] = released

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self._released = [None] * len(self.slots)

    def _fill(self, slot: int, layer: int) -> None:
        source = self.layers[layer]
        self._copy(slot, layer, [(self.slots[slot][: source.numel()], source)])

    def _copy(self, slot: int, layer: int, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy ``layer`` to ``slot``: (place in the slot, source) of each part."""
        if not self._cuda:
            for place, source in parts:
                place.copy_(source)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            released = self._released[slot]
            if released is not None:
                self._stream.wait_event(released)
            begin.record()
            for place, source in parts:
                place.copy_(source, non_blocking=True)
            end.record()
            self._copied[slot].record()
        self._timed.append((begin, end))
        if self.copy_log is not None:
            self.copy_log.append((layer, begin, end))

    def _seconds(self) -> float:
        while self._timed and self._timed[0][1].query():  # copies finish in their order
            begin, end = self._timed.popleft()
            self._finished += begin.elapsed_time(end) / 1e3
        return self._finished
