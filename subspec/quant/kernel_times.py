"""Times of a kernel as a draft level runs it: weights in no cache, on a GPU in a CUDA graph."""

import copy
import time
from pathlib import Path

import torch
from torch import Tensor

from subspec.kernels import launch
from subspec.kernels.int4_wide import empty_rows
from subspec.kernels.timing import graph_time, slug
from subspec.quant import gemlite
from subspec.quant.gemlite import GemLite, load_tuning, save_tuning
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.weight_format import WeightFormat
from subspec.utils.console import Note
from subspec.utils.cpu import cpu_name

CACHES = 3
"""Copies of a weight take this many times the L2 cache, so that none is still cached when its turn comes again."""

MOST_COPIES = 64
"""Copies of one weight; only weights of some tens of kilobytes would need more."""

CPU_WEIGHTS = 4
"""Weights that are timed together on a CPU."""

CPU_CACHE = 1 << 23
"""float32 numbers that fill a CPU's caches."""

CPU_SMALL = 1 << 16
"""Numbers in a weight for which it matters whether it is in a cache."""

CPU_ROUNDS = 7
"""Measurements of which the fastest counts; processes disturb each other on a CPU."""

Won = dict[str, tuple[WeightFormat, tuple[int, int]]]
"""Format and shape by role."""


class CudaBench:
    """A CUDA device to choose kernels for.

    Args:
        device: where the kernels will run.
        overlap: whether launches are to overlap; None: where the device can.

    Attributes:
        name: of the card, as in records and file names.
        launches: how they are launched there (:func:`subspec.kernels.launch.how`), and measured.
    """

    def __init__(self, device: torch.device, overlap: bool | None = None) -> None:
        self.device = device
        self.launches = launch.how(device, overlap)
        self.name = torch.cuda.get_device_name(device)
        self._gemlite = False

    def unavailable(self, kernel: str, format_: WeightFormat) -> str | None:
        """Why a kernel cannot run here; None if it can."""
        with torch.cuda.device(self.device):
            return format_.unavailable(kernel, self.device)

    def seconds(self, variant: Variant, format_: WeightFormat, role: str, n: int, k: int, rows: int) -> float:
        """Seconds of one call; any exception means that this kernel cannot do it."""
        options = {"swiglu": role == "gate_up", "overlap": self.launches == launch.OVERLAPPING}
        with torch.cuda.device(self.device):
            return variant_time(variant, format_, n, k, rows, self.device, **options)

    def begin(self, kernels: list[str], folder: Path, note: Note) -> None:
        """Prepare to measure these kernels; called once."""
        self._gemlite = GemLite.kind in kernels
        if self._gemlite:
            load_tuning(self._tuning(folder), note)

    def finish(self, won: Won, rows: int, measured: bool, folder: Path, note: Note) -> None:
        """Clean up; called once. ``won``: the roles that gemlite won; ``measured``: whether anything was."""
        with torch.cuda.device(self.device), torch.inference_mode():
            for role, (format_, (n, k)) in won.items():
                swiglu = role == "gate_up"
                linear = format_.random_linear(Variant(GemLite.kind), n, k, self.device, swiglu=swiglu)
                # A tree's first level has one row, for which gemlite has another kernel to tune.
                for count in {1, rows}:
                    linear(torch.zeros(count, k, device=self.device, dtype=torch.bfloat16))
                del linear
        if won or measured:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        if self._gemlite and (won or measured):
            save_tuning(self._tuning(folder), note)

    def _tuning(self, folder: Path) -> Path:
        return folder / f"gemlite-{slug(self.name)}-{gemlite.version()}.json"


class CpuBench:
    """The CPU of this process, as :class:`CudaBench`. Its threads are part of the name: they decide what is fastest."""

    launches = ""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = f"{cpu_name()} {torch.get_num_threads()} threads"

    def unavailable(self, kernel: str, format_: WeightFormat) -> str | None:
        """As :meth:`CudaBench.unavailable`."""
        return format_.unavailable(kernel, self.device)

    @torch.inference_mode()
    def seconds(self, variant: Variant, format_: WeightFormat, role: str, n: int, k: int, rows: int) -> float:
        """Seconds of one call, over weights that take turns; the least of :data:`CPU_ROUNDS`."""
        count = CPU_WEIGHTS if n * k < CPU_CACHE else 1
        swiglu, x = role == "gate_up", torch.randn(rows, k)
        linears = [format_.random_linear(variant, n, k, self.device, swiglu=swiglu) for _ in range(count)]
        best, other = float("inf"), torch.ones(CPU_CACHE if n * k >= CPU_SMALL else 1)
        for _ in range(CPU_ROUNDS):
            other.add_(1)  # a level reads all layers before it comes back to one
            started = time.perf_counter()
            for linear in linears:
                linear(x)
            best = min(best, (time.perf_counter() - started) / count)
        return best

    def begin(self, kernels: list[str], folder: Path, note: Note) -> None:
        """Nothing to prepare."""

    def finish(self, won: Won, rows: int, measured: bool, folder: Path, note: Note) -> None:
        """Nothing to clean up."""


def rotation(linear: LevelLinear, device: torch.device) -> list[LevelLinear]:
    """Copies of a Linear that together do not fit into the device's caches, at least two."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(max(2, -(-CACHES * cache // linear.nbytes)), MOST_COPIES)
    copies = [linear]
    for _ in range(count - 1):
        other = copy.copy(linear)
        other.adopt([tensor.clone() for tensor in linear.tensors])
        copies.append(other)
    return copies


def rotated_time(linears: list[LevelLinear], x: Tensor) -> float:
    """Seconds of one call, over Linears that take turns."""
    return graph_time(lambda: [linear(x) for linear in linears]) / len(linears)


def variant_time(
    variant: Variant,
    format_: WeightFormat,
    n: int,
    k: int,
    rows: int,
    device: torch.device,
    *,
    swiglu: bool,
    overlap: bool | None = None,
) -> float:
    """Seconds of one call of a kernel on a weight [n, k] and ``rows`` rows, weights not cached.

    Takes three times the L2 cache of device memory (at least two weights) for the duration of the call.

    Args:
        overlap: whether launches overlap (:func:`subspec.kernels.launch.how`). Captured, the first one has nothing in
            its graph to overlap with, and graphs replayed one after the other do not overlap.
    """
    on = launch.how(device, overlap) == launch.OVERLAPPING
    with torch.inference_mode(), launch.overlapping(on):
        linears = rotation(format_.random_linear(variant, n, k, device, swiglu=swiglu), device)
        return rotated_time(linears, empty_rows(rows, k, device, linears[0].reads).normal_())
