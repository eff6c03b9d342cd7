"""Linears of a draft level on a CPU behind :class:`~subspec.quant.level_linear.LevelLinear`: our own kernel or torch's.

Ours (:mod:`subspec.kernels.cpu`) is the fastest wherever it can be compiled. Which of torch's is the fastest depends on
the instructions of the CPU and on the rows of a level, so :func:`~subspec.quant.choose_kernels.choose_kernels` measures
them. Rows of gate and up lie one after the other, because an activation over strided halves takes twice the time.

- ``own_cpu``: integers of 4 or 8 bits times inputs of 8 bits;
- ``int4_cpu``: torch's weight-only kernel, HQQ's 4-bit integers times bfloat16 inputs (with float32 inputs the same
  operator is hundreds of times slower);
- ``int8_cpu``: the quantized values rounded to 8 bits with a scale per output, times inputs of twice 7 bits. Products
  of 7 and 8 bits do not overflow 16 bits on CPUs without VNNI;
- ``bfloat16``, ``float32``: the quantized values, unpacked.
"""

import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from subspec.config.enums import AUTO
from subspec.kernels.cpu import BLOCK, CpuKernels, Tiles, cpu_kernels, misfit, tile_bytes
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import QuantizedIntegers
from subspec.quant.level_linear import LevelLinear, Variant

INNER_TILES = 8
"""Argument of the packing operator, ignored on a CPU."""

INT4_GROUPS = (32, 64, 128, 256)

PIECE = 4096
"""Outputs that are rounded at a time."""

LEVELS = 127
HALF = 63
"""Steps of 7 bits, and those of one sign."""

TINY = 1e-30
"""In place of the size of a row of zeros."""


class CpuLinear(LevelLinear):
    """A call maps floating [rows, in] to floating [1, rows, outputs], or to the activation [rows, outputs / 2].

    ``swiglu``: the outputs are gate, then up; the result is their activation.
    """

    def __init__(self, outputs: int, nbytes: int, swiglu: bool) -> None:
        self.stride, self.nbytes, self.swiglu = outputs, nbytes, swiglu

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, outputs], in the kernel's dtype."""

    def __call__(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        if not self.swiglu:
            return y.unsqueeze(0)
        gate, up = y.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


class OwnCpuLinear(CpuLinear):
    """Tiles of our own kernel."""

    kind = "own_cpu"

    def __init__(self, tiles: Tiles, swiglu: bool) -> None:
        kernels = cpu_kernels()
        assert isinstance(kernels, CpuKernels)
        self._kernels, self.tiles, self._matrix = kernels, tiles, tiles.matrix()
        super().__init__(tiles.shape[0], tiles.nbytes, swiglu)

    @classmethod
    def of_integers(cls, weight: QuantizedIntegers, swiglu: bool) -> "OwnCpuLinear":
        """HQQ's integers; those of 2 and 3 bits as 4."""
        q, zero, bits = (weight.q, weight.zero, 4)
        if weight.bits == 8:
            q, zero, bits = (q.int() - 128).to(torch.int8), zero - 128, 8
        return cls(Tiles(q, weight.scale, -zero * weight.scale, bits), swiglu)

    @classmethod
    def rounded(cls, weight: Tensor, swiglu: bool) -> "OwnCpuLinear":
        """float32 values [n, k] rounded to 8 bits, symmetric, with a scale per 64 inputs."""
        blocks = weight.unflatten(1, (-1, BLOCK))
        scale = torch.linalg.vector_norm(blocks, torch.inf, dim=-1).clamp_(min=TINY).div_(LEVELS)
        q = torch.empty(blocks.shape, dtype=torch.int8)
        for part in range(0, len(q), PIECE):  # a float32 copy of an LM head would be the run's largest tensor
            piece = slice(part, part + PIECE)
            q[piece] = (blocks[piece] / scale[piece].unsqueeze(-1)).round_()
        return cls(Tiles(q.flatten(1), scale, torch.zeros_like(scale), 8), swiglu)

    def multiply(self, x: Tensor) -> Tensor:
        return self._kernels.linear(self._matrix, x.float().contiguous(), self.stride)


class PlainLinear(CpuLinear):
    """Values in ``dtype``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, swiglu: bool) -> None:
        self.weight = weight.to(dtype)
        self.kind = str(dtype).removeprefix("torch.")
        super().__init__(weight.shape[0], self.weight.nbytes, swiglu)

    def multiply(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight)


class Int4CpuLinear(CpuLinear):
    """Integers of 4 bits; the operator computes (q - 8) * scale + zero, so HQQ's zero z becomes (8 - z) * scale."""

    kind = "int4_cpu"

    def __init__(self, weight: QuantizedIntegers, swiglu: bool) -> None:
        self.group = weight.group_size
        self.words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q.int(), INNER_TILES)
        pair = torch.stack([weight.scale, (8 - weight.zero) * weight.scale], dim=-1)  # [n, groups, 2]
        self.scales = pair.transpose(0, 1).to(torch.bfloat16).contiguous()
        super().__init__(weight.shape[0], self.words.nbytes + self.scales.nbytes, swiglu)

    def multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), self.words, self.group, self.scales
        )
        return y


