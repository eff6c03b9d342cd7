"""Time of small kernels as a draft level runs them: inside a CUDA graph, with weights that are in no cache."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from subspec.kernels import launch
from subspec.kernels.capture import capturing
from subspec.kernels.formats import AffineFormat, Format
from subspec.kernels.ops import LevelLinear, Variant

ROUNDS = 3
"""Measurements of which the fastest counts: what disturbs a kernel only ever makes it slower."""

CACHES = 3
"""Weights that are rotated take this many times the L2 cache, so that none is found there again."""

MOST_COPIES = 64
"""Of one weight; only weights of some tens of kilobytes would need more."""


def graph_time(call: Callable[[], object], repeats: int = 20) -> float:
    """Seconds per call of ``call``, which may launch several kernels."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        call()
    graph.replay()
    best = float("inf")
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / repeats)
    return best


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
    n: int,
    k: int,
    rows: int,
    device: torch.device,
    *,
    swiglu: bool,
    format_: Format = AffineFormat(),  # noqa: B008 (frozen)
    overlap: bool | None = None,
) -> float:
    """Seconds of one call of a kernel on a weight [n, k] and ``rows`` rows, weights not cached.

    Takes three times the L2 cache of device memory (at least two weights), and gives it back.

    Args:
        overlap: whether launches overlap (:func:`subspec.kernels.launch.how`). Captured, the first one has nothing in
            its graph to overlap with, and graphs replayed one after the other do not overlap.
    """
    on = launch.how(device, overlap) == launch.OVERLAPPING
    with torch.inference_mode(), launch.overlapping(on):
        linears = rotation(format_.random_linear(variant, n, k, device, swiglu=swiglu), device)
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        return rotated_time(linears, x)
