"""Exact weights from their code and the packed substitute on the device: the CUDA decoder's launches.

The substitute is read where the draft's kernels have it, in their order; so only kernels of ours whose order is known
here can serve (:data:`KERNELS`). HIGGS is dequantized first, into the place of the exact weight
(:mod:`subspec.kernels.lut_dequantize`). On a CPU the torch decoder stands in.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import int4, wq
from subspec.kernels.compile import compile_cuda
from subspec.kernels.lut import MmaLut
from subspec.kernels.lut_dequantize import Dequantizer, Rotated
from subspec.kernels.ops import LevelLinear, MmaInt4, TritonWq
from subspec.offload.codec import CHUNK, Coded, decode
from subspec.offload.intervals import reach_factor
from subspec.quant.codes import Codes, QuantizedWeight

KERNELS = (MmaInt4.kind, TritonWq.kind, MmaLut.kind)
"""Kernels of the draft whose packed weights the decoder reads."""

THREADS = 128
"""Of a block, each of which decodes a chunk."""

DIRECT, FEWER, STAGED = "direct", "direct, fewer threads", "staged"
"""Ways to decode beside :class:`~subspec.kernels.ops.MmaInt4`. A thread reads and writes cache lines of its own from
one end to the other, so with many threads the caches hold no line until its end is reached: ``codec.cu``, the same
with fewer threads at a time, or ``codec_staged.cu``'s detour by shared memory. Which is the fastest depends on the
device: a process times all of them on the first large weight."""

RESERVED = 36 << 10
"""Bytes of shared memory that keep other blocks away: five of them share a Hopper multiprocessor, not twelve."""

TELLING = 1 << 24
"""Weights at least of a Linear that the ways are timed with."""

FIELDS = 16
"""64-bit numbers that say all about one Linear: ``Part`` in ``codec.cu``."""


@dataclass(frozen=True)
class Rows:
    """Which rows of a fused Linear are a Linear's own.

    Attributes:
        first: the first of them.
        interleaved: they alternate 16 by 16 with another Linear's (gate and up).
    """

    first: int
    interleaved: bool

    def select(self, fused: Tensor, count: int) -> Tensor:
        """Rows [count, ...] of ``fused`` [n, ...]."""
        if not self.interleaved:
            return fused[self.first : self.first + count]
        return fused.unflatten(0, (-1, 2, 16))[:, self.first // 16].flatten(0, 1)[:count]


@dataclass(frozen=True)
class Spans:
    """Where the code of a Linear lies in a run of bytes.

    Attributes:
        starts, stream: first byte, a multiple of 4, and number of int32 words of :class:`~subspec.offload.codec.Coded`.
    """

    starts: tuple[int, int]
    stream: tuple[int, int]

    def on(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Starts and stream, as views into ``flat`` (uint8)."""
        starts, stream = (
            flat[first : first + 4 * words].view(torch.int32) for first, words in (self.starts, self.stream)
        )
        return starts, stream


@dataclass(frozen=True)
class Piece:
    """A Linear that is decoded together with others.

    Attributes:
        out: what is written: bfloat16 [n, k], contiguous, 16-byte aligned.
        linear: the substitute's fused Linear.
        rows: which of its rows belong to this weight.
        spans: of the code.
        margin: see :class:`~subspec.offload.codec.Coded`.
    """

    out: Tensor
    linear: LevelLinear
    rows: Rows
    spans: Spans
    margin: float


def substitute_codes(linear: LevelLinear, rows: Rows, count: int) -> QuantizedWeight:
    """A Linear's own codes, from the packed weight of the fused one.

    Raises:
        TypeError: the kernel's order is not known here.
    """
    if isinstance(linear, MmaLut):
        codes = linear.codes
        pairs, scale = (rows.select(part, count).contiguous() for part in (codes.pairs, codes.scale))
        return replace(codes, pairs=pairs, scale=scale)
    if isinstance(linear, MmaInt4):
        q, scale, zero = int4.unpack_codes(linear.weight)
        group, bits = int4.GROUP, 4
    elif isinstance(linear, TritonWq):
        q, scale, zero = wq.unpack_codes(linear.weight)
        group, bits = linear.weight.group, linear.weight.bits
    else:
        raise _unknown(linear)
    q, scale, zero = (rows.select(part, count).contiguous() for part in (q, scale, zero))
    return Codes(q, scale, zero, group, bits)