class Int8CpuLinear(CpuLinear):
    """Values (float32 [n, k]) rounded to 8 bits, symmetric, with a scale per output."""

    kind = "int8_cpu"

    def __init__(self, weight: Tensor, swiglu: bool) -> None:
        n = weight.shape[0]
        scale = torch.linalg.vector_norm(weight, torch.inf, dim=1).clamp_(min=TINY).div_(127)
        with warnings.catch_warnings():  # torch announces the end of quantized tensors; `unavailable` will tell
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(
                weight, scale.double(), torch.zeros(n, dtype=torch.int64), 0, torch.qint8
            )
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        super().__init__(n, weight.numel() + 4 * n, swiglu)

    def multiply(self, x: Tensor) -> Tensor:
        n, x = x.shape[0], x.float()
        # The operator has one scale for all of its inputs: rows of one size.
        step = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=TINY).div_(HALF)
        # 7 bits cost tokens, twice 7 do not: the whole steps, and below them the rest of each, enlarged. As both fill
        # the same range, the operator's own rounding leaves the whole steps as they are.
        both = torch.empty(2 * n, x.shape[1])
        whole, rest = both[:n], both[n:]
        scaled = x / step
        torch.round(scaled, out=whole)
        torch.sub(scaled, whole, out=rest).mul_(LEVELS)
        y: Tensor = torch.ops.quantized.linear_dynamic(both, self.packed, reduce_range=True)
        return torch.add(y[:n], y[n:], alpha=1 / LEVELS).mul_(step)


