"""Phase times without added synchronisation: host clock on a CPU, events on a GPU."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """One phase as a timeline shows it: host seconds (``perf_counter``), and its events on the device's stream."""

    name: str
    host_begin: float
    host_end: float
    device_begin: torch.cuda.Event | None = None
    device_end: torch.cuda.Event | None = None


class PhaseClock:
    """Adds up the time of named phases.

    On a GPU a phase is bracketed by two events on the current stream, so that timing adds no synchronisation: the
    engine's one read-back per iteration completes the phases before it.

    Args:
        device: where the phases run.
        trace: a list that every phase is appended to, for a timeline.
    """

    def __init__(self, device: torch.device, trace: list[Span] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._trace = trace
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block under ``name``."""
        begin = end = None
        start = time.perf_counter()
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            yield
            self._seconds[name] += time.perf_counter() - start
        if self._trace is not None:
            self._trace.append(Span(name, start, time.perf_counter(), begin, end))

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Mark a stretch in which the host waits for the device; only traced, not added up."""
        start = time.perf_counter()
        yield
        if self._trace is not None:
            self._trace.append(Span(name, start, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call, of the phases that have finished; never waits."""
        pending = []
        for name, begin, end in self._events:
            if end.query():
                self._seconds[name] += begin.elapsed_time(end) / 1e3
            else:
                pending.append((name, begin, end))
        self._events = pending
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def drain(self) -> dict[str, float]:
        """Like :meth:`take`, after waiting for the phases still running."""
        for _, _, end in self._events:
            end.synchronize()
        return self.take()
