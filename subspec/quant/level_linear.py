"""Linear layers for a draft level's few rows, behind one call: several kernels, one shape of result.

Every operation maps x, bfloat16 [rows, in], to partial sums [splits, rows, stride] of any floating dtype, which
the reader adds up (``level.py``), or, for a fused gate/up pair, to the activation, bfloat16 [rows, in of down].
"""

import importlib.metadata
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels import int4, wq
from subspec.kernels.activation import apply_swiglu
from subspec.quant.quantized_weight import Codes


class LevelLinear(ABC):
    """One Linear (or fused Linears) of the draft.

    Attributes:
        kind: name of the kernel, for records.
        splits, stride: leading and last size of the result.
        nbytes: device bytes of the weights.
        tensors: the quantized weights, to be moved to a place of the owner's choice (none: leave them where they are).
    """

    kind: str
    splits: int = 1
    stride: int
    nbytes: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x: bfloat16 [rows, in]; result as the module says. May be captured in a CUDA graph."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Use these copies of :attr:`tensors` from now on."""
        if tensors:
            raise TypeError(f"{self.kind} has no tensors to move")


class MmaInt4(LevelLinear):
    """Our 4-bit tensor-core kernel (:mod:`subspec.kernels.int4`).

    Args:
        splits: slices of the input dimension; 0: a rule of thumb.
        warps: of a block; 0: the usual number.
    """

    kind = "int4_mma"

    def __init__(self, weight: int4.PackedInt4, splits: int = 0, warps: int = 0) -> None:
        self.weight, self.warps = weight, warps or int4.WARPS
        if weight.words.is_cuda:
            self.splits = splits or int4.splits_for(weight, int4.multiprocessors(weight.words.device))
        self.stride = weight.padded
        self.nbytes = weight.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight.words, self.weight.meta

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        words, meta = tensors
        self.weight = replace(self.weight, words=words, meta=meta)

    def __call__(self, x: Tensor) -> Tensor:
        rows, swiglu = x.shape[0], self.weight.swiglu
        if not x.is_cuda:  # the reference stands in, so that a whole level can be tested without a GPU
            y = int4.reference(self.weight, x)
            width = self.stride // 2 if swiglu else self.stride
            y = functional.pad(y, (0, width - y.shape[1]))
            return y.to(torch.bfloat16) if swiglu else y.unsqueeze(0)
        if rows > int4.MAX_ROWS:
            parts = [self(part) for part in x.split(int4.MAX_ROWS)]
            return torch.cat(parts, dim=0 if swiglu else 1)
        if swiglu:
            out = torch.empty(rows, self.stride // 2, dtype=torch.bfloat16, device=x.device)
        else:
            out = torch.empty(self.splits, rows, self.stride, dtype=torch.float32, device=x.device)
        int4.linear(self.weight, x, out, splits=self.splits, warps=self.warps)
        return out


class TritonWq(LevelLinear):
    """Our Triton kernel for 8, 4, 3 and 2 bits in groups of any size (:mod:`subspec.kernels.wq`).

    Args:
        tiles: outputs per program, in sixteens.
        splits: slices of the input dimension; 1 with an activation.
    """

    kind = "triton_wq"

    def __init__(self, weight: wq.PackedWq, tiles: int = 4, splits: int = 1) -> None:
        self.weight, self.tiles = weight, tiles
        if weight.words.is_cuda:
            self.splits = splits
        self.stride = weight.out_features
        self.nbytes = weight.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        parts = (self.weight.words, self.weight.meta)
        return (*parts, self.weight.high) if self.weight.bits == 3 else parts

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        words, meta, *high = tensors
        self.weight = replace(self.weight, words=words, meta=meta, high=high[0] if high else self.weight.high)

    def __call__(self, x: Tensor) -> Tensor:
        rows, swiglu = x.shape[0], self.weight.swiglu
        if not x.is_cuda:  # the reference stands in, as for our 4-bit kernel
            y = wq.reference(self.weight, x)
            return y.to(torch.bfloat16) if swiglu else y.unsqueeze(0)
        if rows > wq.MAX_ROWS:
            parts = [self(part) for part in x.split(wq.MAX_ROWS)]
            return torch.cat(parts, dim=0 if swiglu else 1)
        if swiglu:
            out = torch.empty(rows, self.stride // 2, dtype=torch.bfloat16, device=x.device)
        else:
            out = torch.empty(self.splits, rows, self.stride, dtype=torch.float32, device=x.device)
        wq.linear(self.weight, x, out, tiles=self.tiles, splits=self.splits)
        return out


class Tinygemm(LevelLinear):
    """PyTorch's own 4-bit kernel, ``torch._weight_int4pack_mm``.

    Args:
        q: integers 0..15 [n, k]; scale, zero: [n, k / group]; n a multiple of 8, k of 32.
        swiglu: rows are gate and up interleaved 16 by 16.
    """

    kind = "tinygemm"

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor, group: int, *, swiglu: bool = False) -> None:
        self.group, self.swiglu = group, swiglu
        n = q.shape[0]
        # Its layout: w = (q - 8) * scale + offset, two 4-bit values to a byte.
        packed = (q[:, ::2].to(torch.uint8) << 4) | q[:, 1::2].to(torch.uint8)
        # The inputs come in tiles of 16, eight of them in one load where their number allows it.
        tiles = next(tiles for tiles in (8, 4, 2) if q.shape[1] % (16 * tiles) == 0)
        self.weight = torch._convert_weight_to_int4pack(packed.contiguous(), tiles)
        offset = (8 - zero.float()) * scale.float()
        both = torch.stack([scale.float(), offset], dim=-1).to(torch.bfloat16)
        self.scale_and_offset = both.transpose(0, 1).contiguous()
        self.stride = n
        self.nbytes = n * q.shape[1] // 2 + self.scale_and_offset.numel() * 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.scale_and_offset

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        self.weight, self.scale_and_offset = tensors

    def __call__(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm(x, self.weight, self.group, self.scale_and_offset)
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


class GemLite(LevelLinear):
    """gemlite's Triton kernels, from the same codes in its own packing.

    It tunes itself in the first call of a shape and number of rows, for seconds and with 256 MiB of its own; after
    that call it may be captured. Its splits of the inputs add up with atomics, so results vary in the last bits.

    Args:
        q: integers below 2**bits [n, k]; scale, zero: [n, k / group].
        bits: 8, 4 or 2.
        swiglu: rows are gate and up interleaved 16 by 16.
    """

    kind = "gemlite"

    def __init__(
        self, q: Tensor, scale: Tensor, zero: Tensor, group: int, *, bits: int = 4, swiglu: bool = False
    ) -> None:
        from gemlite.core import DType, GemLiteLinearTriton, forward_functional

        n, k = q.shape
        packed = GemLiteLinearTriton(
            bits,
            group_size=group,
            in_features=k,
            out_features=n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        packed.pack(q.to(torch.uint8).contiguous(), scale.to(torch.bfloat16), zero.to(torch.bfloat16))
        self.swiglu, self.stride = swiglu, n
        self._forward = forward_functional
        # Only the call's arguments are kept: the module holds copies of small things on the device besides.
        self._arguments = [tensor.detach() for tensor in packed.get_tensor_args()]
        self._meta = packed.get_meta_args()
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self._arguments[:3])

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        self._arguments = [*tensors, *self._arguments[3:]]

    def __call__(self, x: Tensor) -> Tensor:
        y = self._forward(x, None, self._arguments, self._meta)
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


class Dense(LevelLinear):
    """An exact or dequantized weight in bfloat16: what has no 4-bit kernel.

    Args:
        swiglu: rows are gate and up, interleaved 16 by 16 or, with ``interleaved`` False, one after the other.
    """

    kind = "dense"

    def __init__(self, weight: Tensor, *, swiglu: bool = False, interleaved: bool = True) -> None:
        self.weight, self.swiglu, self.interleaved = weight, swiglu, interleaved
        self.stride = weight.shape[0]
        self.nbytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight)
        if not self.swiglu:
            return y.unsqueeze(0)
        if self.interleaved:
            return apply_swiglu(y)
        gate, up = y.chunk(2, dim=-1)
        return functional.silu(gate) * up


@dataclass(frozen=True)
class Variant:
    """A kernel and its settings.

    Attributes:
        kernel: its name.
        tiles: of our kernels, outputs per block in sixteens (0: the kernel decides).
        splits: of our kernels, slices of the input dimension (0: a rule of thumb).
        warps: of our 4-bit kernel, of a block (0: the usual number).
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


KERNELS = (MmaInt4.kind, Tinygemm.kind, GemLite.kind, TritonWq.kind)
"""What can compute a Linear of integer codes, each in some formats (:mod:`subspec.quant.affine_format`)."""


def make_linear(variant: Variant, codes: Codes, *, swiglu: bool, bits: int | None = None) -> LevelLinear:
    """A Linear of integer codes.

    Args:
        swiglu: the rows are gate and up interleaved 16 by 16, and the result is their activation.
        bits: that an integer takes in memory, where the kernel has a choice; None: as many as it has.
    """
    kernel, parts = variant.kernel, (codes.q, codes.scale, codes.zero)
    bits = bits or codes.bits
    if kernel == MmaInt4.kind:
        packed = int4.pack(*parts, tiles=variant.tiles, swiglu=swiglu)
        return MmaInt4(packed, variant.splits, variant.warps)
    if kernel == TritonWq.kind:
        packed = wq.pack(*parts, bits=bits, swiglu=swiglu)
        return TritonWq(packed, variant.tiles, max(variant.splits, 1))
    if kernel == Tinygemm.kind:
        return Tinygemm(*parts, codes.group_size, swiglu=swiglu)
    if kernel == GemLite.kind:
        return GemLite(*parts, codes.group_size, bits=bits, swiglu=swiglu)
    raise ValueError(f"no kernel {kernel!r} for integer codes: use {', '.join(KERNELS)}")


def unavailable(kernel: str, device: torch.device) -> str | None:
    """Why ``kernel`` cannot run on ``device``, in a few words; None when it can."""
    if device.type != "cuda":
        return "no CUDA device"
    if kernel == MmaInt4.kind:
        return int4.unavailable()
    if kernel == TritonWq.kind:
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if kernel == Tinygemm.kind:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 (Ampere) or later"
        return None
    return _gemlite_problem()


def gemlite_version() -> str:
    """Of the installed package; empty when there is none."""
    try:
        return importlib.metadata.version("gemlite")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gemlite_problem() -> str | None:
    if importlib.util.find_spec("gemlite") is None:
        return "gemlite is not installed (pip install gemlite)"
    logging.getLogger("gemlite").setLevel(logging.ERROR)  # it warns about each of its own settings files
    try:
        import gemlite.core  # noqa: F401 (asks the device for its properties)
    except Exception as error:
        return f"gemlite cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None
