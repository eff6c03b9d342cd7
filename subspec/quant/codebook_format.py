"""HIGGS weights as a format of the fused level: bytes, kernels and settings worth measuring."""

from dataclasses import dataclass

import torch

from subspec.quant import codebook
from subspec.quant.affine_format import SPLITS, TILES, WHOLE_SUMS
from subspec.quant.codebook_linear import MmaLut, TritonLut, make_lut_linear
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import Rotation
from subspec.quant.hadamard_transform import rotate_by
from subspec.quant.higgs_weight import CHUNK, HiggsCodes, group_of, higgs_sizes
from subspec.quant.level_linear import LevelLinear, Variant
from subspec.quant.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class LutFormat:
    """Pairs of weights looked up in a table, inputs rotated (a :class:`~subspec.quant.affine_format.Format`).

    Attributes:
        bits: 4, 3 or 2.
        dim: of the grid; kernels do not see it.
        group: inputs per scale, at most.
        hadamard_size: inputs rotated together, at most.
        hadamard: what rotates them (:func:`subspec.quant.hadamard_transform.rotate_by`).
    """

    bits: int = 4
    dim: int = 2
    group: int = 256
    hadamard_size: int = 512
    hadamard: str = "auto"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.bits} bit"

    @property
    def detail(self) -> str:
        """For people."""
        return f"HIGGS grids of dimension {self.dim}, groups of {self.group}, rotated by {self.hadamard_size}"

    @property
    def key(self) -> str:
        """What a kernel sees."""
        return f"lut{self.bits}g{self.group}r{self.hadamard_size}{self.hadamard}"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Ours; FLUTE's has to be asked for (``quant.kernel`` without streaming)."""
        return MmaLut.kind, TritonLut.kind

    def device_bytes(self, n: int, k: int) -> int:
        """Packed pairs and scales, padding of the inputs included.

        The CUDA kernel fills its last block of 32 or 64 outputs, which no published model's shapes leave open.
        """
        return sum(higgs_sizes(n, k, bits=self.bits, group_size=self.group))

    def unfit(self, kernel: str, n: int, k: int) -> str | None:
        """Why ``kernel`` does not take a weight [n, k]; None when it does."""
        return None if kernel in self.kernels else "it has no look-up tables"

    def variants(self, kernel: str, role: str, n: int, k: int) -> list[Variant]:
        """Tiles and splits."""
        if kernel == MmaLut.kind:
            # Slices need some steps of 64 inputs for each warp.
            most = 1 if role in WHOLE_SUMS else max(1, 2 * (k // CHUNK) // codebook.WARPS)
            return [Variant(kernel, tiles, splits) for tiles in (2, 4) for splits in SPLITS if splits <= most]
        most = 1 if role == "head" else max(1, k // (4 * CHUNK))
        return [
            Variant(kernel, tiles, splits) for tiles in (2, 4) for splits in (1, 2, 4, 8) if splits <= most
        ]

    def reference(self, role: str, n: int, k: int) -> Variant:
        """The CUDA kernel's."""
        return Variant(MmaLut.kind, TILES[role])

    def linear(self, variant: Variant, weight: QuantizedWeight, *, swiglu: bool) -> LevelLinear:
        """See :func:`~subspec.quant.codebook_linear.make_lut_linear`."""
        assert isinstance(weight, HiggsCodes)
        return make_lut_linear(
            weight, variant, swiglu=swiglu, rotate=rotate_by(self.hadamard, weight.pairs.device)
        )

    def random_linear(
        self, variant: Variant, n: int, k: int, device: torch.device, *, swiglu: bool
    ) -> LevelLinear:
        """With random codes and scales of a real weight's size."""
        return self.linear(variant, self.random_codes(n, k, device), swiglu=swiglu)

    def random_codes(self, n: int, k: int, device: torch.device) -> HiggsCodes:
        """Codes of a made-up weight."""
        rotation = Rotation.of(k, self.hadamard_size)
        group = group_of(rotation.padded, self.group)
        pairs = torch.randint(0, 4**self.bits, (n, rotation.padded // 2), dtype=torch.uint8, device=device)
        scale = torch.rand(n, rotation.padded // group, device=device) * 0.01 + 0.01
        return HiggsCodes(pairs, scale.half(), load_grid(self.bits, self.dim), group, rotation)
