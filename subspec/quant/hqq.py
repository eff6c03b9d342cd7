"""HQQ (Half-Quadratic Quantization, Badri & Shaji 2023): integers chosen by ``hqq``'s own optimiser.

:class:`HqqFormat` quantizes weights for a draft level, :class:`HqqQuantizer` whole Linears to ``hqq``'s ``HQQLinear``.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subspec.config.quant_checks import check_hqq
from subspec.errors import ConfigError
from subspec.quant.integers import IntegerFormat, QuantizedIntegers, nearest_integers
from subspec.quant.weight_format import FormatQuantizer, check_finite, plain_linear

SLICE_WEIGHTS = 1 << 26
"""Weights that are quantized at a time: the optimiser holds several float32 copies, and an LM head is large."""

OPTIMISER_BYTES = 21
"""Bytes per weight that the optimiser holds on a GPU: the weight in float32, and, in half precision, the temporaries
that take 32.4 bytes in float32 (counted on a CPU)."""


@dataclass(frozen=True)
class HqqFormat(IntegerFormat):
    """Integers of HQQ (axis 1).

    A scale and its zero take 16 bits together (:mod:`subspec.kernels.group_scales`), for which integers are chosen a
    last time (:func:`~subspec.quant.integers.nearest_integers`).

    Attributes:
        as_modules: whether weights are those of ``HQQLinear``: 4 bits start at a whole zero, and scales and zeros are
            rounded to float16 after the integers were chosen.
    """

    as_modules: ClassVar[bool] = False

    @property
    def facts(self) -> dict[str, Any]:
        own = {"round_zero": True} if self.as_modules else {"scales": "short"}
        return own | {
            "quantizer": "hqq",
            "version": importlib.metadata.version("hqq"),
            "bits": self.bits,
            "group_size": self.group,
            "axis": 1,
        }

    def peak_bytes(self, n: int, k: int) -> int:
        """:data:`OPTIMISER_BYTES` per weight of the largest part that is quantized at once."""
        return OPTIMISER_BYTES * k * (n if n <= 2 * _rows(k) else _rows(k))

    def quantize(self, weight: Tensor) -> QuantizedIntegers:
        """Quantize a weight, a large one some rows at a time (each part converges on its own)."""
        rows = _rows(weight.shape[1])
        if weight.shape[0] <= 2 * rows:
            return self._quantize(weight)
        parts = [self._quantize(part) for part in weight.split(rows)]
        return parts[0].stacked(parts[1:], swiglu=False)

    def _quantize(self, weight: Tensor) -> QuantizedIntegers:
        from hqq.core.quantize import Quantizer

        n, k = weight.shape
        q, meta = Quantizer.quantize(
            weight,
            nbits=self.bits,
            group_size=self.group,
            axis=1,
            bitpack=False,
            round_zero=self.as_modules and self.bits == 4,
            device=str(weight.device),
        )
        scale, zero = (meta[name].half().float().view(n, -1) for name in ("scale", "zero"))
        if not self.as_modules:
            return nearest_integers(weight, zero, self.bits)
        return QuantizedIntegers(q.to(torch.uint8).view(n, k), scale, zero, self.group, self.bits)


def _rows(k: int) -> int:
    """Rows of a large weight that are quantized at a time."""
    return max(1, SLICE_WEIGHTS // k)


def hqq_quantizer(
    bits: int = 4,
    group_size: int = 64,
    bits_by: Mapping[str, int] | None = None,
    format_class: type[HqqFormat] = HqqFormat,
) -> FormatQuantizer:
    """HQQ for a draft level; ``bits_by``: bits of Linears (``q_proj``...) that have others."""
    by_linear = {name: format_class(own, group_size) for name, own in (bits_by or {}).items()}
    return FormatQuantizer(format_class(bits, group_size), by_linear)


def check_group_size(
    out_features: int, in_features: int, *, group_size: int, axis: int, name: str, bits: int | None = None
) -> None:
    """Check that groups of ``group_size`` divide a Linear of shape ``out_features x in_features``.

    Args:
        bits: of an ``HQQLinear``, which packs two groups of 4 bits or four of 2 bits into the same bytes; None: packed
            otherwise.

    Raises:
        ConfigError: naming the Linear and a size that divides it.
    """
    along, what = (in_features, "inputs") if axis == 1 else (out_features, "outputs")
    weights = out_features * in_features
    packed = {4: 2, 2: 4}.get(bits or 0, 1) if axis == 1 else 1
    if along % group_size == 0 and weights // group_size % packed == 0:
        return
    fitting = [
        size for size in range(8, min(along, group_size) + 1, 8) if along % size == 0 and weights // size % packed == 0
    ]
    if along % group_size:
        remedy = f"choose a divisor, for instance {fitting[-1] if fitting else along}"
        raise ConfigError(f"quant.group_size={group_size} does not divide the {along} {what} of {name}: {remedy}")
    remedy = f"quant.group_size={fitting[-1]}" if fitting else f"quant.bits_by.{name.rpartition('.')[2]}=8 or 3"
    raise ConfigError(
        f"quant.group_size={group_size} makes {weights // group_size} groups of {name}, and {bits} bits take a "
        f"multiple of {packed}: set {remedy}"
    )


@dataclass(kw_only=True, eq=False)
class HqqQuantizer:
    """Quantizes Linears to ``bits`` with one scale and zero per group of ``group_size`` weights.

    Args:
        bits_by: of Linears (``q_proj``, ..., ``lm_head``) that have others.
        axis: 1 groups along the input dimension (what fast kernels need), 0 along the output dimension.
        unpack: keep the dequantized values as a plain Linear. hqq's PyTorch path unpacks every weight in every
            forward pass; unpacking once gives the same logits two to three times faster where memory allows.
    """

    name: ClassVar[str] = "hqq"
    bits: int = 4
    bits_by: Mapping[str, int] | None = None
    group_size: int = 64
    axis: int = 1
    compute_dtype: torch.dtype
    device: torch.device
    unpack: bool

    def __post_init__(self) -> None:
        self.bits_by = dict(self.bits_by or {})
        for own in (self.bits, *self.bits_by.values()):
            check_hqq(own, self.group_size, self.axis)

    @property
    def backend(self) -> str:
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return f"unpacked {dtype} Linears" if self.unpack else f"hqq PYTORCH {dtype}"

    def bits_of(self, name: str) -> int:
        """Bits of a Linear, given its path."""
        return self.bits_by.get(name.rpartition(".")[2], self.bits)

    def stored_bytes(self, linear: nn.Linear, name: str = "") -> int:
        return self.stored_shape_bytes(linear.weight.shape, name)

    def stored_shape_bytes(self, shape: torch.Size, name: str) -> int:
        """:meth:`stored_bytes` from a weight's shape alone."""
        return sum(self._sizes(shape, name))

    def _sizes(self, shape: torch.Size, name: str) -> tuple[int, int]:
        """Bytes of a quantized Linear: (packed weights, scales and zeros); no bias.

        4 bits, groups of 64 and bfloat16 make 4 + 2 * 16 / 64 = 4.5 bits per weight.
        """
        weights, bits = shape.numel(), self.bits_of(name)
        groups = weights // self.group_size
        packed = weights * bits // 8
        if bits == 3:
            # hqq packs ten rows of 3-bit values into one row of int32; the grouped weight has a row per group
            # (axis 1) or per weight of a group (axis 0).
            rows = groups if self.axis == 1 else self.group_size
            packed = -(-rows // 10) * (weights // rows) * 4
        return packed, groups * 2 * self.compute_dtype.itemsize

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that quantized modules follow from besides the weight (JSON types): a store's key."""
        other = {name: own for name, own in sorted(self.bits_by.items()) if own != self.bits}
        return {
            "quantizer": "hqq modules",
            "version": importlib.metadata.version("hqq"),
            "bits": self.bits,
            "group_size": self.group_size,
            "axis": self.axis,
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        } | ({"bits_by": other} if other else {})

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        return self.finish(self.pack(linear, name), linear)

    def pack(self, linear: nn.Linear, name: str) -> nn.Module:
        """HQQ's optimisation: an ``HQQLinear``."""
        options = {"group_size": self.group_size, "axis": self.axis, "name": name, "bits": self.bits_of(name)}
        check_group_size(*linear.weight.shape, **options)
        check_finite(linear.weight, name)
        return self._module(linear, name, initialize=True)

    def tensors(self, packed: Any) -> dict[str, Tensor]:
        """Packed integers, scales and zeros, as ``hqq`` holds them, on the CPU."""
        parts = {"W_q": packed.W_q.data, "scale": packed.meta["scale"], "zero": packed.meta["zero"]}
        return {part: tensor.detach().cpu().contiguous() for part, tensor in parts.items()}

    def restore(self, stored: Mapping[str, Tensor], linear: nn.Linear, name: str) -> nn.Module | None:
        """An ``HQQLinear`` from :meth:`tensors`; None when they are of another shape, type or number of bits."""
        from hqq.core.quantize import Quantizer

        bits, shape = self.bits_of(name), linear.weight.shape
        packed, scales = self._sizes(shape, name)
        packing = Quantizer.bit_to_packing[bits]
        types = {"W_q": Quantizer.unpack_view_dtype[packing], "scale": self.compute_dtype, "zero": self.compute_dtype}
        if any(part not in stored or stored[part].dtype is not dtype for part, dtype in types.items()):
            return None
        if stored["W_q"].nbytes != packed or stored["scale"].nbytes + stored["zero"].nbytes != scales:
            return None
        meta = {
            "nbits": bits,
            "group_size": self.group_size,
            "shape": shape,
            "scale": stored["scale"],
            "zero": stored["zero"],
            "axis": self.axis,
            "packing": packing,
            "unpack_view_dtype": types["W_q"],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
        }
        bias = None if linear.bias is None else linear.bias.detach().clone()
        module: Any = self._module(linear, name, initialize=False)
        module.load_state_dict({"W_q": stored["W_q"].to(self.device), "bias": bias, "meta": meta})
        return module

    def finish(self, packed: Any, linear: nn.Linear) -> nn.Module:
        """The packed module itself, or a plain Linear of its values."""
        if not self.unpack:
            packed.linear_layer = None  # the target keeps its Linear; two owners would double the bytes counted
            return packed
        return plain_linear(packed.dequantize(), linear.bias)

    def _module(self, linear: nn.Linear, name: str, *, initialize: bool) -> nn.Module:
        # Imported here: hqq takes a second to import and only substitutes need it.
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        HQQLinear.set_backend(HQQBackend.PYTORCH_FORWARD)
        return HQQLinear(
            linear if initialize else None,
            BaseQuantizeConfig(nbits=self.bits_of(name), group_size=self.group_size, axis=self.axis),
            del_orig=False,
            compute_dtype=self.compute_dtype,
            device=str(self.device),
            initialize=initialize,
        )
