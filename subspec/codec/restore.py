"""Exact weights from their code and the packed quantized weight on the device: the CUDA kernels' launches.

The kernels read the quantized weight in the order of the draft's own kernels (:data:`KERNELS`). HIGGS is dequantized
first, into the place of the exact weight (:mod:`subspec.codec.codebook_dequantize`). On a CPU
:func:`subspec.codec.format.restore` computes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspec.codec.codebook_dequantize import Rotated, dequantizing
from subspec.codec.format import CHUNK, Coded, restore
from subspec.kernels import int4
from subspec.kernels.compile import compile_cuda
from subspec.kernels.grouped_launch import GroupedLaunch, float_bits
from subspec.quant.codebook_linear import CodebookLinear
from subspec.quant.integers import Int4Linear
from subspec.quant.level_linear import LevelLinear
from subspec.quant.pairs import reach_factor
from subspec.quant.quantized_weight import QuantizedWeight

KERNELS = (Int4Linear.kind, CodebookLinear.kind)
"""Kernels of the draft whose packed weights can be read."""

THREADS = 64
"""Threads of a block, each of which restores a chunk."""

Kernel = tuple[str, int]
"""A CUDA kernel that restores weights: its and its file's name, and the bits of the integers that it reads; 0: none."""


@dataclass(frozen=True)
class Rows:
    """A Linear's rows of a fused Linear, from ``first`` on; ``interleaved``: 16 by 16 with another's (gate and up)."""

    first: int
    interleaved: bool

    def select(self, fused: Tensor, count: int) -> Tensor:
        """Rows [count, ...] of ``fused`` [n, ...]."""
        if not self.interleaved:
            return fused[self.first : self.first + count]
        rows = torch.arange(count, device=fused.device)
        return fused[self.first + rows // 16 * 32 + rows % 16]


@dataclass(frozen=True)
class Spans:
    """Places of a Linear's code in a run of bytes.

    Attributes:
        starts, stream: first byte, a multiple of 4, and number of int32 words of :class:`~subspec.codec.format.Coded`.
    """

    starts: tuple[int, int]
    stream: tuple[int, int]

    def on(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Starts and stream, as views into ``flat`` (uint8)."""
        starts, stream = (
            flat[first : first + 4 * words].view(torch.int32) for first, words in (self.starts, self.stream)
        )
        return starts, stream


@dataclass(frozen=True)
class Restoration:
    """A Linear to restore, together with others.

    Attributes:
        out: the result: bfloat16 [n, k], contiguous, 16-byte aligned.
        linear: the substitute's fused Linear, of which ``rows`` are the Linear's.
        spans: of the code.
        margin: see :class:`~subspec.codec.format.Coded`.
    """

    out: Tensor
    linear: LevelLinear
    rows: Rows
    spans: Spans
    margin: float


def quantized_rows(linear: LevelLinear, rows: Rows, count: int) -> QuantizedWeight:
    """A Linear's own quantized weight, from the packed one of the fused Linear.

    Raises:
        TypeError: the kernel's order is unknown.
    """
    fused = linear.quantized()
    return fused.of_rows([rows.select(part, count).contiguous() for part in fused.row_tensors])


class Restorer:
    """Restores Linears on one device whose code lies in one run of bytes, in one launch per kind of quantized weight.

    Raises:
        TypeError: the order of a Linear's kernel is unknown.
    """

    def __init__(self, restorations: Sequence[Restoration]) -> None:
        self.restorations = restorations
        self._dequantizing: list[GroupedLaunch] = []
        self._launches: list[GroupedLaunch] = []
        device = restorations[0].out.device if restorations else torch.device("cpu")
        if device.type != "cuda":
            return
        self._dequantizing = dequantizing(
            [
                Rotated(own.out, own.linear, own.rows.first, own.rows.interleaved)
                for own in restorations
                if isinstance(own.linear, CodebookLinear)
            ]
        )
        parts: dict[Kernel, list[tuple[list[int], int]]] = {}
        # The large ones first: the last blocks are then short.
        for own in sorted(restorations, key=lambda own: -own.out.numel()):
            kernel, fields = describe(own)
            parts.setdefault(kernel, []).append((fields, blocks_of(own.out)))
        self._launches = [
            GroupedLaunch(_kernel(*kernel, device.index or 0), members, THREADS, device, inputs=1)
            for kernel, members in parts.items()
        ]

    def __call__(self, flat: Tensor) -> None:
        """Write every weight from ``flat`` (uint8, 4-byte aligned, on the weights' device)."""
        for launch in self._dequantizing:
            launch()
        for launch in self._launches:
            launch(flat)
        if flat.is_cuda:
            return
        for own in self.restorations:
            quantized = quantized_rows(own.linear, own.rows, own.out.shape[0])
            own.out.copy_(restore(Coded(*own.spans.on(flat), own.out.shape, own.margin), quantized))


def restore_into(out: Tensor, coded: Coded, linear: LevelLinear, rows: Rows) -> None:
    """Write one exact weight; arguments as in :class:`Restoration`."""
    starts, stream = coded.starts.numel(), coded.stream.numel()
    flat = torch.cat([coded.starts, coded.stream]).view(torch.uint8)
    Restorer([Restoration(out, linear, rows, Spans((0, starts), (4 * starts, stream)), coded.margin)])(flat)


def blocks_of(out: Tensor) -> int:
    """Blocks of threads that restore a weight ``out`` [n, k]."""
    return -(-out.numel() // (CHUNK * THREADS))


def describe(own: Restoration) -> tuple[Kernel, list[int]]:
    """The kernel for a Linear, and all fields of ``Part`` but the last one."""
    linear, out, reach = own.linear, own.out, 0.5 + own.margin
    if isinstance(linear, Int4Linear):
        kernel, packed = ("restore_integers", linear.weight.bits), linear.weight
        addresses = [packed.words.data_ptr(), packed.scales.data_ptr()]
        form = [packed.tiles, 0, int4.GROUP]
    elif isinstance(linear, CodebookLinear):
        kernel, scale, rotation = ("restore_codebook", 0), linear.weight.scales, linear.rotation
        addresses = [0, scale.data_ptr()]
        form = [linear.weight.tiles, rotation.block, rotation.padded // scale.shape[1]]
        reach = reach_factor(own.margin, rotation.block)
    else:
        raise TypeError(f"the order of {linear.kind}'s weights is unknown to the codec")
    place = [own.rows.first, int(own.rows.interleaved), float_bits(reach)]
    spans = [own.spans.starts[0], own.spans.stream[0]]
    return kernel, [*spans, *addresses, out.data_ptr(), out.numel(), out.shape[1], *form, *place]


@functools.cache
def _kernel(name: str, bits: int, device: int) -> Any:
    return compile_cuda(["restore.cu", f"{name}.cu"], macros_of(bits), name, device)


def macros_of(bits: int) -> dict[str, int]:
    """Macros of a :data:`Kernel`."""
    return {"CHUNK": CHUNK} | ({"WIDTH": bits} if bits else {})
