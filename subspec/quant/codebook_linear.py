"""Linears whose weights are looked up in a codebook of pairs (``quant=higgs``), and the format that they share.

    y[row, n] = sum over groups of scale[n, group] * sum_k table[pair[n, k]] * R(x)[row, k]

where R rotates the inputs. Kernels:

- ``lut_mma``: ours, CUDA compiled at run time (:mod:`subspec.kernels.codebook`).
- ``reference``: plain torch in the dtype of its input; dequantizes in every call.
- ``flute``: FLUTE's kernel, where that package is installed (:mod:`subspec.quant.flute`).
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subspec.config.enums import AUTO
from subspec.kernels import codebook
from subspec.kernels.few_rows import apply_swiglu
from subspec.quant import flute
from subspec.quant.flute import FluteLinear
from subspec.quant.grids import FILE, load_grid
from subspec.quant.hadamard import Rotate, Rotation, rotate, rotate_by
from subspec.quant.level_linear import FewRowsLinear, LevelLinear, Variant
from subspec.quant.pairs import (
    CHUNK,
    ROUNDING_BYTES,
    ROWS_BYTES,
    QuantizedPairs,
    group_of,
    pack_pairs,
    quantize_pairs,
    unpack_pairs,
)
from subspec.quant.quantized_weight import fitting
from subspec.quant.weight_format import FormatQuantizer, WeightFormat, split_variants

CODED_BITS = 11.0
"""Bits per exact weight to reserve beyond the binary logarithm of the grid's error: 7.5, 8.5, 9.4 at 4, 3 and 2 bits.
Measured (``experiments/codec``) 10.8 to 10.9 on Gaussian weights and 10.9 to 11.0 on the default model, whatever the
groups: the error is Gaussian and grows with the scale."""


def pair_table(weight: QuantizedPairs) -> Tensor:
    """int32 [4 ** bits]: both weights of a pair as bfloat16, the first one in the low half."""
    halves = weight.grid.pairs().to(weight.pairs.device, torch.bfloat16).contiguous().view(torch.int16)
    return halves.view(torch.int32)[:, 0].contiguous()


class ReferenceCodebook(LevelLinear):
    """Plain torch on any device, in the arithmetic of its input; keeps the pairs packed."""

    kind, parts = "reference", ("packed", "scale")

    def __init__(self, weight: QuantizedPairs, *, swiglu: bool = False) -> None:
        self.swiglu = swiglu
        self.packed, self.scale = pack_pairs(weight.pairs, weight.grid.bits), weight.scale
        self._like = replace(weight, pairs=weight.pairs[:0], scale=weight.scale[:0])
        self.stride = weight.shape[0]
        self.nbytes = self.packed.nbytes + self.scale.nbytes

    def quantized(self) -> QuantizedPairs:
        return self._like.of_rows([unpack_pairs(self.packed, self._like.grid.bits), self.scale])

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(self._like.rotation(x), self.quantized().rotated().to(x.dtype))
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


class CodebookLinear(FewRowsLinear):
    """Our CUDA tensor-core kernel (:mod:`subspec.kernels.codebook`)."""

    kind = "lut_mma"
    weight: codebook.PackedCodebook

    def __init__(
        self, weight: QuantizedPairs, variant: Variant, *, swiglu: bool = False, rotate: Rotate = rotate
    ) -> None:
        parts, tiles = (weight.pairs, weight.scale, pair_table(weight)), variant.tiles or 2
        super().__init__(codebook.pack(*parts, bits=weight.grid.bits, tiles=tiles, swiglu=swiglu), variant.splits)
        self.rotation, self.grid, self._rotate = weight.rotation, weight.grid, rotate

    def quantized(self) -> QuantizedPairs:
        pairs, scale = self.weight.unpack_pairs()
        group = self.rotation.padded // scale.shape[1]
        return QuantizedPairs(pairs, scale, self.grid, group, self.rotation)

    def __call__(self, x: Tensor, *, dtype: torch.dtype = torch.bfloat16, tiled: bool = False) -> Tensor:
        return super().__call__(self._rotate(x, self.rotation), dtype=dtype, tiled=tiled)


@dataclass(frozen=True)
class HiggsFormat(WeightFormat):
    """HIGGS: pairs looked up in a grid, inputs rotated.

    Attributes:
        bits: 4, 3 or 2.
        dim: of the grid; kernels do not depend on it.
        group: inputs per scale, at most.
        hadamard_size: inputs rotated together, at most.
        hadamard: what rotates them (:func:`subspec.quant.hadamard.rotate_by`).
    """

    bits: int = 4
    dim: int = 2
    group: int = 256
    hadamard_size: int = 512
    hadamard: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.bits} bit"

    @property
    def detail(self) -> str:
        return f"HIGGS grids of dimension {self.dim}, groups of {self.group}, rotated by {self.hadamard_size}"

    @property
    def key(self) -> str:
        return f"lut{self.bits}g{self.group}r{self.hadamard_size}{self.hadamard}"

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "quantizer": "higgs",
            "grids": grids_hash(),
            "bits": self.bits,
            "vector_dim": self.dim,
            "group_size": self.group,
            "hadamard_size": self.hadamard_size,
        }

    @property
    def kernels(self) -> tuple[str, ...]:
        """``auto`` takes ours; the others have to be asked for (``quant.kernel`` without streaming)."""
        return (CodebookLinear.kind,)

    def quantize(self, weight: Tensor) -> QuantizedPairs:
        return quantize_pairs(
            weight, bits=self.bits, dim=self.dim, group_size=self.group, hadamard_size=self.hadamard_size
        )

    def _layout(self, k: int) -> tuple[Rotation, int]:
        """The rotation of ``k`` inputs, and weights per scale."""
        rotation = Rotation.of(k, self.hadamard_size)
        return rotation, group_of(rotation.padded, self.group)

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
    ) -> QuantizedPairs | None:
        n, k = shape
        rotation, group = self._layout(k)
        sizes = {"pairs": (n, rotation.padded * self.bits // 8), "scale": (n, rotation.padded // group)}
        if not fitting(stored, sizes):
            return None
        pairs = unpack_pairs(stored["pairs"].to(device), self.bits)
        return QuantizedPairs(pairs, stored["scale"].to(device), load_grid(self.bits, self.dim), group, rotation)

    def stored_bytes(self, n: int, k: int) -> int:
        return self.device_bytes(n, k)

    def quantized_bytes(self, n: int, k: int) -> int:
        """A byte per pair, and the scales."""
        rotation, group = self._layout(k)
        return n * rotation.padded // 2 + n * rotation.padded // group * 2

    def peak_bytes(self, n: int, k: int) -> int:
        """:data:`~subspec.quant.pairs.ROUNDING_BYTES` per weight of the rows that are quantized at once."""
        padded = self._layout(k)[0].padded
        return ROUNDING_BYTES * min(n * padded, max(ROWS_BYTES // 4, padded))

    @property
    def coded_bits(self) -> float:
        return CODED_BITS + log2(load_grid(self.bits, self.dim).mse) / 2

    def device_bytes(self, n: int, k: int, kernel: str = AUTO) -> int:
        """Packed pairs and scales, padding of the inputs included: 4 + 16 / 256 bits a weight with 4 bits.

        The kernel fills its last block of 32 or 64 outputs, which no published model's shapes leave open.
        """
        rotation, group = self._layout(k)
        return n * rotation.padded * self.bits // 8 + n * rotation.padded // group * 2

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        return None if kernel in self.kernels else "it has no look-up tables"

    def unavailable(self, kernel: str, device: torch.device) -> str | None:
        if kernel == ReferenceCodebook.kind:
            return None
        if device.type != "cuda":
            return "no CUDA device"
        return codebook.unavailable() if kernel == CodebookLinear.kind else flute.unavailable()

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        return split_variants(kernel, role, k // CHUNK, codebook.WARPS)

    def linear(self, variant: Variant, weight: QuantizedPairs, *, swiglu: bool) -> LevelLinear:
        rotates = rotate_by(self.hadamard, weight.pairs.device)
        return make_codebook_linear(weight, variant, swiglu=swiglu, rotate=rotates)

    def random_weight(self, n: int, k: int, device: torch.device) -> QuantizedPairs:
        rotation, group = self._layout(k)
        pairs = torch.randint(0, 4**self.bits, (n, rotation.padded // 2), dtype=torch.uint8, device=device)
        scale = torch.rand(n, rotation.padded // group, device=device) * 0.01 + 0.01
        return QuantizedPairs(pairs, scale.half(), load_grid(self.bits, self.dim), group, rotation)


def higgs_quantizer(bits: int = 4, dim: int = 2, group_size: int = 256, hadamard_size: int = 512) -> FormatQuantizer:
    """HIGGS for a draft level."""
    return FormatQuantizer(HiggsFormat(bits, dim, group_size, hadamard_size))


@functools.cache
def grids_hash() -> str:
    """Twelve hex digits of the file of grids."""
    return hashlib.sha256(resources.files("subspec.quant").joinpath(FILE).read_bytes()).hexdigest()[:12]


CODEBOOK_KERNELS = (CodebookLinear.kind, ReferenceCodebook.kind)
"""Our kernels for ``quant=higgs``, the fastest first; ``flute`` has to be asked for."""


def make_codebook_linear(
    weight: QuantizedPairs, variant: Variant, *, swiglu: bool = False, rotate: Rotate = rotate
) -> LevelLinear:
    """A Linear of ``quant=higgs``.

    Args:
        variant: one of :data:`CODEBOOK_KERNELS` or ``flute``, its tiles and its splits (0: usual ones).
        swiglu: the rows are gate and up interleaved 16 by 16, and the result is their activation.
        rotate: what rotates the inputs (the reference always does it in torch).

    Raises:
        ValueError: there is no such kernel, or rows of gate and up are not whole tiles.
    """
    if swiglu and weight.shape[0] % 32:
        raise ValueError(f"{weight.shape[0]} interleaved rows are not a multiple of 32")
    if variant.kernel == ReferenceCodebook.kind:
        return ReferenceCodebook(weight, swiglu=swiglu)
    if variant.kernel == CodebookLinear.kind:
        return CodebookLinear(weight, variant, swiglu=swiglu, rotate=rotate)
    if variant.kernel == FluteLinear.kind:
        return FluteLinear(weight, swiglu=swiglu, rotate=rotate)
    known = ", ".join((*CODEBOOK_KERNELS, FluteLinear.kind))
    raise ValueError(f"no look-up kernel {variant.kernel!r}: use {known}")
