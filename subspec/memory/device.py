"""Device memory as the driver counts it: of this process, of others, and what CUDA takes beside PyTorch's allocations.

CUDA takes memory for its context, for every kernel that is loaded (cuBLAS, Triton, ours) and for captured graphs. No
cap on PyTorch's allocator bounds it, and no tensor shows it. The driver tells the used memory of a whole device only,
so the share of other processes is read once, before this process has a context there.
"""

import subprocess

import torch

from subspec.memory.allocator import GIB, MIB

CONTEXT_BYTES, KERNEL_BYTES = GIB // 2, 4 * GIB // 10
"""CUDA's context, and the kernels and graphs that are loaded after planning: 0.7 to 0.9 GiB together on an H200."""

LEAST_CONTEXT = 64 * MIB
"""A context takes more. If less appears to be this process's, its context was there when the others' share was read."""


def index_of(device: torch.device) -> int:
    """Number of a CUDA device; without one, of the current device."""
    return torch.cuda.current_device() if device.index is None else device.index


_others: dict[int, int] = {}
"""Bytes of other processes by device."""


def bytes_of_others(index: int) -> int:
    """Bytes that other processes held when this process first asked; call it before anything is allocated there."""
    if index not in _others:
        _others[index] = _measure_others(index)
    return _others[index]


def _measure_others(index: int) -> int:
    before = _used_by_all(index)
    free, total = torch.cuda.mem_get_info(index)  # makes the context
    rest = total - free - torch.cuda.memory_reserved(index)
    if before is None or rest - before < LEAST_CONTEXT:
        return max(0, rest - CONTEXT_BYTES - KERNEL_BYTES)
    return before


def bytes_of_process(index: int) -> int:
    """Bytes of the device that this process holds now, as the driver counts."""
    others = bytes_of_others(index)
    free, total = torch.cuda.mem_get_info(index)
    return max(0, total - free - others)


def bytes_of_cuda(index: int) -> int:
    """Bytes that CUDA holds now for this process, beside PyTorch's allocator."""
    return max(0, bytes_of_process(index) - torch.cuda.memory_reserved(index))


def _used_by_all(index: int) -> int | None:
    """Used bytes of a device by nvidia-smi, which needs no context; None without an answer."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    query = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return int(done.stdout) * MIB
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
