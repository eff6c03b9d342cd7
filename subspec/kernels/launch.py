"""Launches that overlap: programmatic dependent launch for the kernels of a draft level.

A level is a chain of some 260 kernels, each of a few microseconds. Launched one behind the other, every kernel starts
with nothing on its way from memory, and ends with most of the device idle. With programmatic dependent launch (CUDA
programming guide, "Programmatic Dependent Launch and Synchronization"; compute capability 9.0) a kernel's blocks may
start as soon as every block of the kernel before has executed ``griddepcontrol.launch_dependents``; they load constants
(weights), and then execute ``griddepcontrol.wait``, which returns when the kernel before has ended and
its writes can be seen. Captured in a CUDA graph such launches become programmatic edges.

Why that is safe, as long as every kernel that is launched here keeps one rule: **all its threads execute the wait
before they read anything but constants, and before they write anything.**

- *Read after write, one kernel back*: the wait itself.
- *Any number of kernels back*: a kernel cannot end before its own wait has returned, so when kernel n has ended, n - 1
  had, and so on down to the first kernel of the level, which is launched the ordinary way, behind everything
  before it. Waiting for n therefore waits for all of them.
- *Write after read* (scratch that the allocator hands on within a level, the residual): writes lie behind the wait too.
- *Constants* read before the wait are written by no kernel of the same level: weights, norms' gains, biases, rotary
  frequencies.
- Kernels of others in between (cuBLAS, other quantizers') are launched the ordinary way: they start when the kernel
  before them has ended, and to their successors they look like kernels that release nothing early.
- *No deadlock*: a kernel's blocks start only when all blocks of the kernel before run or have ended, so waiting
  blocks never keep the place of one that they wait for.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OVERLAP = True
"""Default of :func:`how`: whether launches overlap where the device can."""

OVERLAPPING = "overlapping"
"""Value of :func:`how` in records when launches overlap; any other value contains the reason why not."""

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_on = False


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute`` of cuda.h: an enum, padding to eight bytes, a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def problem(device: torch.device) -> str | None:
    """Why launches cannot overlap on ``device``, in a few words; None if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "no CUDA device"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0 (Hopper) or later"
    return None


def how(device: torch.device, asked: bool | None = None) -> str:
    """How a level's kernels are launched on ``device``: :data:`OVERLAPPING`, or ``in order`` and why.

    Args:
        asked: whether launches must (not) overlap; None: :data:`OVERLAP`, where the device can.

    Raises:
        ValueError: launches must overlap, and cannot.
    """
    reason = problem(device)
    if asked and reason:
        raise ValueError(f"overlapping launches: {reason}")
    if not (OVERLAP if asked is None else asked):
        reason = "switched off"
    return f"in order ({reason})" if reason else OVERLAPPING


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Context in which our kernels' launches overlap (or do not)."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def is_overlapping() -> bool:
    """Whether kernels are launched, and compiled, to overlap."""
    return _on


def launch(kernel: Any, grid: tuple[int, int, int], block: int, args: Sequence[Tensor | int]) -> None:
    """Launch a kernel of PyTorch's run-time compiler on the current stream.

    Args:
        kernel: of ``torch.cuda._compile_kernel``; inside :func:`overlapping` it must keep the module's rule.
        block: threads per block.
        args: tensors for pointers, integers for ``int``.
    """
    if not _on:
        kernel(grid=grid, block=(block, 1, 1), args=list(args))
        return
    values = [ctypes.c_void_p(own.data_ptr()) if isinstance(own, Tensor) else ctypes.c_int(own) for own in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    config = _Config(grid=grid, block=(block, 1, 1), stream=_stream(), attributes=ctypes.pointer(attribute), count=1)
    library = torch.cuda._utils._get_gpu_runtime_library()
    torch.cuda._utils._check_cuda(library.cuLaunchKernelEx(ctypes.byref(config), kernel.func, pointers, None))


def launch_pointers(kernel: Any, blocks: int, threads: int, pointers: ctypes.Array[ctypes.c_void_p]) -> None:
    """Launch a kernel in one dimension on the current stream, with the addresses of its arguments."""
    shape = (blocks, 1, 1, threads, 1, 1)
    torch.cuda._utils._check_cuda(_driver().cuLaunchKernel(kernel.func, *shape, 0, _stream(), pointers, None))


def _stream() -> ctypes.c_void_p:
    """The current stream's handle. ``torch.cuda.current_stream`` makes an object first, which takes the host longer."""
    return ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()))


@functools.cache
def _driver() -> Any:
    return torch.cuda._utils._get_gpu_runtime_library()
