"""4-bit Linear layers for the few rows of a draft level: packing, the CUDA kernels, and their torch reference.

The kernels (``int4.cu``, ``int4_ring.cu``) are compiled once per process by the run-time compiler that ships with
PyTorch; no CUDA toolkit is needed. They compute up to eight rows in one launch; more rows take several.
"""

import functools
from dataclasses import dataclass, replace
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
class Ring:
    """Settings of the kernel whose blocks live as long as it does (``int4_ring.cu``); needs compute capability 9.0.

    Attributes:
        warps: of a block; one more copies.
        blocks: on each multiprocessor.
        kib: shared memory that a multiprocessor's blocks take together, in KiB.
        x_shared: whether all of x is copied there first.
    """

    warps: int = 8
    blocks: int = 1
    kib: int = 112
    x_shared: bool = False

    def __str__(self) -> str:
        return f"ring {self.warps}x{self.blocks} {self.kib}K{' x' if self.x_shared else ''}"

    def stages(self, tiles: int, rows: int, groups: int) -> int:
        """Slots of the ring, a unit for each warp: what a block's shared memory holds beside the rest."""
        slot = self.warps * tiles * (32 * 16 + 64)
        rest = self.bytes(tiles, rows, groups, 0)
        return max(0, (self.kib * 1024 // self.blocks - rest) // (slot + 16))

    def bytes(self, tiles: int, rows: int, groups: int, stages: int) -> int:
        """Shared memory of a block, as ``int4_ring.cu`` lays it out."""
        slot = self.warps * tiles * (32 * 16 + 64)
        x = rows * (groups * 2 * GROUP + 16) if self.x_shared else 0
        sums = self.warps * tiles * 16 * 9 * 4
        return stages * slot + x + sums + (2 * stages + 1) * 8

    def fits(self, tiles: int, groups: int) -> bool:
        """Whether enough slots are left to be worth it."""
        return self.stages(tiles, MAX_ROWS, groups) >= 3

    def grid(self, row_blocks: int, groups: int, swiglu: bool, multiprocessors: int) -> int:
        """Blocks of a launch: all have something to do."""
        return min(self.blocks * multiprocessors, row_blocks * (1 if swiglu else groups))


def ring_slices(row_blocks: int, groups: int, swiglu: bool, grid: int) -> int:
    """Slices of the output that :class:`Ring` writes: the most pieces that a block of rows is cut into.

    Args:
        grid: blocks of the launch, which share all units of row_blocks x groups equally.
    """
    if swiglu:
        return 1
    units = row_blocks * groups

    def owner(unit: int) -> int:
        return ((unit + 1) * grid - 1) // units

    return max(1 + owner((b + 1) * groups - 1) - owner(b * groups) for b in range(row_blocks))


RINGS: tuple[Ring | None, ...] = (None,)
"""What the choice of kernels tries; None: the kernel without a ring."""

RING_TILES = (2, 4, 8)
"""Tiles per block that a ring is tried with."""


def has_rings() -> bool:
    """Whether the device in use can run them."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


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


MOST_SHARED = 227 * 1024
"""Bytes of a block on every card that has rings."""


def _kernel(tiles: int, swiglu: bool, overlap: bool, device: int, ring: Ring | None = None) -> Any:
    if ring is not None:
        # How much shared memory it takes is said at its launch. Registers are to leave room for 16 warps of a
        # multiprocessor at least, and so for the next kernel's blocks.
        ring = replace(ring, kib=0, blocks=max(ring.blocks, 16 // ring.warps))
    return _compiled(tiles, swiglu, overlap, device, ring)


@functools.cache
def _compiled(tiles: int, swiglu: bool, overlap: bool, device: int, ring: Ring | None) -> Any:
    name = "int4_ring" if ring else "int4_linear"
    settings = {"TILES": tiles, "SWIGLU": int(swiglu), "OVERLAP": int(overlap), "WARPS": WARPS}
    files = ["int4.cu"]
    if ring:
        settings |= {"RING": 1, "WARPS": ring.warps, "BLOCKS": ring.blocks, "X_SHARED": int(ring.x_shared)}
        files.append("int4_ring.cu")
    kernel = compile_cuda(files, settings, name, device)
    if ring:
        with torch.cuda.device(device):
            kernel.set_shared_memory_config(MOST_SHARED)
    return kernel


def unavailable() -> str | None:
    """Why the kernel cannot run here, in a few words; None when it can."""
    return problem(lambda: _kernel(4, False, False, torch.cuda.current_device()))


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


def linear(weight: PackedInt4, x: Tensor, out: Tensor, *, splits: int = 1, ring: Ring | None = None) -> None:
    """Run the kernel on up to eight rows; inside :func:`subspec.kernels.launch.overlapping` its launch overlaps.

    Args:
        x: bfloat16 [rows, in_features], contiguous.
        out: float32 [splits, rows, padded], to be added over the splits by the reader; with SwiGLU bfloat16
            [rows, padded / 2] and ``splits`` 1.
        ring: the kernel with a ring, whose ``splits`` are :func:`ring_slices`.
    """
    rows, groups, row_blocks = x.shape[0], weight.in_features // GROUP, weight.words.shape[0]
    device = x.device.index or 0
    kernel = _kernel(weight.tiles, weight.swiglu, launch.is_overlapping(), device, ring)
    args = [weight.words, weight.meta, x, out, rows, weight.padded, groups]
    if ring is None:
        per_split = -(-groups // splits)
        launch.launch(kernel, (row_blocks, splits, 1), WARPS * 32, [*args, per_split])
        return
    grid = ring.grid(row_blocks, groups, weight.swiglu, multiprocessors(x.device))
    stages = ring.stages(weight.tiles, rows, groups)
    shared = ring.bytes(weight.tiles, rows, groups, stages)
    launch.launch(kernel, (grid, 1, 1), ring.warps * 32 + 32, [*args, splits, stages], shared)
