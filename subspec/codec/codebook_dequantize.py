"""Dequantized weights of HIGGS, rotated back, on a CUDA device (``codebook_dequantize.cu``).

The bits are those of :meth:`subspec.quant.pairs.QuantizedPairs.rebuild`, with which exact weights are coded.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspec.config.quant_checks import LEAST_BLOCK
from subspec.kernels.compile import compile_cuda
from subspec.kernels.grouped_launch import GroupedLaunch, float_bits
from subspec.quant.codebook_linear import CodebookLinear

ROWS = 8
"""Rows that a block of threads dequantizes, with one block of the rotation's inputs."""


@dataclass(frozen=True)
class Rotated:
    """A Linear to dequantize.

    Attributes:
        out: the result: bfloat16 [n, k], contiguous, 4-byte aligned.
        first, interleaved: its rows (:class:`~subspec.codec.restore.Rows`).
    """

    out: Tensor
    linear: CodebookLinear
    first: int
    interleaved: bool

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        rotation = self.linear.rotation
        return -(-self.out.shape[0] // ROWS) * (rotation.padded // rotation.block)

    def describe(self) -> list[int]:
        """All fields of ``Rotated`` but the last one."""
        packed, rotation = self.linear.weight, self.linear.rotation
        signs = rotation.signs(self.out.device, torch.float32)
        sources = [tensor.data_ptr() for tensor in (packed.words, packed.scales, packed.table, signs, self.out)]
        place = [self.first, int(self.interleaved), float_bits(rotation.block**-0.5)]
        return [*sources, *self.out.shape, packed.tiles, packed.group_steps, *place]


def dequantizing(parts: Sequence[Rotated]) -> list[GroupedLaunch]:
    """Launches that dequantize several Linears, one for all with the same bits and blocks.

    Args:
        parts: on one CUDA device. The caller keeps them, and their tensors where they are: tables hold addresses.
    """
    alike: dict[tuple[int, int], list[Rotated]] = {}
    for part in parts:
        steps = part.linear.rotation.block // LEAST_BLOCK
        alike.setdefault((part.linear.weight.bits, steps), []).append(part)
    launches = []
    for (bits, steps), members in alike.items():
        device = members[0].out.device
        kernel = _kernel(bits, steps, device.index or 0)
        launches.append(GroupedLaunch(kernel, [(own.describe(), own.blocks) for own in members], 32 * steps, device))
    return launches


@functools.cache
def _kernel(bits: int, steps: int, device: int) -> Any:
    files = ["restore.cu", "codebook_dequantize.cu"]
    return compile_cuda(files, {"BITS": bits, "STEPS": steps}, "codebook_dequantize", device)
