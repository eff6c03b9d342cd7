"""Exact weights from their code and the packed substitute on the device: the CUDA decoder's launches.

The substitute is read where the draft's kernels have it, in their order; so only kernels of ours whose order is known
here can serve (:data:`KERNELS`). HIGGS is dequantized first, into the place of the exact weight
(:mod:`subspec.codec.codebook_dequantize`). On a CPU the torch decoder stands in.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subspec.codec.codebook_dequantize import Dequantizer, Rotated
from subspec.codec.format import CHUNK, Coded, decode
from subspec.kernels import int4, wq
from subspec.kernels.compile import compile_cuda
from subspec.kernels.grouped_launch import PartLaunch, float_bits
from subspec.quant.codebook_linear import MmaLut
from subspec.quant.intervals import reach_factor
from subspec.quant.level_linear import LevelLinear, MmaInt4, TritonWq
from subspec.quant.quantized_weight import Codes, QuantizedWeight
from subspec.utils.rounding import round_up

KERNELS = (MmaInt4.kind, TritonWq.kind, MmaLut.kind)
"""Kernels of the draft whose packed weights the decoder reads."""

THREADS = 128
"""Of a block, each of which decodes a chunk."""

FIELDS = 16
"""64-bit numbers that say all about one Linear: ``Part`` in ``codec.cu``."""


@dataclass(frozen=True)
class Layout:
    """Which of the decoders reads a substitute.

    Attributes:
        number: ``LAYOUT`` of ``codec.cu``.
        bits: of the substitute, where the decoder is compiled for them; else 0.
    """

    number: int
    bits: int = 0

    @property
    def sources(self) -> list[str]:
        """Files that are compiled as one."""
        return ["codec.cu", "codec_staged.cu"] if self.number in (1, 4) else ["codec.cu"]

    @property
    def macros(self) -> dict[str, int]:
        """What these files expect."""
        return {"LAYOUT": self.number, "WIDTH": self.bits}


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
        starts, stream: first byte, a multiple of 4, and number of int32 words of :class:`~subspec.codec.format.Coded`.
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
        margin: see :class:`~subspec.codec.format.Coded`.
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


class PieceRestorer:
    """Decodes several Linears whose code lies in one run of bytes, in one launch per order of the substitute.

    Args:
        pieces: on one device.

    Raises:
        TypeError: the order of a Linear's kernel is not known here.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self._dequantize: Dequantizer | None = None
        self._launches: list[PartLaunch] = []
        device = pieces[0].out.device if pieces else torch.device("cpu")
        if device.type != "cuda":
            return
        rotated = [
            Rotated(piece.out, piece.linear, piece.rows.first, piece.rows.interleaved)
            for piece in pieces
            if isinstance(piece.linear, MmaLut)
        ]
        self._dequantize = Dequantizer(rotated)
        parts: dict[Layout, list[tuple[list[int], int]]] = {}
        # The large ones first: what is left at the end is short.
        for piece in sorted(pieces, key=lambda piece: -piece.out.numel()):
            layout, fields = describe(piece)
            parts.setdefault(layout, []).append((fields, blocks_of(layout, piece.out)))
        self._launches = [
            PartLaunch(_kernel(layout, device.index or 0), members, THREADS, device)
            for layout, members in parts.items()
        ]

    def __call__(self, flat: Tensor) -> None:
        """Write every piece's weight from ``flat`` (uint8, 4-byte aligned, on the pieces' device)."""
        if self._dequantize is not None:
            self._dequantize()
        for launch in self._launches:
            launch(flat)
        if flat.is_cuda:
            return
        for piece in self.pieces:
            codes = substitute_codes(piece.linear, piece.rows, piece.out.shape[0])
            piece.out.copy_(decode(Coded(*piece.spans.on(flat), piece.out.shape, piece.margin), codes))


def decode_into(out: Tensor, coded: Coded, linear: LevelLinear, rows: Rows) -> None:
    """Write one exact weight; arguments as in :class:`Piece`."""
    starts, stream = coded.starts.numel(), coded.stream.numel()
    flat = torch.cat([coded.starts, coded.stream]).view(torch.uint8)
    PieceRestorer([Piece(out, linear, rows, Spans((0, starts), (4 * starts, stream)), coded.margin)])(flat)


def blocks_of(layout: Layout, out: Tensor) -> int:
    """Blocks of threads that decode a weight ``out`` [n, k]."""
    threads = -(-out.numel() // CHUNK)
    if layout.number == 4:  # the chunks of a warp lie apart: ``chunk_of`` in ``codec_staged.cu``
        columns = out.shape[1]
        threads = round_up(threads, 32 * (columns // math.gcd(columns, CHUNK)))
    return -(-threads // THREADS)


def describe(piece: Piece) -> tuple[Layout, list[int]]:
    """The layout of a piece's substitute, and all fields of ``Part`` but the last one."""
    linear, out, reach = piece.linear, piece.out, 0.5 + piece.margin
    if isinstance(linear, MmaInt4):
        layout, packed = Layout(1), linear.weight
        sources = [packed.words.data_ptr(), 0, packed.meta.data_ptr()]
        form = [0, packed.tiles, 4, int4.GROUP]
    elif isinstance(linear, TritonWq):
        weight = linear.weight
        whole = weight.in_features % 64 == 0 and weight.group % 4 == 0
        layout = Layout(4, weight.bits) if whole else Layout(2)
        sources = [weight.words.data_ptr(), weight.high.data_ptr(), weight.meta.data_ptr()]
        form = [weight.out_features, 0, weight.bits, weight.group]
    elif isinstance(linear, MmaLut):
        layout, look_up, rotation = Layout(3), linear.weight, linear.rotation
        sources = [0, 0, look_up.scale.data_ptr()]
        form = [rotation.block, look_up.tiles, look_up.bits, rotation.padded // look_up.scale.shape[1]]
        reach = reach_factor(piece.margin, rotation.block)
    else:
        raise _unknown(linear)
    place = [piece.rows.first, int(piece.rows.interleaved), float_bits(reach)]
    spans = [piece.spans.starts[0], piece.spans.stream[0]]
    return layout, [*spans, *sources, out.data_ptr(), out.numel(), out.shape[1], *form, *place]


def _unknown(linear: LevelLinear) -> TypeError:
    return TypeError(f"the decoder does not know the order of {linear.kind}'s weights")


@functools.cache
def _kernel(layout: Layout, device: int) -> Any:
    return compile_cuda(layout.sources, layout.macros, "codec_decode", device)
