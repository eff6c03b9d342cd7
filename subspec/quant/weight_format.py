"""The interface of a method of quantization: how weights are quantized, what they take, and what multiplies with them.

A method is one :class:`WeightFormat`, its :class:`~subspec.quant.quantized_weight.QuantizedWeight` and the
:class:`~subspec.quant.level_linear.LevelLinear` of each of its kernels. Planner, builder of draft levels, choice of
kernels, caches and codec ask these three only.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspec.config.enums import AUTO
from subspec.config.quant_checks import HEAD
from subspec.errors import SubspecError
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.quantized_weight import QuantizedWeight

TILES = {"qkv": 2, "out": 2, "gate_up": 4, "down": 2, "head": 4}
"""Outputs per block, in sixteens, where nothing is measured: enough blocks for every multiprocessor."""

SPLITS = (1, 2, 3, 4, 6, 7, 8)
"""Slices of the inputs that are tried."""

WHOLE_SUMS = ("gate_up", "head")
"""Roles with whole sums: the activation needs them, and slices of all logits would take memory."""


class WeightFormat(ABC):
    """One way to quantize weights and to multiply with them. Subclasses are frozen dataclasses."""

    bits: int
    """Per weight, without scales."""
    kernels: Sequence[str]
    """Names of the kernels that multiply with it; the first one has a torch reference for CPUs."""
    name: str
    """``4 bit``, for people and records."""
    detail: str
    """``groups of 64``, for people and records."""
    key: str
    """Part of the key of kernels' times: everything that they depend on besides the shape."""
    facts: dict[str, Any]
    """Everything that quantized weights follow from besides the weight (JSON types): a cache's key."""

    def __str__(self) -> str:
        return f"{self.name}, {self.detail}"

    # ------------------------------------------------------------------------------------- quantizing

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Quantize a weight, floating [n, k]."""

    @abstractmethod
    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
    ) -> QuantizedWeight | None:
        """A weight of this shape from :meth:`QuantizedWeight.tensors`; None if they do not fit it."""

    @abstractmethod
    def stored_bytes(self, n: int, k: int) -> int:
        """Bytes of :meth:`QuantizedWeight.tensors`."""

    @abstractmethod
    def quantized_bytes(self, n: int, k: int) -> int:
        """Device bytes of the :class:`QuantizedWeight`."""

    @abstractmethod
    def peak_bytes(self, n: int, k: int) -> int:
        """Most device bytes that :meth:`quantize` holds besides the weight and the result."""

    @property
    def coded_bits(self) -> float:
        """Bits to reserve for an exact weight that is coded given this one (:mod:`subspec.codec.format`).

        Raises:
            TypeError: exact weights are not coded with this format.
        """
        raise TypeError(f"no exact weight is coded with {self}")

    # ------------------------------------------------------------------------------------- multiplying

    @abstractmethod
    def device_bytes(self, n: int, k: int, kernel: str = AUTO) -> int:
        """Device bytes of a weight [n, k] in the order of ``kernel``, with scales; ``auto``: of ours if it has one."""

    @abstractmethod
    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        """Why ``kernel`` does not take a weight [n, k] of this format, in a few words; None if it does."""

    @abstractmethod
    def unavailable(self, kernel: str, device: torch.device) -> str | None:
        """Why ``kernel`` cannot run on ``device``, in a few words; None if it can."""

    @property
    def reads_tiles(self) -> bool:
        """Whether levels of many rows read x in tiles (:mod:`subspec.kernels.int4_wide`) where the device can."""
        return False

    @abstractmethod
    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        """Settings of ``kernel`` worth measuring for a weight [n, k] in this role."""

    @abstractmethod
    def linear(self, variant: Variant, weight: Any, *, swiglu: bool) -> LevelLinear:
        """The Linear of a fused role's stacked weight.

        Raises:
            ValueError: there is no such kernel, or rows of gate and up are not whole tiles.
        """

    @abstractmethod
    def random_weight(self, n: int, k: int, device: torch.device) -> Any:
        """What :meth:`linear` takes, with random contents and scales of a real weight's size."""

    def random_linear(self, variant: Variant, n: int, k: int, device: torch.device, *, swiglu: bool) -> LevelLinear:
        """A Linear with random contents, to be timed."""
        return self.linear(variant, self.random_weight(n, k, device), swiglu=swiglu)

    def reference(self, role: str) -> Variant:
        """The kernel whose torch reference computes on a CPU."""
        return Variant(self.kernels[0], TILES[role])


def split_variants(kernel: str, role: str, steps: int, warps: int) -> list[Variant]:
    """Tiles and splits of our CUDA kernels; every warp of a slice needs some of the ``steps`` of 64 inputs."""
    most = 1 if role in WHOLE_SUMS else max(1, 2 * steps // warps)
    return [Variant(kernel, tiles, splits) for tiles in (2, 4) for splits in SPLITS if splits <= most]


def check_finite(weight: Tensor, name: str | None) -> None:
    """Check a weight before it is quantized; ``name``: of its Linear.

    Raises:
        SubspecError: it holds NaN or infinity.
    """
    # Extremes rather than a mask of all weights, which would need memory.
    if not all(bool(end.isfinite()) for end in weight.aminmax()):
        raise SubspecError(
            f"the weight of {name or 'a Linear'} is not finite (NaN or infinity) and cannot be quantized: the "
            "checkpoint's weights are damaged (check the files)"
        )


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear of dequantized values [n, k] and the exact one's bias."""
    n, k = weight.shape
    plain = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = bias
    return plain


class FormatQuantizer:
    """Quantizes weights by the name of their Linear, and remembers nothing.

    Args:
        default: format of all Linears but those of ``by_linear``.
        by_linear: formats by the name of a Linear (``q_proj``...).
    """

    def __init__(self, default: WeightFormat, by_linear: Mapping[str, WeightFormat] | None = None) -> None:
        self.default = default
        self.by_linear = {name: own for name, own in sorted((by_linear or {}).items()) if own != default}

    @property
    def facts(self) -> dict[str, Any]:
        """The default format's, and the bits of a layer's Linears that have others; an LM head's are in its name."""
        bits = {name: own.bits for name, own in self.by_linear.items() if name != HEAD}
        return self.default.facts | ({"bits_by": bits} if bits else {})

    def format_of(self, name: str | None) -> WeightFormat:
        """Format of a Linear, given its path."""
        return self.default if name is None else self.by_linear.get(name.rpartition(".")[2], self.default)

    def quantize(self, weight: Tensor, name: str | None = None) -> Any:
        """The :class:`QuantizedWeight` of a weight [n, k].

        Args:
            name: ``LAYER.path.of.module`` (or ``headBITS.lm_head``), whose last part may have a format of its own.
        """
        check_finite(weight, name)
        return self.format_of(name).quantize(weight)

    def end_layer(self) -> None:
        """All weights of a layer have been quantized."""
