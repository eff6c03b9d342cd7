"""Linear layers of 8, 4, 3 and 2 bits for the few rows of a draft level: packing, the CUDA kernel, its torch reference.

Integers lie in 4-bit words. 2 and 3 bits take a word of 4. 8 bits are two planes of 4, ``q = low + 16 * high``: the
same kernel multiplies the inputs with both, ``s (q - z) = s (low - z) + 16 s (high - 0)``. Integers are exact in
bfloat16, sums and the scales applied to them are float32.

The kernels (``int4.cu``, and ``int4_wide.cu`` for many rows on compute capability 9.0) are compiled once per process
by the run-time compiler that ships with PyTorch; no CUDA toolkit is needed. A launch takes any number of rows, and
reads the weights from memory once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels import launch
from subspec.kernels.activation import apply_swiglu
from subspec.kernels.compile import compile_cuda, problem

GROUP = 64
"""Inputs that share a scale and a zero in the kernel's order; larger groups repeat theirs."""

PACKED_AT_ONCE = 1 << 24
"""Words' worth of weights whose widened copies exist at a time while a weight is packed."""

WARPS = 8

MOST_EIGHTS = 4
"""Eights of rows that a block of threads multiplies with: more take registers that cost more than reading again."""


WIDE_FROM = 25
"""Rows from which ``int4_wide.cu`` is faster where it runs (``experiments/rows``)."""

WIDE_EIGHTS = (4, 6, 8)
"""Eights of rows that a block of ``int4_wide.cu`` can multiply with."""

WIDE_SETTINGS = {4: {"BLOCKS": 5, "DEPTH": 2}, 8: {"BLOCKS": 2, "DEPTH": 4}}
"""By its warps: the fastest of those tried (``experiments/rows``)."""


