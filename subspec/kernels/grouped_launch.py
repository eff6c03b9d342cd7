"""One launch for several Linears, which a table on the device describes."""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GroupedLaunch:
    """A launch of a kernel whose first argument is the table, and whose last is the number of its rows.

    Args:
        parts: each Linear's fields (64-bit integers), to which its first block is appended, and its number of blocks.
        threads: per block.
    """

    def __init__(self, kernel: Any, parts: Sequence[tuple[list[int], int]], threads: int, device: torch.device) -> None:
        rows: list[list[int]] = []
        blocks = 0
        for fields, own in parts:
            rows.append([*fields, blocks])
            blocks += own
        self._kernel, self._blocks, self._threads = kernel, blocks, threads
        self._table = torch.tensor(rows, dtype=torch.int64, device=device)

    def __call__(self, *arguments: Tensor) -> None:
        """Launch on the current stream, with ``arguments`` between the table and its length."""
        self._kernel(
            grid=(self._blocks, 1, 1), block=(self._threads, 1, 1), args=[self._table, *arguments, len(self._table)]
        )


def float_bits(value: float) -> int:
    """A float32 as the integer that a table holds."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return bits
