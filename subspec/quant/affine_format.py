"""How a quantized weight lies in device memory, and which kernels multiply with it.

A format is what a quantizer and the kernels have in common: the planner asks it for bytes, the choice of kernels for
candidates and made-up weights to time, the level's builder for the Linear itself. Another kind of quantized weight
(another :class:`~subspec.quant.quantized_weight.QuantizedWeight`) is another format; nothing else has to know of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from subspec.kernels import int4, wq
from subspec.quant.level_linear import (
    GemLite,
    LevelLinear,
    MmaInt4,
    Tinygemm,
    TritonWq,
    Variant,
    make_linear,
)
from subspec.quant.quantized_weight import Codes, QuantizedWeight

TILES = {"qkv": 2, "out": 2, "gate_up": 4, "down": 2, "head": 4}
"""Outputs per block, in sixteens, where nothing is measured: enough blocks for every multiprocessor."""

SPLITS = (1, 2, 3, 4, 6, 8)
"""Slices of the inputs that are tried."""

WHOLE_SUMS = ("gate_up", "head")
"""Roles whose result is read as it is: the activation needs whole sums, and slices of all logits would take memory."""


class Format(Protocol):
    """One way to keep quantized weights.

    Attributes:
        name, detail: for people and records: ``4 bit`` and ``groups of 64``.
        key: what kernels' times depend on, for the file that keeps them.
        bits: per weight, without scales.
        kernels: names of what can multiply with it.
    """

    @property
    def name(self) -> str: ...

    @property
    def detail(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def kernels(self) -> Sequence[str]: ...

    def device_bytes(self, n: int, k: int) -> int:
        """What a weight [n, k] takes, scales included."""

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        """Why ``kernel`` does not take a weight [n, k] of this format, in a few words; None when it does."""

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        """Settings of ``kernel`` worth measuring for a weight [n, k] in this role."""

    def reference(self, role: str, n: int, k: int) -> Variant:
        """What stands in on a CPU."""

    def linear(self, variant: Variant, weight: QuantizedWeight, *, swiglu: bool) -> LevelLinear:
        """The Linear of a fused role's stacked weight."""

    def random_linear(
        self, variant: Variant, n: int, k: int, device: torch.device, *, swiglu: bool
    ) -> LevelLinear:
        """One with made-up contents, to be timed."""


