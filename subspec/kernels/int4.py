"""4-bit Linear layers for the few rows of a draft level: packing, the CUDA kernel, and its torch reference.

The kernel (``int4.cu``) is compiled once per process by the run-time compiler that ships with PyTorch; no CUDA toolkit
is needed. It computes up to eight rows in one launch; more rows take several.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import launch
from subspec.kernels.activation import apply_swiglu
from subspec.kernels.compile import compile_cuda, problem

GROUP = 64
"""Weights along the input dimension that share a scale and a zero; the kernel is built for this size."""

PACKED_AT_ONCE = 1 << 24
"""Weights whose widened copies are there at a time while a weight is packed."""

MAX_ROWS = 8
WARPS = 8


@dataclass(frozen=True)
class PackedInt4:
    """A 4-bit weight in the kernel's order.

    Attributes:
        words: int32 [blocks, groups, tiles, 32 lanes, 4], eight nibbles each.
        meta: float16 [blocks, groups, 8, 2 * tiles, 2]: scale and zero of each row.
        out_features: rows of the weight, without the padding to whole blocks.
        in_features: its columns.
        tiles: 16-row tiles per block.
        swiglu: whether rows alternate, 16 by 16, between a gate and an up projection.
    """

    words: Tensor
    meta: Tensor
    out_features: int
    in_features: int
    tiles: int
    swiglu: bool

    @property
    def padded(self) -> int:
        """Rows with padding: the row stride of the kernel's output."""
        return self.words.shape[0] * self.tiles * 16

    @property
    def nbytes(self) -> int:
        """Bytes of words and meta."""
        return self.words.numel() * 4 + self.meta.numel() * 2


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gate and an up projection [n, ...] alternating 16 by 16: [2 n, ...]; n a multiple of 16."""
    pair = torch.stack([gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))], dim=1)
    return pair.flatten(0, 2)


def pack(q: Tensor, scale: Tensor, zero: Tensor, *, tiles: int, swiglu: bool = False) -> PackedInt4:
    """Bring a quantized weight w = scale * (q - zero) into the kernel's order.

    Args:
        q: integers 0..15, any integer dtype [n, k], k a multiple of 64.
        scale, zero: [n, k / 64].
        tiles: 2, 4 or 8 tiles of 16 rows per block.
        swiglu: rows are interleaved gate and up (see :func:`interleave`).

    Raises:
        ValueError: k is not a multiple of 64, or an interleaved weight has no whole tiles.
    """
    n, k = q.shape
    if k % GROUP:
        raise ValueError(f"{k} inputs are not a multiple of the group size {GROUP}")
    if swiglu and n % 32:
        raise ValueError(f"{n} interleaved rows are not a multiple of 32")
    rows = tiles * 16
    padding = -n % rows
    if padding:
        q = torch.nn.functional.pad(q, (0, 0, 0, padding))
        scale = torch.nn.functional.pad(scale, (0, 0, 0, padding))
        zero = torch.nn.functional.pad(zero, (0, 0, 0, padding))
    blocks, groups = (n + padding) // rows, k // GROUP
    words = torch.empty(blocks, groups, tiles, 32, 4, dtype=torch.int32, device=q.device)
    shifts = torch.arange(0, 32, 4, device=q.device)
    # In pieces: the widened nibbles take eight bytes each.
    step = max(1, PACKED_AT_ONCE // (rows * k))
    for start in range(0, blocks, step):
        part = q[start * rows : (start + step) * rows].to(torch.int64)
        # k inside a group: thread t (4) x instruction (4) x register half p (2) x element e (2);
        # rows inside a tile: register half h (2) x g (8).
        part = part.view(-1, tiles, 2, 8, groups, 4, 4, 2, 2)
        part = part.permute(0, 4, 1, 3, 5, 6, 8, 7, 2).reshape(-1, groups, tiles, 32, 4, 8)
        word = (part << shifts).sum(-1)
        words[start : start + step] = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    meta = torch.stack([scale.float(), zero.float()], dim=-1).to(torch.float16)
    meta = meta.view(blocks, tiles, 2, 8, groups, 2).permute(0, 4, 3, 1, 2, 5)
    return PackedInt4(words, meta.reshape(blocks, groups, 8, 2 * tiles, 2).contiguous(), n, k, tiles, swiglu)


def unpack_codes(weight: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pack` was given: uint8 [out_features, in_features], and float32 scales and zeros per group."""
    blocks, groups, tiles = weight.words.shape[:3]
    shifts = torch.arange(0, 32, 4, device=weight.words.device)
    nibbles = (weight.words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
    q = nibbles.view(blocks, groups, tiles, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 4, 5, 7, 6)
    meta = weight.meta.float().view(blocks, groups, 8, tiles, 2, 2).permute(0, 3, 4, 2, 1, 5)
    meta = meta.reshape(blocks * tiles * 16, groups, 2)[: weight.out_features]
    q = q.reshape(blocks * tiles * 16, groups * GROUP)[: weight.out_features]
    return q.to(torch.uint8), meta[..., 0].contiguous(), meta[..., 1].contiguous()


def unpack(weight: PackedInt4) -> Tensor:
    """The dequantized weight, float32 [out_features, in_features]: the reference of everything here."""
    q, scale, zero = unpack_codes(weight)
    return (scale.unsqueeze(-1) * (q.float().unflatten(1, (-1, GROUP)) - zero.unsqueeze(-1))).flatten(1)


def reference(weight: PackedInt4, x: Tensor) -> Tensor:
    """What :func:`linear` computes, in float32 torch: [rows, out_features], or the SwiGLU of it."""
    y = x.float() @ unpack(weight).t()
    return apply_swiglu(y) if weight.swiglu else y


@functools.cache
def _kernel(tiles: int, warps: int, swiglu: bool, overlap: bool, device: int) -> Any:
    settings = {"TILES": tiles, "WARPS": warps, "SWIGLU": int(swiglu), "OVERLAP": int(overlap)}
    return compile_cuda(["few_rows.cu", "int4.cu"], settings, "int4_linear", device)


def unavailable() -> str | None:
    """Why the kernel cannot run here, in a few words; None when it can."""
    return problem(lambda: _kernel(4, WARPS, False, False, torch.cuda.current_device()))


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_for(weight: PackedInt4, count: int) -> int:
    """Slices of the input dimension that give every multiprocessor a few blocks to overlap loads with.

    Args:
        count: multiprocessors of the device.
    """
    blocks, groups = weight.words.shape[0], weight.in_features // GROUP
    if weight.swiglu:
        return 1  # the activation needs the whole sum
    wanted = -(-3 * count // blocks)
    return max(1, min(wanted, groups // WARPS))


def linear(weight: PackedInt4, x: Tensor, out: Tensor, *, splits: int = 1, warps: int = WARPS) -> None:
    """Run the kernel on up to eight rows; inside :func:`subspec.kernels.launch.overlapping` its launch overlaps.

    Args:
        x: bfloat16 [rows, in_features], contiguous.
        out: float32 [splits, rows, padded], to be added over the splits by the reader; with SwiGLU bfloat16
            [rows, padded / 2] and ``splits`` 1.
        warps: of a block, 4 or 8, which share the groups of its slice.
    """
    rows, groups = x.shape[0], weight.in_features // GROUP
    kernel = _kernel(weight.tiles, warps, weight.swiglu, launch.is_overlapping(), x.device.index or 0)
    args = [weight.words, weight.meta, x, out, rows, weight.padded, groups, -(-groups // splits)]
    launch.launch(kernel, (weight.words.shape[0], splits, 1), warps * 32, args)
