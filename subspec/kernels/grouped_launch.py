"""One launch for several Linears, which a table on the device describes."""

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import launch


class GroupedLaunch:
    """A launch of a kernel whose first argument is the table, and whose last is the number of its rows.

    Its arguments are laid out once: a pass launches it for every slice of every layer, and PyTorch's own call takes 25
    us of the host where this takes 4 (measured on a CPU, without the driver).

    Args:
        kernel: of ``torch.cuda._compile_kernel``.
        parts: each Linear's fields (64-bit integers), to which its first block is appended, and its number of blocks.
        threads: per block.
        inputs: tensors between the table and its length.
    """

    def __init__(
        self, kernel: Any, parts: Sequence[tuple[list[int], int]], threads: int, device: torch.device, inputs: int = 0
    ) -> None:
        rows: list[list[int]] = []
        blocks = 0
        for fields, own in parts:
            rows.append([*fields, blocks])
            blocks += own
        self._kernel, self._blocks, self._threads = kernel, blocks, threads
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)
        self._inputs = [ctypes.c_void_p() for _ in range(inputs)]
        self._values = [ctypes.c_void_p(self._table.data_ptr()), *self._inputs, ctypes.c_int(len(rows))]
        addresses = [ctypes.addressof(value) for value in self._values]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(self, *inputs: Tensor) -> None:
        """Launch on the current stream."""
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.value = tensor.data_ptr()
        launch.launch_pointers(self._kernel, self._blocks, self._threads, self._pointers)


def float_bits(value: float) -> int:
    """A float32 as the integer that a table holds."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return bits