@dataclass(frozen=True)
class AffineFormat:
    """Integers with a scale and a zero per group of inputs (HQQ, axis 1).

    Attributes:
        bits: 8, 4, 3 or 2.
        group: inputs per scale.
        words: bits that an integer takes in memory: 3-bit ones take four where a 4-bit kernel is to compute them.
    """

    bits: int = 4
    group: int = int4.GROUP
    words: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", self.words or self.bits)

    @property
    def name(self) -> str:
        """For people."""
        kept = f" in {self.words}-bit words" if self.words != self.bits else ""
        return f"{self.bits} bit{kept}"

    @property
    def detail(self) -> str:
        """For people."""
        return f"groups of {self.group}"

    @property
    def key(self) -> str:
        """What a kernel sees."""
        return f"w{self.words}g{self.group}"

    @property
    def kernels(self) -> tuple[str, ...]:
        """4 bits have all of them, 3 bits ours alone."""
        known = {
            8: (GemLite.kind, TritonWq.kind),
            4: (MmaInt4.kind, Tinygemm.kind, GemLite.kind, TritonWq.kind),
            3: (TritonWq.kind,),
            2: (GemLite.kind, TritonWq.kind),
        }
        return known[self.words]

    def device_bytes(self, n: int, k: int) -> int:
        """words * n * k / 8, and four bytes per group; the same for every kernel.

        Our 4-bit kernel fills its last block of 32 or 64 outputs, which no published model's shapes leave open.
        """
        return wq.packed_bytes(n, k, self.words, self.group)

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        """Why ``kernel`` does not take a weight [n, k]; None when it does."""
        if kernel not in self.kernels:
            return f"it has no {self.bits}-bit weights"
        if k % self.group:
            return f"groups of {self.group} do not divide {k} inputs"
        if kernel == MmaInt4.kind and self.group != int4.GROUP:
            return f"it has groups of {int4.GROUP}, not {self.group}"
        if kernel == TritonWq.kind:
            return wq.unfit(self.words, self.group, k)
        if kernel == Tinygemm.kind:
            if self.group not in (32, 64, 128, 256):
                return f"it has groups of 32, 64, 128 and 256, not {self.group}"
            if n % 8 or k % 32:
                return (
                    f"{n} outputs are not a multiple of 8"
                    if n % 8
                    else f"{k} inputs are not a multiple of 32"
                )
        if kernel == GemLite.kind:
            if self.group < 32 or self.group & (self.group - 1):
                return f"it has groups of 32, 64, 128 ..., not {self.group}"
            if k % 64:
                return f"{k} inputs are not a multiple of 64"
        return None

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        """Tiles and splits of our kernels; the others decide for themselves."""
        if kernel == MmaInt4.kind:
            if role in WHOLE_SUMS:
                return [Variant(kernel, tiles, 1, warps) for tiles in (2, 4) for warps in (0, 4)]
            # Slices need some groups of 64 for each warp.
            most = max(1, 2 * (k // int4.GROUP) // int4.WARPS)
            return [Variant(kernel, tiles, splits) for tiles in (2, 4) for splits in SPLITS if splits <= most]
        if kernel == TritonWq.kind:
            sizes = (
                (2, 4) if self.words < 4 else (2, 4, 8)
            )  # sixteen products unrolled take seconds to compile
            # Slices need a few tiles of words each.
            most = 1 if role in WHOLE_SUMS else max(1, k // wq.PER_WORD[self.words] // wq.TILE // 2)
            return [Variant(kernel, tiles, splits) for tiles in sizes for splits in SPLITS if splits <= most]
        return [Variant(kernel)]

    def reference(self, role: str, n: int, k: int) -> Variant:
        """Our 4-bit kernel where it fits, else our Triton kernel: both have a torch reference."""
        kernel = TritonWq.kind if self.unfit(MmaInt4.kind, n, k) else MmaInt4.kind
        return Variant(kernel, TILES[role])

    def linear(self, variant: Variant, weight: QuantizedWeight, *, swiglu: bool) -> LevelLinear:
        """See :func:`~subspec.quant.level_linear.make_linear`."""
        assert isinstance(weight, Codes)
        return make_linear(variant, weight, swiglu=swiglu, bits=self.words)

    def random_linear(
        self, variant: Variant, n: int, k: int, device: torch.device, *, swiglu: bool
    ) -> LevelLinear:
        """Ours are made of random words: packing real codes takes gigabytes for a while."""
        if variant.kernel == MmaInt4.kind:
            tiles, groups = variant.tiles, k // int4.GROUP
            blocks = -(-n // (tiles * 16))
            words = random_words(blocks, groups, tiles, 32, 4, device=device)
            meta = torch.empty(blocks, groups, 8, 2 * tiles, 2, dtype=torch.float16, device=device)
            meta[..., 0], meta[..., 1] = 0.005, 7.5
            packed = int4.PackedInt4(words, meta, n, k, tiles, swiglu)
            return MmaInt4(packed, variant.splits, variant.warps)
        if variant.kernel == TritonWq.kind:
            words = random_words(k // wq.PER_WORD[self.words], n, device=device)
            high = torch.empty((k // 16, n) if self.words == 3 else (1,), dtype=torch.int16, device=device)
            meta = torch.empty(2, k // self.group, n, dtype=torch.float16, device=device)
            meta[0], meta[1] = 0.005, (1 << self.words) / 2
            packed = wq.PackedWq(words, high.zero_(), meta, self.words, self.group, swiglu)
            return TritonWq(packed, variant.tiles, max(variant.splits, 1))
        codes = random_codes(n, k, device, self.group, self.words)
        return make_linear(variant, codes, swiglu=swiglu)


def describe(format_: Format) -> str:
    """``4 bit, groups of 64``."""
    return f"{format_.name}, {format_.detail}"


def random_words(*shape: int, device: torch.device) -> torch.Tensor:
    """int32, all bits random."""
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)


def random_codes(n: int, k: int, device: torch.device, group: int = int4.GROUP, bits: int = 4) -> Codes:
    """Codes of a made-up weight, with scales of a real one's size."""
    q = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(n, k // group, device=device) * 0.002 + 0.004) * 2.0 ** (4 - bits)
    return Codes(q, scale, torch.full_like(scale, ((1 << bits) - 1) / 2), group, bits)


def affine_format(bits: int, group: int, kernel: str = "auto") -> AffineFormat:
    """The format in which codes of so many bits are kept: 3-bit ones take four bits, for the fast kernels of those,
    unless our Triton kernel, which alone keeps them in three, is asked for."""
    words = 4 if bits == 3 and kernel != TritonWq.kind else bits
    return AffineFormat(bits, group, words)
