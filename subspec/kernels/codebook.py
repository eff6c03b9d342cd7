"""Linear layers whose weights are looked up in a codebook of pairs: packing, the CUDA kernel, its torch reference.

y[row, n] = sum over groups of scale[n, group] * sum_k table[pair[n, k / 2]][k % 2] * x[row, k]
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels.compile import problem
from subspec.kernels.few_rows import STEP, WARPS, PackedWeight, compiled

PACK_BYTES = 1 << 28


@dataclass(frozen=True)
class PackedCodebook(PackedWeight):
    """Pairs in the kernel's order.

    Attributes:
        words: int32; with 4 bits [blocks, steps, tiles, 32 lanes, 4], else [blocks, steps, tiles, bits, 32 lanes].
        scales: float16 [blocks, groups, 8, tiles, 2]: of rows g and g + 8 of each tile.
        table: int32 [4 ** bits], two bfloat16 each.
    """

    kernel = "codebook"
    table: Tensor

    @property
    def group_steps(self) -> int:
        """Steps of 64 inputs that share a scale."""
        return self.words.shape[1] // self.scales.shape[1]

    @property
    def macros(self) -> dict[str, int]:
        return {"BITS": self.bits, "GROUP_STEPS": self.group_steps}

    @property
    def sources(self) -> list[Tensor]:
        return [self.words, self.scales, self.table]

    def unpack_pairs(self) -> tuple[Tensor, Tensor]:
        """Arguments of :func:`pack`: pairs uint8 [out_features, inputs / 2], scale float16 [out_features, groups]."""
        blocks, steps, tiles = self.words.shape[:3]
        if self.bits == 4:
            pairs = self.words.view(torch.uint8).int()
        else:
            words = self.words.transpose(-1, -2).contiguous()
            bytes_ = words.view(torch.uint8).view(*words.shape, 4)
            low = bytes_[..., :2, :].flatten(-2).int()
            pairs = torch.stack([low & 15, low >> 4], dim=-1).flatten(-2)
            if self.bits == 3:
                shifts = torch.arange(0, 8, 2, device=words.device, dtype=torch.int32)
                high = bytes_[..., 2, :].int().unsqueeze(-1) >> shifts & 3
                pairs = pairs | high.flatten(-2) << 4
        pairs = pairs.view(blocks, steps, tiles, 8, 4, 4, 2, 2).permute(0, 2, 7, 3, 1, 4, 5, 6)
        pairs = pairs.reshape(blocks * tiles * 16, steps * STEP // 2).to(torch.uint8)
        scale = self.scales.permute(0, 3, 4, 2, 1).reshape(blocks * tiles * 16, -1)
        return pairs[: self.out_features], scale[: self.out_features]

    def unpack(self) -> Tensor:
        """Of the rotated weight."""
        pairs, scale = self.unpack_pairs()
        values = self.table.view(torch.bfloat16).view(-1, 2).float()[pairs.int()].flatten(1)
        groups = values.view(values.shape[0], scale.shape[1], -1)
        return (groups * scale.float().unsqueeze(-1)).flatten(1)


def pack(pairs: Tensor, scale: Tensor, table: Tensor, *, bits: int, tiles: int, swiglu: bool = False) -> PackedCodebook:
    """Bring a quantized weight into the kernel's order.

    Args:
        pairs: uint8 [n, inputs / 2], entries of ``table``; inputs a multiple of 64.
        scale: float16 [n, groups].
        table: int32 [4 ** bits], two bfloat16 each, the first one in the low half.
        tiles: 2 or 4 tiles of 16 rows per block.
        swiglu: rows are interleaved gate and up (:func:`subspec.kernels.few_rows.interleave`).
    """
    n, count = pairs.shape
    rows = tiles * 16
    padding = -n % rows
    scale = functional.pad(scale, (0, 0, 0, padding))
    blocks, steps = (n + padding) // rows, 2 * count // STEP
    shape = (blocks, steps, tiles, 32, 4) if bits == 4 else (blocks, steps, tiles, bits, 32)
    words = torch.empty(shape, dtype=torch.int32, device=pairs.device)
    at_once = max(1, PACK_BYTES // (4 * rows * count))
    for start in range(0, blocks, at_once):
        part = pairs[start * rows : (start + at_once) * rows]
        part = functional.pad(part, (0, 0, 0, -part.shape[0] % rows))
        # pairs inside a step: thread t (4) x instruction (4) x register half p (2);
        # rows inside a tile: register half h (2) x g (8).
        part = part.view(-1, tiles, 2, 8, steps, 4, 4, 2).permute(0, 4, 1, 3, 5, 6, 7, 2)
        words[start : start + at_once] = _words(part.reshape(-1, steps, tiles, 32, 16), bits)
    scale = scale.view(blocks, tiles, 2, 8, -1).permute(0, 4, 3, 1, 2).contiguous()
    return PackedCodebook(words, scale, n, bits, swiglu, table)


def _words(pairs: Tensor, bits: int) -> Tensor:
    """uint8 [..., 32, 16], a thread's pairs of one step, to its words."""
    if bits == 4:
        return pairs.view(torch.int32)
    low = pairs & 15
    words = (low[..., ::2] | low[..., 1::2] << 4).view(torch.int32)
    if bits == 3:
        high = (pairs >> 4).unflatten(-1, (4, 4))
        high = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
        words = torch.cat([words, high.view(torch.int32)], dim=-1)
    return words.transpose(-1, -2)


def unavailable() -> str | None:
    """Why the kernel cannot run here, in a few words; None if it can."""
    macros = {"BITS": 4, "GROUP_STEPS": 4, "TILES": 2, "WARPS": WARPS, "EIGHTS": 1, "SWIGLU": 0}
    return problem(lambda: compiled("codebook", torch.cuda.current_device(), **macros))
