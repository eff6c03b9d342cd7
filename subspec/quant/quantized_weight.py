"""Quantized weights on their way to a fused draft level: what a quantizer hands over, and HQQ's integers.

A level fuses several Linears into one (q, k and v; gate and up) and keeps the result on disk. So a quantized weight
must do three things whatever the method: stack with others that have the same inputs, turn into tensors for a file,
and dequantize for the tests. How it then lies in the device's memory, and what multiplies with it, is its format's
business (:mod:`subspec.quant.affine_format`).
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from subspec.kernels.int4 import interleave
from subspec.quant.bit_planes import pack_bits, packed_columns, unpack_bits
from subspec.quant.hqq import HqqQuantizer

SLICE_WEIGHTS = 1 << 26
"""Weights that are quantized at a time: HQQ's optimiser holds several float32 copies, and an LM head is large."""


OPTIMISER_BYTES = 21
"""Per weight that HQQ's optimiser holds on a GPU: the weight in float32, and what takes 32.4 bytes more where all of it
is float32 (counted on a CPU) in half precision."""


class QuantizedWeight(Protocol):
    """A weight [n, k] whose rows were quantized independently of each other."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    def dequantize(self) -> Tensor:
        """float32 [n, k]."""

    def rows(self, first: int, count: int) -> Self:
        """Some rows that follow each other, as views."""

    def stacked(self, others: Sequence[Self], *, swiglu: bool) -> Self:
        """This one and ``others`` as one weight, below each other, or, with ``swiglu``, 16 rows in turn."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps, small and on the CPU; :meth:`CodeQuantizer.restore` reads it."""