class PieceDecoder:
    """Decodes several Linears whose code lies in one run of bytes, in one launch per order of the substitute.

    Args:
        pieces: on one device.
        way: of :data:`DIRECT`, :data:`FEWER` and :data:`STAGED`; None: the fastest, as far as that is known.

    Raises:
        TypeError: the order of a Linear's kernel is not known here.
    """

    def __init__(self, pieces: Sequence[Piece], way: str | None = None) -> None:
        self.pieces = pieces
        self._dequantize: Dequantizer | None = None
        self._launches: list[tuple[Any, Tensor, dict[str, Any], int]] = []
        device = pieces[0].out.device if pieces else torch.device("cpu")
        if device.type != "cuda":
            return
        rotated = [
            Rotated(piece.out, piece.linear, piece.rows.first, piece.rows.interleaved)
            for piece in pieces
            if isinstance(piece.linear, MmaLut)
        ]
        self._dequantize = Dequantizer(rotated)
        parts: dict[int, list[list[int]]] = {}
        blocks: dict[int, int] = {}
        # The large ones first: what is left at the end is short.
        for piece in sorted(pieces, key=lambda piece: -piece.out.numel()):
            layout, fields = describe(piece)
            first = blocks.get(layout, 0)
            blocks[layout] = first + -(-piece.out.numel() // (CHUNK * THREADS))
            parts.setdefault(layout, []).append([*fields, first])
        for layout, rows in parts.items():
            table = torch.tensor(rows, dtype=torch.int64, device=device)
            shape = {"grid": (blocks[layout], 1, 1), "block": (THREADS, 1, 1)}
            kernel = _kernel(
                layout, (way or decoding_way(device)) if layout == 1 else DIRECT, device.index or 0
            )
            self._launches.append((kernel, table, shape, len(rows)))

    def __call__(self, flat: Tensor) -> None:
        """Write every piece's weight from ``flat`` (uint8, 4-byte aligned, on the pieces' device)."""
        if self._dequantize is not None:
            self._dequantize()
        for kernel, table, shape, count in self._launches:
            kernel(**shape, args=[table, flat, count])
        if flat.is_cuda:
            return
        for piece in self.pieces:
            codes = substitute_codes(piece.linear, piece.rows, piece.out.shape[0])
            piece.out.copy_(decode(Coded(*piece.spans.on(flat), piece.out.shape, piece.margin), codes))


def decode_into(out: Tensor, coded: Coded, linear: LevelLinear, rows: Rows) -> None:
    """Write one exact weight; arguments as in :class:`Piece`."""
    starts, stream = coded.starts.numel(), coded.stream.numel()
    flat = torch.cat([coded.starts, coded.stream]).view(torch.uint8)
    piece = Piece(out, linear, rows, Spans((0, starts), (4 * starts, stream)), coded.margin)
    time_ways(piece, flat)
    PieceDecoder([piece])(flat)


_times: dict[int, dict[str, float]] = {}
"""Milliseconds by way, by device number."""


def decoding_way(device: torch.device) -> str:
    """The fastest way of those that were timed on a device."""
    times = _times.get(device.index or 0)
    return DIRECT if not times else min(times, key=times.__getitem__)


def way_facts(device: torch.device) -> dict[str, Any] | None:
    """The way and the milliseconds it was chosen by, for a run's facts; None: nothing was timed."""
    times = _times.get(device.index or 0)
    return None if times is None else {"way": decoding_way(device), "milliseconds": times}


def time_ways(piece: Piece, flat: Tensor) -> None:
    """Decode a weight by every way and remember how long each took, once per device of a process.

    Does nothing where there is nothing to choose, and with weights of less than :data:`TELLING`.
    """
    device = piece.out.device.index or 0
    if not (piece.out.is_cuda and isinstance(piece.linear, MmaInt4) and piece.out.numel() >= TELLING):
        return
    if device in _times:
        return
    times = {}
    for way in (DIRECT, FEWER, STAGED):
        decoder = PieceDecoder([piece], way)
        times[way] = milliseconds(lambda: decoder(flat))  # noqa: B023 (called at once)
    _times[device] = times


def milliseconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Of a call, at best, on the current stream."""
    call()
    best = float("inf")
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


def describe(piece: Piece) -> tuple[int, list[int]]:
    """The layout of a piece's substitute, and all fields of ``Part`` but the last one."""
    linear, out, reach = piece.linear, piece.out, 0.5 + piece.margin
    if isinstance(linear, MmaInt4):
        layout, packed = 1, linear.weight
        sources = [packed.words.data_ptr(), 0, packed.meta.data_ptr()]
        form = [0, packed.tiles, 4, int4.GROUP]
    elif isinstance(linear, TritonWq):
        layout, weight = 2, linear.weight
        sources = [weight.words.data_ptr(), weight.high.data_ptr(), weight.meta.data_ptr()]
        form = [weight.out_features, 0, weight.bits, weight.group]
    elif isinstance(linear, MmaLut):
        layout, look_up, rotation = 3, linear.weight, linear.rotation
        sources = [0, 0, look_up.scale.data_ptr()]
        form = [rotation.block, look_up.tiles, look_up.bits, rotation.padded // look_up.scale.shape[1]]
        reach = reach_factor(piece.margin, rotation.block)
    else:
        raise _unknown(linear)
    (half,) = struct.unpack("<I", struct.pack("<f", reach))
    place = [piece.rows.first, int(piece.rows.interleaved), half]
    spans = [piece.spans.starts[0], piece.spans.stream[0]]
    return layout, [*spans, *sources, out.data_ptr(), out.numel(), out.shape[1], *form, *place]


def _unknown(linear: LevelLinear) -> TypeError:
    return TypeError(f"the decoder does not know the order of {linear.kind}'s weights")


@functools.cache
def _kernel(layout: int, staged: bool, device: int) -> Any:
    if staged:
        return compile_cuda(
            ["codec.cu", "codec_staged.cu"], {"LAYOUT": layout}, "codec_decode_staged", device
        )
    return compile_cuda(["codec.cu"], {"LAYOUT": layout}, "codec_decode", device)
