"""Integers with a scale and a zero per group of inputs: the weight, its format, and our kernel's Linear."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from subspec.config.enums import AUTO
from subspec.kernels import int4
from subspec.kernels.group_scales import containing, nearest_zero
from subspec.quant import gemlite
from subspec.quant.gemlite import GemLite
from subspec.quant.level_linear import FewRowsLinear, LevelLinear, Variant
from subspec.quant.quantized_weight import QuantizedWeight, fitting
from subspec.quant.weight_format import WHOLE_SUMS, WeightFormat, split_variants

CODED_BITS = {2: 9.55, 3: 8.25, 4: 7.1, 8: 3.7}
"""Bits per exact weight to reserve by the bits of its integer, in groups of 64: measured (``experiments/codec``) on
Gaussian weights and on the default model 9.2 to 9.4, 8.0 to 8.1, 7.0 and 3.4 to 3.5."""

CODED_BITS_PER_DOUBLING = 0.16
"""More for every doubling of the group: scales follow the largest weight of more."""


PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Widths of the planes that integers are kept in on a disk, the lowest bits first: three bits do not divide a byte."""


@dataclass(frozen=True)
class QuantizedIntegers(QuantizedWeight):
    """Integers with a scale and a zero per group: w = scale * (q - zero).

    Attributes:
        q: uint8 [n, k], integers 0 .. 2**bits - 1.
        scale, zero: float32 [n, k / group_size].
        group_size: weights along k that share a scale and a zero.
        bits: of the integers.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    bits: int = 4
    row_fields: ClassVar[tuple[str, ...]] = ("q", "scale", "zero")

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.q.shape
        return n, k

    def stacks_with(self, other: "QuantizedIntegers") -> bool:
        return (other.bits, other.group_size) == (self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        groups = self.q.float().unflatten(1, (-1, self.group_size))
        return (self.scale.unsqueeze(-1) * (groups - self.zero.unsqueeze(-1))).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """``q`` (uint8, :func:`pack_bits`), ``scale`` and ``zero`` (float16 if that is exact)."""
        return {"q": pack_bits(self.q, self.bits).cpu(), "scale": _narrow(self.scale), "zero": _narrow(self.zero)}

    @property
    def margin(self) -> float:
        """Widening of an interval, in scales.

        A weight lies within half a scale of its integer (:func:`nearest_integers`), but for float32's rounding, far
        below a thousandth of a scale.
        """
        return 2.0**-10

    def interval(self, begin: int, end: int, margin: float) -> tuple[Tensor, Tensor]:
        """``[(q - z - 1/2 - margin) s, (q - z + 1/2 + margin) s]``: exact weights are spread evenly over it."""
        half = 0.5 + margin
        group = torch.arange(begin, end, device=self.q.device) // self.group_size
        scale, zero = self.scale.flatten()[group], self.zero.flatten()[group]
        centre = self.q.flatten()[begin:end].float() - zero
        return (centre - half) * scale, (centre + half) * scale


def nearest_integers(weight: Tensor, zero: Tensor, bits: int) -> QuantizedIntegers:
    """The integers of a weight [n, k] for given zeros [n, groups], with scales that contain these (our kernel's form).

    A scale and its zero take 16 bits, a quarter of a bit less per weight in groups of 64 than two of 16. A zero's
    rounding costs nothing, because the integers follow. The scale is the smallest with which no weight is more than
    half a step beyond the last integer; usually the extremes lie on the last integers. Together the error is that of
    HQQ's own scales at 4 bits, and smaller below (``experiments/quantizers``).
    """
    groups, most = weight.float().unflatten(1, (zero.shape[1], -1)), (1 << bits) - 1
    zero = nearest_zero(zero.clamp(max=most), bits)
    least = torch.maximum(groups.amax(-1) / (most + 0.5 - zero), groups.amin(-1) / (-0.5 - zero))
    scale = containing(least, zero, bits)
    q = (groups / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).round_().clamp_(0, most)
    return QuantizedIntegers(q.to(torch.uint8).flatten(1), scale, zero, groups.shape[-1], bits)


class Int4Linear(FewRowsLinear):
    """Our tensor-core kernel on 4-bit words (:mod:`subspec.kernels.int4`)."""

    kind = "int4_mma"
    weight: int4.PackedInt4

    def quantized(self) -> QuantizedIntegers:
        """In groups of 64."""
        return QuantizedIntegers(*self.weight.unpack_integers(), int4.GROUP, self.weight.bits)


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """:class:`QuantizedIntegers`, however they are chosen: a subclass says how (:meth:`quantize`, ``facts``).

    Our kernel wants scales that contain their zeros (:func:`nearest_integers`).

    Attributes:
        bits: 8, 4, 3 or 2.
        group: inputs per scale.
    """

    bits: int = 4
    group: int = int4.GROUP

    @property
    def name(self) -> str:
        return f"{self.bits} bit in 4-bit words" if self.bits in (2, 3) else f"{self.bits} bit"

    @property
    def detail(self) -> str:
        return f"groups of {self.group}"

    @property
    def key(self) -> str:
        """3 and 4 bits look alike to every kernel."""
        return f"w{4 if self.bits == 3 else self.bits}g{self.group}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return Int4Linear.kind, GemLite.kind

    @property
    def reads_tiles(self) -> bool:
        return int4.planes_of(self.bits) == 1

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
    ) -> QuantizedIntegers | None:
        n, k = shape
        groups = (n, k // self.group)
        if not fitting(stored, {"q": (n, k * self.bits // 8), "scale": groups, "zero": groups}):
            return None
        q = unpack_bits(stored["q"].to(device), self.bits)
        scale, zero = (stored[name].to(device).float() for name in ("scale", "zero"))
        return QuantizedIntegers(q, scale, zero, self.group, self.bits)

    def stored_bytes(self, n: int, k: int) -> int:
        """``bits`` per weight, and a float16 scale and zero per group."""
        return n * k * self.bits // 8 + 4 * n * (k // self.group)

    def quantized_bytes(self, n: int, k: int) -> int:
        """A byte per weight, and a float32 scale and zero per group."""
        return n * k + 8 * n * (k // self.group)

    def peak_bytes(self, n: int, k: int) -> int:
        """A float32 copy, and the integers as float32."""
        return 8 * n * k

    @property
    def coded_bits(self) -> float:
        return CODED_BITS[self.bits] + CODED_BITS_PER_DOUBLING * log2(self.group / 64)

    def device_bytes(self, n: int, k: int, kernel: str = AUTO) -> int:
        """4 bits per weight (8 for 8 bits), and 16 bits for every 64 inputs and nibble; gemlite: 32 bits per group.

        Our kernel fills its last block of 32 or 64 outputs, which no published model's shapes leave open. gemlite takes
        fewer bytes for 2 bits.
        """
        if kernel != GemLite.kind and int4.unfit(k, self.group) is None:
            return int4.packed_bytes(n, k, self.bits)
        return n * k * (4 if self.bits == 3 else self.bits) // 8 + 4 * n * (k // self.group)

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        if kernel not in self.kernels:
            return f"it has no {self.bits}-bit integers"
        if k % self.group:
            return f"groups of {self.group} do not divide {k} inputs"
        return int4.unfit(k, self.group) if kernel == Int4Linear.kind else gemlite.unfit(k, self.group)

    def unavailable(self, kernel: str, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "no CUDA device"
        return int4.unavailable() if kernel == Int4Linear.kind else gemlite.unavailable()

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        """Tiles, splits and warps of our kernel; gemlite decides for itself."""
        if kernel != Int4Linear.kind:
            return [Variant(kernel)]
        if role in WHOLE_SUMS:
            return [Variant(kernel, tiles, 1, warps) for tiles in (2, 4, 8) for warps in (0, 4)]
        return split_variants(kernel, role, k // int4.GROUP * int4.planes_of(self.bits), int4.WARPS)

    def linear(self, variant: Variant, weight: QuantizedIntegers, *, swiglu: bool) -> LevelLinear:
        parts = weight.q, weight.scale, weight.zero
        if variant.kernel == Int4Linear.kind:
            packed = int4.pack(*parts, tiles=variant.tiles, bits=self.bits, swiglu=swiglu)
            return Int4Linear(packed, variant.splits, variant.warps)
        if variant.kernel == GemLite.kind:
            bits = 4 if self.bits == 3 else self.bits
            return GemLite(*parts, weight.group_size, bits=bits, swiglu=swiglu)
        raise ValueError(f"no kernel {variant.kernel!r} for integers: use {', '.join(self.kernels)}")

    def random_linear(self, variant: Variant, n: int, k: int, device: torch.device, *, swiglu: bool) -> LevelLinear:
        if variant.kernel != Int4Linear.kind:
            return super().random_linear(variant, n, k, device, swiglu=swiglu)
        packed = int4.random_packed(n, k, tiles=variant.tiles, bits=self.bits, swiglu=swiglu, device=device)
        return Int4Linear(packed, variant.splits, variant.warps)

    def random_weight(self, n: int, k: int, device: torch.device) -> QuantizedIntegers:
        q = torch.randint(0, 1 << self.bits, (n, k), dtype=torch.uint8, device=device)
        scale = (torch.rand(n, k // self.group, device=device) * 0.002 + 0.004) * 2.0 ** (4 - self.bits)
        zero = nearest_zero(torch.full_like(scale, ((1 << self.bits) - 1) / 2), self.bits)
        return QuantizedIntegers(q, containing(scale, zero, self.bits), zero, self.group, self.bits)


def _narrow(values: Tensor) -> Tensor:
    """float16 on the CPU if that is exact, else as it is."""
    half = values.half()
    return (half if torch.equal(half.float(), values) else values).cpu().contiguous()


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 [n, k], k a multiple of 8 -> uint8 [n, k * bits / 8], planes (:data:`PLANES`) beside each other.

    Two, four or eight neighbours share a byte, the first one in its lowest bits.

    Raises:
        ValueError: k is no multiple of 8.
    """
    if q.shape[1] % 8:
        raise ValueError(f"{q.shape[1]} integers in a row are no multiple of 8")
    planes, below = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (q >> below) & ((1 << width) - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=q.device)
        # Disjoint bits, so that adding them up is OR-ing them.
        planes.append((plane.unflatten(1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8))
        below += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    k = packed.shape[1] * 8 // bits
    parts = packed.split([k * width // 8 for width in PLANES[bits]], dim=1)
    q, below = None, 0
    for part, width in zip(parts, PLANES[bits], strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = ((part.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(1)
        q = plane if q is None else q | plane << below
        below += width
    assert q is not None
    return q