def eights_of(rows: int) -> tuple[int, int]:
    """Eights of rows per block of threads, and such blocks side by side."""
    eights = -(-rows // 8)
    pieces = -(-eights // MOST_EIGHTS)
    return -(-eights // pieces), pieces


@dataclass(frozen=True)
class PackedInt4:
    """A quantized weight in the kernel's order.

    Attributes:
        words: int32 [blocks, groups * planes, tiles, 32 lanes, 4], eight nibbles each; a group's low nibbles first.
        meta: float16 [blocks, groups * planes, 8, 2 * tiles, 2]: scale and zero of each row.
        out_features: rows of the weight, without the padding to whole blocks.
        in_features: its columns.
        tiles: 16-row tiles per block.
        bits: of the integers.
        swiglu: whether rows alternate, 16 by 16, between a gate and an up projection.
    """

    words: Tensor
    meta: Tensor
    out_features: int
    in_features: int
    tiles: int
    bits: int
    swiglu: bool

    @property
    def planes(self) -> int:
        """Nibbles per integer."""
        return planes_of(self.bits)

    @property
    def padded(self) -> int:
        """Rows with padding: the row stride of the kernel's output."""
        return self.words.shape[0] * self.tiles * 16

    @property
    def nbytes(self) -> int:
        """Bytes of words and meta."""
        return self.words.nbytes + self.meta.nbytes


def planes_of(bits: int) -> int:
    """Nibbles per integer."""
    return 2 if bits == 8 else 1


def packed_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of a packed weight [n, k] whose outputs fill whole blocks."""
    return planes_of(bits) * (n * k // 2 + 4 * n * (k // GROUP))


def unfit(k: int, group: int) -> str | None:
    """Why a weight with ``k`` inputs in groups of ``group`` cannot be packed; None if it can."""
    if k % GROUP:
        return f"{k} inputs are not a multiple of {GROUP}"
    if group % GROUP:
        return f"its groups are multiples of {GROUP}, not {group}"
    return None


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of a gate and an up projection [n, ...] alternating 16 by 16: [2 n, ...]; n a multiple of 16."""
    pair = torch.stack([gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))], dim=1)
    return pair.flatten(0, 2)


def pack(q: Tensor, scale: Tensor, zero: Tensor, *, tiles: int, bits: int = 4, swiglu: bool = False) -> PackedInt4:
    """Bring a quantized weight w = scale * (q - zero) into the kernel's order.

    Args:
        q: integers below 2**bits, uint8 [n, k], k a multiple of 64.
        scale, zero: [n, k / group size], the group size a multiple of 64.
        tiles: 2, 4 or 8 tiles of 16 rows per block.
        swiglu: rows are interleaved gate and up (see :func:`interleave`).

    Raises:
        ValueError: inputs or groups are no multiples of 64, or an interleaved weight has no whole tiles.
    """
    n, k = q.shape
    if reason := unfit(k, k // scale.shape[1]):
        raise ValueError(reason)
    if swiglu and n % 32:
        raise ValueError(f"{n} interleaved rows are not a multiple of 32")
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
    meta = torch.stack([scale.float(), zero.float()], dim=-1).repeat_interleave(groups // scale.shape[1], 1)
    if planes == 2:  # 16 * scale is exact in float16, so is the sum of both planes in float32 up to its rounding
        high = torch.stack([16 * meta[..., 0].half().float(), torch.zeros_like(meta[..., 0])], dim=-1)
        meta = torch.stack([meta, high], dim=2).flatten(1, 2)
    meta = functional.pad(meta.to(torch.float16), (0, 0, 0, 0, 0, -n % rows))
    meta = meta.view(blocks, tiles, 2, 8, groups * planes, 2).permute(0, 4, 3, 1, 2, 5)
    meta = meta.reshape(blocks, groups * planes, 8, 2 * tiles, 2).contiguous()
    return PackedInt4(words, meta, n, k, tiles, bits, swiglu)


def random_packed(n: int, k: int, *, tiles: int, bits: int, swiglu: bool, device: torch.device) -> PackedInt4:
    """A weight of random integers, to be timed: packing a real one takes gigabytes for a while."""
    blocks, groups = -(-n // (tiles * 16)), k // GROUP * planes_of(bits)
    shape = (blocks, groups, tiles, 32, 4)
    words = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)
    meta = torch.empty(blocks, groups, 8, 2 * tiles, 2, dtype=torch.float16, device=device)
    meta[..., 0], meta[..., 1] = 0.005, 7.5
    return PackedInt4(words, meta, n, k, tiles, bits, swiglu)


def unpack_integers(weight: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of :func:`pack`: uint8 [out_features, in_features], float32 scales and zeros per 64 inputs."""
    blocks, groups, tiles = weight.words.shape[:3]
    planes, n = weight.planes, weight.out_features
    shifts = torch.arange(0, 32, 4, device=weight.words.device)
    nibbles = (weight.words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
    q = nibbles.view(blocks, groups, tiles, 8, 4, 4, 2, 2, 2).permute(0, 2, 8, 3, 1, 4, 5, 7, 6)
    q = q.reshape(blocks * tiles * 16, groups // planes, planes, GROUP)[:n].to(torch.uint8)
    q = q[:, :, 0] | q[:, :, 1] << 4 if planes == 2 else q[:, :, 0]
    meta = weight.meta.float().view(blocks, groups, 8, tiles, 2, 2).permute(0, 3, 4, 2, 1, 5)
    meta = meta.reshape(blocks * tiles * 16, groups, 2)[:n, ::planes]
    return q.flatten(1), meta[..., 0].contiguous(), meta[..., 1].contiguous()


def unpack(weight: PackedInt4) -> Tensor:
    """The dequantized weight, float32 [out_features, in_features]."""
    q, scale, zero = unpack_integers(weight)
    return (scale.unsqueeze(-1) * (q.float().unflatten(1, (-1, GROUP)) - zero.unsqueeze(-1))).flatten(1)


def reference(weight: PackedInt4, x: Tensor) -> Tensor:
    """Result of :func:`linear` in float32 torch: [rows, out_features], or the SwiGLU of it."""
    y = x.float() @ unpack(weight).t()
    return apply_swiglu(y) if weight.swiglu else y


@functools.cache
def _kernel(tiles: int, warps: int, eights: int, planes: int, swiglu: bool, overlap: bool, device: int) -> Any:
    settings = {
        "TILES": tiles,
        "WARPS": warps,
        "EIGHTS": eights,
        "PLANES": planes,
        "SWIGLU": int(swiglu),
        "OVERLAP": int(overlap),
    }
    return compile_cuda(["few_rows.cu", "int4_words.cu", "int4.cu"], settings, "int4_linear", device)


@functools.cache
def _wide_kernel(tiles: int, warps: int, eights: int, swiglu: bool, overlap: bool, device: int) -> Any:
    settings = {"TILES": tiles, "WARPS": warps, "EIGHTS": eights, "SWIGLU": int(swiglu), "OVERLAP": int(overlap)}
    sources = ["few_rows.cu", "int4_words.cu", "int4_wide.cu"]
    return compile_cuda(sources, settings | WIDE_SETTINGS[warps], "int4_wide", device, "90a")


@functools.cache
def _has_warp_groups(device: int) -> bool:
    """Whether the device has ``wgmma``, which compute capability 9.0 alone has."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def wide_blocks(rows: int) -> tuple[int, int]:
    """Eights of rows per block of ``int4_wide.cu``, and such blocks side by side."""
    pieces = -(-rows // (8 * WIDE_EIGHTS[-1]))
    return next(eights for eights in WIDE_EIGHTS if 8 * eights * pieces >= rows), pieces


def unavailable() -> str | None:
    """Why the kernel cannot run here, in a few words; None if it can."""
    return problem(lambda: _kernel(4, WARPS, 1, 1, False, False, torch.cuda.current_device()))


def splits_for(weight: PackedInt4, multiprocessors: int) -> int:
    """Slices of the inputs that give every multiprocessor a few blocks to overlap loads with."""
    blocks, groups = weight.words.shape[:2]
    if weight.swiglu:
        return 1  # the activation needs the whole sum
    return max(1, min(-(-3 * multiprocessors // blocks), groups // WARPS))


def linear(weight: PackedInt4, x: Tensor, out: Tensor, *, splits: int = 1, warps: int = WARPS) -> None:
    """Run the kernel; inside :func:`subspec.kernels.launch.overlapping` its launch overlaps.

    Args:
        x: bfloat16 [rows, in_features], contiguous.
        out: float32 [splits, rows, padded], to be added over the splits by the reader; with SwiGLU bfloat16
            [rows, padded / 2] and ``splits`` 1.
        warps: of a block, 4 or 8, which share the groups of its slice.
    """
    rows, (blocks, groups) = x.shape[0], weight.words.shape[:2]
    device, overlap = x.device.index or 0, launch.is_overlapping()
    args = [weight.words, weight.meta, x, out, rows, weight.padded, groups, -(-groups // splits)]
    if rows >= WIDE_FROM and weight.planes == 1 and _has_warp_groups(device):
        eights, pieces = wide_blocks(rows)
        wide = _wide_kernel(weight.tiles, warps, eights, weight.swiglu, overlap, device)
        launch.launch(wide, (-(-weight.padded // (16 * warps)), splits, pieces), warps * 32, args)
        return
    eights, pieces = eights_of(rows)
    kernel = _kernel(weight.tiles, warps, eights, weight.planes, weight.swiglu, overlap, device)
    launch.launch(kernel, (blocks, splits, pieces), warps * 32, args)
