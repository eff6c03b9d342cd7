"""A 64-bit checksum of tensors' bits, computed on their device, and the same on every device.

For tensors that are compared at every start with ones that are not at hand any more, and that are too large to be
hashed on the host. It guards against mistakes, not malice.
"""

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Words that are summed at a time: bounds the temporaries to about 40 MiB."""

_STEP, _MIX, _CHAIN = 0x1E3779B97F4A7C15, -0x40A7B892E31B1A47, 0x2545F4914F6CDD1D
"""Odd 64-bit constants (of Fibonacci hashing, SplitMix64 and xorshift*), as signed integers."""


def checksum(*tensors: Tensor) -> int:
    """A signed 64-bit integer of all bits of ``tensors`` in their order, not of shapes and strides.

    The sum, modulo 2**64, of every 8-byte word times an odd multiplier that depends on its place: a change of one word
    always changes it, several changes cancel once in 2**63 times, and integers add up to the same in any order.
    """
    total = 0
    for tensor in tensors:
        total = _wrap(total * _CHAIN + _sum(tensor) + tensor.numel())
    return total


def _sum(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, words.numel(), BLOCK):
        part = words[begin : begin + BLOCK]
        place = torch.arange(begin + 1, begin + 1 + part.numel(), device=words.device)
        multiplier = place * _STEP
        multiplier = ((multiplier ^ (multiplier >> 31)) * _MIX) | 1
        total += (part * multiplier).sum()
    return int(total)


def _wrap(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