@dataclass(frozen=True)
class Codes:
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

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        n, k = self.q.shape
        return n, k

    def dequantize(self) -> Tensor:
        """float32 [n, k]."""
        groups = self.q.float().unflatten(1, (-1, self.group_size))
        return (self.scale.unsqueeze(-1) * (groups - self.zero.unsqueeze(-1))).flatten(1)

    def rows(self, first: int, count: int) -> "Codes":
        """Rows ``first`` to ``first + count``, as views."""
        q, scale, zero = (part[first : first + count] for part in (self.q, self.scale, self.zero))
        return Codes(q, scale, zero, self.group_size, self.bits)

    def stacked(self, others: Sequence["Codes"], *, swiglu: bool) -> "Codes":
        """Rows below each other, or gate and up 16 by 16.

        Raises:
            ValueError: other bits or groups than this one's.
        """
        if any((other.bits, other.group_size) != (self.bits, self.group_size) for other in others):
            raise ValueError("weights of different bits or groups are not one weight")
        parts = zip(*((c.q, c.scale, c.zero) for c in (self, *others)), strict=True)
        q, scale, zero = (stack_rows(part, swiglu=swiglu) for part in parts)
        return Codes(q, scale, zero, self.group_size, self.bits)

    def tensors(self) -> dict[str, Tensor]:
        """``q`` (uint8, as many bits as there are), ``scale`` and ``zero`` (float16 where that loses nothing)."""
        return {
            "q": pack_bits(self.q, self.bits).cpu(),
            "scale": narrow(self.scale),
            "zero": narrow(self.zero),
        }

    @classmethod
    def from_tensors(
        cls,
        stored: Mapping[str, Tensor],
        shape: tuple[int, int],
        *,
        bits: int,
        group_size: int,
        device: torch.device,
    ) -> "Codes | None":
        """What :meth:`tensors` made of a weight of this shape; None: these are of another."""
        n, k = shape
        groups = (n, k // group_size)
        shapes = {"q": (n, packed_columns(k, bits)), "scale": groups, "zero": groups}
        if any(part not in stored or tuple(stored[part].shape) != size for part, size in shapes.items()):
            return None
        q = unpack_bits(stored["q"].to(device), bits)
        return cls(q, stored["scale"].to(device).float(), stored["zero"].to(device).float(), group_size, bits)


class CodeQuantizer(Protocol):
    """A quantizer for the fused level.

    Attributes:
        facts: everything that its results follow from besides the weight (JSON types): they make the cache's key.
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def codes(self, weight: Tensor, name: str | None = None) -> QuantizedWeight:
        """Quantize a weight [n, k]. ``name``: ``LAYER.path.of.module`` (or ``head.lm_head``), by whose last part it
        may be quantized differently, and by which it may be remembered."""

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], name: str, device: torch.device
    ) -> QuantizedWeight | None:
        """A weight of this shape and name from :meth:`QuantizedWeight.tensors`; None when they do not fit it."""

    def stored_bytes(self, shape: tuple[int, int], name: str) -> int:
        """Bytes on disk of a weight's codes."""

    def codes_bytes(self, shape: tuple[int, int], name: str) -> int:
        """Device bytes of a weight's codes, before they are packed."""

    def peak_bytes(self, shape: tuple[int, int], name: str) -> int:
        """Most device bytes that quantizing a weight takes for a moment, beside the weight and its codes."""

    def end_layer(self) -> None:
        """All codes of a layer have been asked for."""


class HqqCodes:
    """HQQ's codes (axis 1), from ``hqq``'s own optimiser.

    Scales and zeros are rounded to float16, as they are stored on a device and on disk: what is read back from a
    cache is then bit for bit what was quantized.

    Args:
        bits: 8, 4, 3 or 2.
        bits_by: of Linears (``q_proj``...) that have others.
    """

    def __init__(self, bits: int = 4, group_size: int = 64, bits_by: Mapping[str, int] | None = None) -> None:
        self.bits, self.group_size = bits, group_size
        self.bits_by = {name: own for name, own in sorted((bits_by or {}).items()) if own != bits}

    @classmethod
    def of(cls, quantizer: HqqQuantizer) -> "HqqCodes":
        """The same settings as a module quantizer's."""
        return cls(quantizer.bits, quantizer.group_size, quantizer.bits_by)

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that codes follow from besides the weight."""
        facts: dict[str, Any] = {
            "quantizer": "hqq",
            "version": importlib.metadata.version("hqq"),
            "bits": self.bits,
            "group_size": self.group_size,
            "axis": 1,
        }
        return facts | ({"bits_by": self.bits_by} if self.bits_by else {})

    def bits_of(self, name: str | None) -> int:
        """Bits of a Linear, given its path."""
        return self.bits if name is None else self.bits_by.get(name.rpartition(".")[2], self.bits)

    def end_layer(self) -> None:
        """Nothing is remembered."""

    def stored_bytes(self, shape: tuple[int, int], name: str) -> int:
        """bits per weight, and a float16 scale and zero per group."""
        n, k = shape
        return n * packed_columns(k, self.bits_of(name)) + 4 * n * (k // self.group_size)

    def codes_bytes(self, shape: tuple[int, int], name: str) -> int:
        """A byte per weight, and a float32 scale and zero per group."""
        n, k = shape
        return n * k + 8 * n * (k // self.group_size)

    def peak_bytes(self, shape: tuple[int, int], name: str) -> int:
        """:data:`OPTIMISER_BYTES` per weight of the largest part that is quantized at once."""
        n, k = shape
        return OPTIMISER_BYTES * k * (n if n <= 2 * _rows(k) else _rows(k))

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], name: str, device: torch.device
    ) -> Codes | None:
        """See :meth:`Codes.from_tensors`."""
        return Codes.from_tensors(
            stored, shape, bits=self.bits_of(name), group_size=self.group_size, device=device
        )

    def codes(self, weight: Tensor, name: str | None = None) -> Codes:
        """Quantize a weight [n, k], a large one some rows at a time (each part converges on its own)."""
        bits = self.bits_of(name)
        rows = _rows(weight.shape[1])
        if weight.shape[0] <= 2 * rows:
            return self._quantize(weight, bits)
        parts = [self._quantize(part, bits) for part in weight.split(rows)]
        return parts[0].stacked(parts[1:], swiglu=False)

    def _quantize(self, weight: Tensor, bits: int) -> Codes:
        from hqq.core.quantize import Quantizer

        n, k = weight.shape
        q, meta = Quantizer.quantize(
            weight,
            nbits=bits,
            group_size=self.group_size,
            axis=1,
            bitpack=False,
            device=str(weight.device),
        )
        return Codes(
            q.to(torch.uint8).view(n, k),
            meta["scale"].half().float().view(n, -1),
            meta["zero"].half().float().view(n, -1),
            self.group_size,
            bits,
        )


def _rows(k: int) -> int:
    """Of a large weight that are quantized at a time."""
    return max(1, SLICE_WEIGHTS // k)


def stack_rows(parts: Sequence[Tensor], *, swiglu: bool) -> Tensor:
    """Row-wise parts [n, ...] below each other; with ``swiglu`` a gate's and an up projection's, 16 rows in turn."""
    if not swiglu:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return interleave(*parts)


def narrow(values: Tensor) -> Tensor:
    """float16 on the CPU where that loses nothing, else as it is."""
    half = values.half()
    return (half if torch.equal(half.float(), values) else values).cpu().contiguous()
