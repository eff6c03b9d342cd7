"""Linear layers for a draft level's few rows: several kernels behind one call."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels.few_rows import WARPS, PackedWeight, apply_swiglu
from subspec.kernels.int4_wide import empty_rows
from subspec.quant.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class Variant:
    """A kernel by its name, and settings of ours.

    Attributes:
        tiles: outputs per block in sixteens (0: the kernel decides).
        splits: slices of the input dimension (0: a rule of thumb).
        warps: of the integer kernel, per block (0: the usual number).
    """

    kernel: str
    tiles: int = 0
    splits: int = 0
    warps: int = 0

    def __str__(self) -> str:
        if not self.tiles:
            return self.kernel
        name = f"{self.kernel} {self.tiles}x{self.splits}" if self.splits else f"{self.kernel} {self.tiles}"
        return f"{name} warps {self.warps}" if self.warps else name


class LevelLinear(ABC):
    """One Linear (or fused Linears) of a draft level.

    A call maps x [rows, in] to partial sums [splits, rows, stride] of any floating dtype, which the reader adds up
    (``kernels/level.py``), or, for a fused gate/up pair, to the activation [rows, inputs of down], in bfloat16 unless
    another dtype is asked for. Where :meth:`tile` is not 0, x lies in tiles (:mod:`subspec.kernels.int4_wide`).

    Attributes:
        kind: name of the kernel, for records.
        reads: dtype of x.
        stride: last size of the result.
        nbytes: device bytes of the weights.
        parts: attributes that hold the quantized weights, or their fields (``weight.words``), which the owner may move
            to a place of its choice; empty: they stay.
    """

    kind: str
    parts: ClassVar[tuple[str, ...]] = ()
    reads: torch.dtype = torch.bfloat16
    stride: int
    nbytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """See the class. May be captured in a CUDA graph."""

    def tile(self, rows: int) -> int:
        """Rows of a tile of x that has ``rows`` rows; 0: x lies row by row."""
        return 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that :attr:`parts` names."""
        return tuple(attrgetter(part)(self) for part in self.parts)

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Use these copies of :attr:`tensors` from now on."""
        for part, tensor in zip(self.parts, tensors, strict=True):
            owner, _, name = part.rpartition(".")
            setattr(self, owner or name, replace(getattr(self, owner), **{name: tensor}) if owner else tensor)

    def quantized(self) -> QuantizedWeight:
        """The quantized weight, read back from the kernel's order.

        Raises:
            TypeError: this kernel's order cannot be read.
        """
        raise TypeError(f"the order of {self.kind}'s weights is unknown to the codec")


class FewRowsLinear(LevelLinear):
    """A Linear of one of our CUDA kernels (:mod:`subspec.kernels.few_rows`); on a CPU its torch reference.

    ``splits``: slices of the input dimension; 0: a rule of thumb. ``warps``: per block; 0: the usual number. Neither
    counts where x lies in tiles.
    """

    parts = ("weight.words", "weight.scales")

    splits = 1

    def __init__(self, weight: PackedWeight, splits: int = 0, warps: int = 0) -> None:
        self.weight, self.swiglu, self.warps = weight, weight.swiglu, warps or WARPS
        self.reads, self.stride, self.nbytes = weight.reads, weight.padded, weight.nbytes
        if weight.words.is_cuda and not weight.swiglu:  # the activation needs whole sums
            count = torch.cuda.get_device_properties(weight.words.device).multi_processor_count
            self.splits = splits or weight.splits_for(count)

    def tile(self, rows: int) -> int:
        grid = self.weight.wide(rows)
        return grid.tile if grid else 0

    def slices(self, rows: int) -> int:
        """Leading size of the result for ``rows`` rows."""
        grid = self.weight.wide(rows)
        return grid.splits if grid else self.splits

    def __call__(self, x: Tensor, *, dtype: torch.dtype = torch.bfloat16, tiled: bool = False) -> Tensor:
        """As for every Linear; the activation has ``dtype``, and lies in tiles if ``tiled``, as x does."""
        rows, width = x.shape[0], self.stride // 2 if self.swiglu else self.stride
        if x.device.type == "cpu":
            y = self.weight.reference(x)
            y = functional.pad(y, (0, width - y.shape[1]))
            return y.to(dtype) if self.swiglu else y.unsqueeze(0)
        assert x.dtype is self.reads, f"{self.kind} reads {self.reads}, and x is {x.dtype}"
        if self.swiglu:
            out = empty_rows(rows, width, x.device, dtype)
        else:
            out = torch.empty(self.slices(rows), rows, width, dtype=torch.float32, device=x.device)
        if x.is_cuda and (grid := self.weight.wide(rows)):
            self.weight.multiply_tiles(x, out, grid, tiled=tiled)
        elif x.is_cuda:
            self.weight.multiply(x, out, splits=self.splits, warps=self.warps)
        return out


class Dense(LevelLinear):
    """An exact or dequantized weight in bfloat16.

    Args:
        swiglu: rows are gate and up, interleaved 16 by 16 or, with ``interleaved`` False, one after the other.
    """

    kind = "dense"

    def __init__(self, weight: Tensor, *, swiglu: bool = False, interleaved: bool = True) -> None:
        self.weight, self.swiglu, self.interleaved = weight, swiglu, interleaved
        self.stride = weight.shape[0]
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight)
        if not self.swiglu:
            return y.unsqueeze(0)
        if self.interleaved:
            return apply_swiglu(y)
        gate, up = y.chunk(2, dim=-1)
        return functional.silu(gate) * up
