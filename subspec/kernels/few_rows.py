"""Weights of the kernels for a draft level's few rows (``csrc/few_rows.cu``): their order, activation and launches.

The kernels are compiled once per process by the run-time compiler that ships with PyTorch; no CUDA toolkit is needed. A
launch takes any number of rows, and reads the weights once for every 32 of them (64 where ``int4_wide.cu`` runs).
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels import launch
from subspec.kernels.compile import compile_cuda
from subspec.kernels.int4_wide import WideGrid

STEP = 64
"""Inputs that a warp takes at once: four tensor-core instructions."""

WARPS = 8

MOST_EIGHTS = 4
"""Eights of rows that a block of threads multiplies with: more take registers that cost more than reading again."""


@functools.cache
def compiled(name: str, device: int, capability: str | None = None, **macros: int) -> Any:
    """The kernel ``<name>_linear`` of ``<name>.cu``; ``capability`` as for :func:`compile_cuda`."""
    return compile_cuda(["few_rows.cu", f"{name}.cu"], macros, f"{name}_linear", device, capability)


def eights_of(rows: int) -> tuple[int, int]:
    """Eights of rows per block of threads, and such blocks side by side."""
    eights = -(-rows // 8)
    pieces = -(-eights // MOST_EIGHTS)
    return -(-eights // pieces), pieces


def half_out(out: Tensor) -> dict[str, int]:
    """The macro of kernels that write a float16 activation."""
    return {"HALF_OUT": 1} if out.dtype is torch.float16 else {}


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gate and an up projection [n, ...] alternating 16 by 16: [2 n, ...]; n a multiple of 16."""
    pair = torch.stack([gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))], dim=1)
    return pair.flatten(0, 2)


def apply_swiglu(y: Tensor) -> Tensor:
    """silu(gate) * up: [rows, 2 n] -> [rows, n], of columns in the order of :func:`interleave`."""
    gate, up = y.unflatten(-1, (-1, 2, 16)).unbind(-2)
    return (functional.silu(gate) * up).flatten(-2)


@dataclass(frozen=True)
class PackedWeight(ABC):
    """A quantized weight in a kernel's order.

    Attributes:
        kernel: name of its file.
        reads: dtype of x.
        overlaps: whether its launches overlap inside :func:`subspec.kernels.launch.overlapping`.
        words: int32 [blocks, steps, tiles, ...].
        scales: float16 [blocks, ...].
        out_features: rows of the weight, without the padding to whole blocks.
        swiglu: whether rows alternate, 16 by 16, between a gate and an up projection.

    Raises:
        ValueError: an interleaved weight has no whole tiles.
    """

    kernel: ClassVar[str]
    overlaps: ClassVar[bool] = False
    reads: ClassVar[torch.dtype] = torch.bfloat16
    words: Tensor
    scales: Tensor
    out_features: int
    bits: int
    swiglu: bool

    def __post_init__(self) -> None:
        if self.swiglu and self.out_features % 32:
            raise ValueError(f"{self.out_features} interleaved rows are not a multiple of 32")

    @property
    def tiles(self) -> int:
        """16-row tiles per block."""
        return self.words.shape[2]

    @property
    def padded(self) -> int:
        """Rows with padding: the row stride of the kernel's output."""
        return self.words.shape[0] * self.tiles * 16

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return self.words.nbytes + self.scales.nbytes

    def splits_for(self, multiprocessors: int) -> int:
        """Slices of the inputs that give every multiprocessor a few blocks to overlap loads with."""
        blocks, steps = self.words.shape[:2]
        return max(1, min(-(-3 * multiprocessors // blocks), steps // WARPS))

    @property
    @abstractmethod
    def macros(self) -> dict[str, int]:
        """Of the kernel, besides those that all have."""

    @property
    def sources(self) -> list[Tensor]:
        """The kernel's first arguments."""
        return [self.words, self.scales]

    def multiply(self, x: Tensor, out: Tensor, *, splits: int = 1, warps: int = WARPS) -> None:
        """Run the kernel.

        Args:
            x: [rows, inputs] of the dtype that the kernel reads, contiguous.
            out: float32 [splits, rows, padded], to be added over the splits by the reader; with SwiGLU bfloat16 or
                float16 [rows, padded / 2] and ``splits`` 1.
            warps: of a block, which share the steps of its slice.
        """
        rows, (blocks, steps) = x.shape[0], self.words.shape[:2]
        device, (eights, pieces) = x.device.index or 0, eights_of(rows)
        macros = {"TILES": self.tiles, "WARPS": warps, "EIGHTS": eights, "SWIGLU": int(self.swiglu)}
        kernel = compiled(self.kernel, device, **macros, **self.macros, **half_out(out))
        args = [*self.sources, x, out, rows, self.padded, steps, -(-steps // splits)]
        with launch.overlapping(self.overlaps and launch.is_overlapping()):
            launch.launch(kernel, (blocks, splits, pieces), warps * 32, args)

    def wide(self, rows: int) -> WideGrid | None:
        """How :meth:`multiply_tiles` shares the work for this number of rows; None: :meth:`multiply` is faster."""
        return None

    def multiply_tiles(self, x: Tensor, out: Tensor, grid: WideGrid, *, tiled: bool = False) -> None:
        """As :meth:`multiply`, of x in tiles.

        Args:
            grid: of :meth:`wide`, whose number of splits ``out`` has.
            tiled: write the activation in such tiles, too.
        """
        raise NotImplementedError

    @abstractmethod
    def unpack(self) -> Tensor:
        """The dequantized weight, float32 [out_features, inputs]."""

    def reference(self, x: Tensor) -> Tensor:
        """The kernel's result in float32 torch: [rows, out_features], or the SwiGLU of it."""
        y = x.float() @ self.unpack().t()
        return apply_swiglu(y) if self.swiglu else y
