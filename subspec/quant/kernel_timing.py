"""Time of small kernels as a draft level runs them: inside a CUDA graph, with weights that are in no cache."""

import copy

import torch
from torch import Tensor

from subspec.kernels import launch
from subspec.kernels.timing import graph_time
from subspec.quant.affine_format import AffineFormat, Format
from subspec.quant.level_linear import LevelLinear, Variant

CACHES = 3
"""Weights that are rotated take this many times the L2 cache, so that none is found there again."""

MOST_COPIES = 64
"""Of one weight; only weights of some tens of kilobytes would need more."""


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
