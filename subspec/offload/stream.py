"""Copies of layers from pinned host memory through a ring of device buffers, in the order of use.

Copies run on a stream of their own and never wait for Python: once a layer's kernels are *enqueued*, the host enqueues
the copy that refills the layer's buffer behind them. Events order both directions: a layer's kernels wait until its
copy has arrived, and a copy waits until the kernels that read the buffer's previous content have finished. The order
of layers is cyclic: the last layers of one pass are followed by the first of the next, so the ring fills up while the
draft works.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subspec.utils.rounding import round_up


class LayerStreamer:
    """Feeds layers to a forward pass that uses them in a fixed cyclic order.

    Args:
        layers: uint8 [bytes] each, pinned, in the order of use; sizes may differ.
        slots: number of ring buffers, at least 1 and at most ``len(layers)``.
        device: of the ring.
        guard_refills: False omits the events that keep a refill from overtaking its readers (for a test of them).
    """

    def __init__(
        self, layers: Sequence[Tensor], slots: int, device: torch.device, *, guard_refills: bool = True
    ) -> None:
        if not 1 <= slots <= len(layers):
            raise ValueError(f"{slots} ring slots for {len(layers)} streamed layers")
        self.layers = list(layers)
        size = max(layer.numel() for layer in layers)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._cuda = device.type == "cuda"
        self._guard = guard_refills
        # Copies enqueued so far; copy n takes layer n % len(layers) to slot n % slots.
        self._copied_count = 0
        self._used_count = 0  # layers whose kernels are enqueued
        self.bytes_copied = 0
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.copy_log: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] | None = None
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._copied = [torch.cuda.Event() for _ in range(slots)]
            self._released: list[torch.cuda.Event | None] = [None] * slots
            # The buffers were made on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def prefetch(self) -> None:
        """Enqueue every copy that has a free slot."""
        while self._copied_count - self._used_count < len(self.slots):
            self._copy(self._copied_count)
            self._copied_count += 1

    def acquire(self) -> int:
        """The slot of the next layer; the current stream waits for its copy."""
        self.prefetch()
        slot = self._used_count % len(self.slots)
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._copied[slot])
        return slot

    def release(self) -> None:
        """The kernels that read the layer are enqueued: refill its slot behind them."""
        slot = self._used_count % len(self.slots)
        if self._cuda:
            released = torch.cuda.Event()
            released.record()
            self._released[slot] = released
        self._used_count += 1
        self.prefetch()

    @property
    def position(self) -> int:
        """Index in ``layers`` of the layer that comes next."""
        return self._used_count % len(self.layers)

    def rewind(self) -> None:
        """Make the first layer the next one, after a pass that was interrupted."""
        if self.position == 0:
            return
        if self._cuda:
            torch.cuda.synchronize()
            self._released = [None] * len(self.slots)
        # Both counters go on from a common multiple, so that slot and layer numbering start afresh.
        period = len(self.layers) * len(self.slots)
        self._used_count = self._copied_count = round_up(max(self._copied_count, self._used_count), period)

    def _copy(self, number: int) -> None:
        slot, source = number % len(self.slots), self.layers[number % len(self.layers)]
        target = self.slots[slot][: source.numel()]
        self.bytes_copied += source.numel()
        if not self._cuda:
            target.copy_(source)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            released = self._released[slot]
            if self._guard and released is not None:
                self._stream.wait_event(released)
            begin.record()
            target.copy_(source, non_blocking=True)
            end.record()
            self._copied[slot].record()
        self._timed.append((begin, end))
        if self.copy_log is not None:
            self.copy_log.append((number % len(self.layers), begin, end))

    def take(self) -> tuple[int, float]:
        """(bytes enqueued, seconds of finished copies) since the last call; never waits."""
        seconds, pending = 0.0, []
        for begin, end in self._timed:
            if end.query():
                seconds += begin.elapsed_time(end) / 1e3
            else:
                pending.append((begin, end))
        self._timed = pending
        copied, self.bytes_copied = self.bytes_copied, 0
        return copied, seconds