PLAIN = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CpuFormat(HqqFormat):
    """HQQ's integers for a CPU, the same as those of modules, for any of its kernels or for ``only`` one."""

    as_modules: ClassVar[bool] = True
    only: str | None = None

    @property
    def kernels(self) -> tuple[str, ...]:
        if self.only:
            return (self.only,)
        return (OwnCpuLinear.kind, Int4CpuLinear.kind, Int8CpuLinear.kind, *PLAIN)

    def own(self, n: int, k: int) -> "CpuFormat | None":
        """The same with our own kernel; None: it cannot run here."""
        own = replace(self, only=OwnCpuLinear.kind)
        return own if not own.unfit(own.only, n, k) and isinstance(cpu_kernels(), CpuKernels) else None

    def smallest(self, n: int, k: int) -> "CpuFormat":
        """The same with the kernel that takes the least memory of those that run here."""
        kernel = Int4CpuLinear.kind
        fits = not self.unfit(kernel, n, k) and not self.unavailable(kernel, torch.device("cpu"))
        return replace(self, only=kernel if fits else Int8CpuLinear.kind)

    def device_bytes(self, n: int, k: int, kernel: str = AUTO) -> int:
        if self.only == OwnCpuLinear.kind:
            return tile_bytes(n, k, 8 if self.bits == 8 else 4)
        if self.only == Int4CpuLinear.kind:
            return n * k // 2 + 4 * n * k // self.group
        return n * k + 4 * n

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        if kernel not in self.kernels:
            return "it is no kernel for CPUs"
        if kernel == OwnCpuLinear.kind:
            return f"groups of {self.group} are no multiple of {BLOCK}" if self.group % BLOCK else misfit(n, k)
        if kernel != Int4CpuLinear.kind:
            return None
        if self.bits != 4 or self.group not in INT4_GROUPS:
            return f"it has 4 bits in groups of {', '.join(map(str, INT4_GROUPS))}"
        return f"{n} outputs are no multiple of 16" if n % 16 else None

    def unavailable(self, kernel: str, device: torch.device) -> str | None:
        """Tried on one small weight."""
        if device.type != "cpu":
            return "no CPU"
        if kernel == OwnCpuLinear.kind:
            found = cpu_kernels()
            return found if isinstance(found, str) else None
        group = self.group if kernel == Int4CpuLinear.kind else 64
        try:
            linear = CpuFormat(4, group).random_linear(Variant(kernel), 16, group, device, swiglu=False)
            linear(torch.ones(1, group))
        except Exception as error:  # operators differ in what they raise
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        return None

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        return [Variant(kernel)]

    def linear(self, variant: Variant, weight: QuantizedIntegers, *, swiglu: bool) -> LevelLinear:
        if swiglu:
            weight = weight.of_rows([gate_then_up(rows) for rows in weight.row_tensors])
        if variant.kernel == OwnCpuLinear.kind:
            return OwnCpuLinear.of_integers(weight, swiglu)
        if variant.kernel == Int4CpuLinear.kind:
            return Int4CpuLinear(weight, swiglu)
        return unpacked_linear(variant.kernel, weight.dequantize(), swiglu=swiglu)


@dataclass(frozen=True)
class CpuHeadFormat(CpuFormat):
    """An LM head that ``quant`` leaves exact: rounded to 8 bits if that is the fastest, as a draft may."""

    @property
    def kernels(self) -> tuple[str, ...]:
        return (self.only,) if self.only else (OwnCpuLinear.kind, Int8CpuLinear.kind, *PLAIN)

    def device_bytes(self, n: int, k: int, kernel: str = AUTO) -> int:
        return tile_bytes(n, k, 8) if self.only == OwnCpuLinear.kind else n * k + 4 * n

    @property
    def key(self) -> str:
        return "exact"

    def __str__(self) -> str:
        return "exact"

    def linear(self, variant: Variant, weight: Any, *, swiglu: bool) -> LevelLinear:
        """weight: float32 [vocabulary, hidden]."""
        return unpacked_linear(variant.kernel, weight, swiglu=swiglu)

    def random_weight(self, n: int, k: int, device: torch.device) -> Any:
        return torch.randn(n, k, device=device)


def unpacked_linear(kernel: str, weight: Tensor, *, swiglu: bool) -> LevelLinear:
    """A Linear of float32 values [n, k].

    Raises:
        ValueError: there is no such kernel.
    """
    if kernel == OwnCpuLinear.kind:
        return OwnCpuLinear.rounded(weight, swiglu)
    if kernel == Int8CpuLinear.kind:
        return Int8CpuLinear(weight, swiglu)
    if kernel not in PLAIN:
        raise ValueError(f"no kernel {kernel!r} for values on a CPU")
    return PlainLinear(weight, PLAIN[kernel], swiglu)


def gate_then_up(rows: Tensor) -> Tensor:
    """Undo the order of :func:`subspec.kernels.few_rows.interleave`."""
    return rows.unflatten(0, (-1, 2, 16)).transpose(0, 1).flatten(0, 2)
