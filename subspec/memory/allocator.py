"""Bytes that PyTorch's CUDA allocator takes for tensors, and the part of a budget that no plan gives away."""

import functools
import math
from dataclasses import dataclass

from subspec.config.schema import Placement
from subspec.utils.rounding import round_up

MIB = 2**20
GIB = 2**30

HEADROOM, LEAST_HEADROOM = 0.01, 64 * MIB
"""Free part of every budget: 1 %, at least 64 MiB.

A cap on PyTorch's allocator enforces the budget. At the cap the allocator frees its cached segments, synchronises the
device and tries again: nothing fails, but passes stall. Segments grow in steps of 20 MiB, and a plan was within 30 MiB
of the reserved memory on an H200 (7B in 8 GiB), so 64 MiB keeps the cap two segments away. Workspaces and fragments
grow with the model, hence the share.
"""

LIBRARY_BYTES = 32 * MIB
"""cuBLAS keeps a workspace for each stream that it multiplies on (32 MiB on Hopper, 8 MiB before): the compute stream,
unless passes are batch-invariant and the draft's kernels there ours, and the stream that captures a draft's graphs,
unless all of these kernels are."""

GRAPH_BYTES = 32 * MIB
"""Fragments in the memory pool of captured graphs, which is never freed. Draft levels do not run concurrently, so their
graphs share a pool; their logits lie outside it."""

ALLOCATOR_BYTES = 64 * MIB
"""Partly empty segments of the allocator: workspaces grow with the prefix, so freed blocks rarely fit the next pass."""

Tensors = tuple[tuple[int, int], ...]
"""(bytes, number) of tensors of equal size."""


@dataclass(frozen=True)
class Allocation:
    """Named memory of a run: ``tensors`` on ``place``; ``note`` describes them for people."""

    name: str
    tensors: Tensors
    note: str = ""
    place: Placement = Placement.device

    @property
    def bytes(self) -> int:
        return sum(size * count for size, count in self.tensors)

    @property
    def rounding(self) -> int:
        """Bytes that the CUDA allocator adds."""
        return sum((rounded(size) - size) * count for size, count in self.tensors)


def headroom(budget: int) -> int:
    """Bytes of ``budget`` that stay free (:data:`HEADROOM`)."""
    return max(LEAST_HEADROOM, math.ceil(budget * HEADROOM))


def least_budget(used: int) -> int:
    """The smallest budget that holds ``used`` bytes and its headroom."""
    budget = max(used + LEAST_HEADROOM, math.ceil(used / (1 - HEADROOM)))
    return budget + max(0, used + headroom(budget) - budget)


@functools.lru_cache(maxsize=4096)
def rounded(size: int) -> int:
    """Device bytes that PyTorch's allocator takes for a tensor of ``size`` bytes.

    Up to 1 MiB: a multiple of 512 bytes. From 10 MiB: a segment of its own, a multiple of 2 MiB. In between, tensors
    share segments of 20 MiB: the size counts as the share of a segment filled with tensors like it.
    """
    if size <= MIB:
        return round_up(size, 512)
    if size < 10 * MIB:
        return math.ceil(20 * MIB / (20 * MIB // size))
    return round_up(size, 2 * MIB)
