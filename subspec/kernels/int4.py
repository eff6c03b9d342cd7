"""Linear layers of 8, 4, 3 and 2 bits for the few rows of a draft level: packing, the CUDA kernel, its torch reference.

Integers lie in 4-bit words. 2 and 3 bits take a word of 4. 8 bits are two planes of 4, ``q = low + 16 * high``: the
same kernel (``int4.cu``) multiplies the inputs with both, ``s (q - z) = s (low - z / 17) + 16 s (high - z / 17)``.
Integers are exact in float16, sums and the scales applied to them are float32. A group's scale and zero share 16 bits
(:mod:`subspec.kernels.group_scales`). Many rows of 4 bits and less have a kernel of their own on compute capability 9.0
(:mod:`subspec.kernels.int4_wide`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels import group_scales, int4_wide, launch
from subspec.kernels.compile import problem
from subspec.kernels.few_rows import WARPS, PackedWeight, compiled, half_out
from subspec.kernels.group_scales import containing, zeros_in

GROUP = 64
"""Inputs that share a scale and a zero in the kernel's order; larger groups repeat theirs."""

PACKED_AT_ONCE = 1 << 24
"""Words' worth of weights whose widened copies exist at a time while a weight is packed."""


@dataclass(frozen=True)
class PackedInt4(PackedWeight):
    """Integers in the kernel's order.

    Attributes:
        words: int32 [blocks, groups * planes, tiles, 32 lanes, 4], eight nibbles each; a group's low nibbles first.
        scales: float16 [blocks, groups * planes, 8, tiles, 2]: of rows g and g + 8 of each tile.
    """

    kernel = "int4"
    overlaps = True
    reads = torch.float16

    @property
    def planes(self) -> int:
        """Nibbles per integer."""
        return planes_of(self.bits)

    @property
    def macros(self) -> dict[str, int]:
        return {"PLANES": self.planes, "OVERLAP": int(launch.is_overlapping())}

    def wide(self, rows: int) -> int4_wide.WideGrid | None:
        device = self.words.device
        if rows < int4_wide.FROM or self.planes > 1 or device.type != "cuda" or not int4_wide.runs_on(device.index):
            return None
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return int4_wide.wide_grid(rows, self.padded, self.words.shape[1], count, whole=self.swiglu)

    def multiply_tiles(self, x: Tensor, out: Tensor, grid: int4_wide.WideGrid, *, tiled: bool = False) -> None:
        groups, warps = self.words.shape[1], 4 * grid.warp_groups
        macros = {"TILES": self.tiles, "SWIGLU": int(self.swiglu), "TILED": int(tiled)} | grid.macros
        macros |= half_out(out) | {"OVERLAP": int(launch.is_overlapping())}
        kernel = compiled("int4_wide", x.device.index, "90a", **macros)
        args = [*self.sources, x, out, x.shape[0], self.padded, groups, -(-groups // grid.splits)]
        blocks = -(-self.padded // (16 * warps)), grid.splits, grid.tiles
        launch.launch(kernel, blocks, 32 * (warps + 1), args)

    def unpack_integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of :func:`pack`: uint8 [out_features, inputs], float32 scales and zeros per 64 inputs."""
        blocks, groups, tiles = self.words.shape[:3]
        planes, n = self.planes, self.out_features
        shifts = torch.arange(0, 32, 4, device=self.words.device)
        nibbles = (self.words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
        q = nibbles.view(blocks, groups, tiles, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 4, 5, 7, 6)
        q = q.reshape(blocks * tiles * 16, groups // planes, planes, GROUP)[:n].to(torch.uint8)
        q = q[:, :, 0] | q[:, :, 1] << 4 if planes == 2 else q[:, :, 0]
        scale = self.scales.permute(0, 3, 4, 2, 1).reshape(blocks * tiles * 16, groups)[:n, ::planes].float()
        return q.flatten(1), scale, zeros_in(scale, self.bits)

    def unpack(self) -> Tensor:
        q, scale, zero = self.unpack_integers()
        return (scale.unsqueeze(-1) * (q.float().unflatten(1, (-1, GROUP)) - zero.unsqueeze(-1))).flatten(1)


def planes_of(bits: int) -> int:
    """Nibbles per integer."""
    return 2 if bits == 8 else 1


def packed_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of a packed weight [n, k] whose outputs fill whole blocks."""
    return planes_of(bits) * (n * k // 2 + 2 * n * (k // GROUP))


def unfit(k: int, group: int) -> str | None:
    """Why a weight with ``k`` inputs in groups of ``group`` cannot be packed; None if it can."""
    if k % GROUP:
        return f"{k} inputs are not a multiple of {GROUP}"
    if group % GROUP:
        return f"its groups are multiples of {GROUP}, not {group}"
    return None


def pack(q: Tensor, scale: Tensor, zero: Tensor, *, tiles: int, bits: int = 4, swiglu: bool = False) -> PackedInt4:
    """Bring a quantized weight w = scale * (q - zero) into the kernel's order.

    Args:
        q: integers below 2**bits, uint8 [n, k], k a multiple of 64.
        scale, zero: [n, k / group size], the group size a multiple of 64; a scale contains its zero.
        tiles: 2, 4 or 8 tiles of 16 rows per block.
        swiglu: rows are interleaved gate and up (see :func:`~subspec.kernels.few_rows.interleave`).

    Raises:
        ValueError: inputs or groups are no multiples of 64, or a scale does not contain its zero.
    """
    n, k = q.shape
    if reason := unfit(k, k // scale.shape[1]):
        raise ValueError(reason)
    rows, groups, planes = tiles * 16, k // GROUP, planes_of(bits)
    blocks = -(-n // rows)
    words = torch.empty(blocks, groups * planes, tiles, 32, 4, dtype=torch.int32, device=q.device)
    shifts = torch.arange(0, 32, 4, device=q.device)
    step = max(1, PACKED_AT_ONCE // (rows * k * planes))
    for start in range(0, blocks, step):
        part = q[start * rows : (start + step) * rows]
        part = functional.pad(part, (0, 0, 0, -part.shape[0] % rows)).unflatten(1, (groups, 1, GROUP))
        if planes == 2:
            part = torch.cat([part & 15, part >> 4], dim=2)
        # k inside a group: thread t (4) x instruction (4) x register half p (2) x element e (2);
        # rows inside a tile: register half h (2) x g (8).
        part = part.to(torch.int64).view(-1, tiles, 2, 8, groups * planes, 4, 4, 2, 2)
        part = part.permute(0, 4, 1, 3, 5, 6, 8, 7, 2).reshape(-1, groups * planes, tiles, 32, 4, 8)
        word = (part << shifts).sum(-1)
        words[start : start + step] = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    scales = scale.half()
    if not (torch.equal(scales.float(), scale.float()) and torch.equal(zeros_in(scales, bits), zero.float())):
        raise ValueError(f"a scale does not contain its zero: see {group_scales.__name__}")
    scales = scales.repeat_interleave(groups // scale.shape[1], 1)
    if planes == 2:  # the high nibbles; the sum of both planes in float32 is exact up to its rounding
        scales = torch.stack([scales, 16 * scales], dim=2).flatten(1)
    scales = functional.pad(scales, (0, 0, 0, -n % rows)).view(blocks, tiles, 2, 8, groups * planes)
    scales = scales.permute(0, 4, 3, 1, 2).contiguous()
    return PackedInt4(words, scales, n, bits, swiglu)


def random_packed(n: int, k: int, *, tiles: int, bits: int, swiglu: bool, device: torch.device) -> PackedInt4:
    """A weight of random integers, to be timed: packing a real one takes gigabytes for a while."""
    blocks, groups = -(-n // (tiles * 16)), k // GROUP * planes_of(bits)
    shape = (blocks, groups, tiles, 32, 4)
    words = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)
    scale = containing(torch.tensor(0.005), torch.tensor(7.5), bits).item()
    scales = torch.full((blocks, groups, 8, tiles, 2), scale, dtype=torch.float16, device=device)
    return PackedInt4(words, scales, n, bits, swiglu)


def unavailable() -> str | None:
    """Why the kernel cannot run here, in a few words; None if it can."""
    macros = {"TILES": 4, "WARPS": WARPS, "EIGHTS": 1, "PLANES": 1, "SWIGLU": 0, "OVERLAP": 0}
    return problem(lambda: compiled("int4", torch.cuda.current_device(), **macros))
