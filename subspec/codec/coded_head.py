"""The exact LM head, coded by the draft's quantized one: on the device all the time, and decoded slice by slice.

A draft with an LM head of its own (``quant.modules=[attention,mlp,lm_head]``) drafts faster, but beside it the exact
head would lie on the device too, for one product per target pass. What the draft's head names of it need not be
there twice, just as for the layers (:mod:`subspec.codec.format`): so the exact head is coded given the draft's.

It is decoded in slices of rows into the buffer that layers are decoded into (:class:`LayerRestorer`), each slice is
multiplied with, and the products are columns of one tensor of logits. In batch-invariant arithmetic they have the bits
of the product with the whole head; the device's library may take another kernel for a slice, and differ in the last
bit. Nothing of it is kept on disk: coding it takes a fraction of a second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.codec.coded_layer import CodeRun, encode_proven
from subspec.codec.restore import Piece, PieceRestorer, Rows, Spans
from subspec.decoding.bitwise import BitwiseArithmetic
from subspec.quant.level_linear import LevelLinear
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.utils.rounding import round_up

ROW_MULTIPLE = 32
"""Rows of a slice, but for the last one: products and their logits begin at multiples of 64 bytes."""

ITEMSIZE = 2
"""Bytes of an exact weight: only bfloat16 is coded."""


@dataclass(frozen=True)
class HeadSlice:
    """Some rows of the head that follow each other.

    Attributes:
        first, count: which.
        spans: where their code lies in the head's bytes.
        margin: see :class:`~subspec.codec.format.Coded`.
    """

    first: int
    count: int
    spans: Spans
    margin: float


@dataclass(frozen=True)
class HeadCode:
    """A coded LM head.

    Attributes:
        slices: all rows, ascending.
        shape: vocabulary and hidden size.
        flat: the code, uint8 on the device.
    """

    slices: tuple[HeadSlice, ...]
    shape: tuple[int, int]
    flat: Tensor

    @property
    def nbytes(self) -> int:
        """Device bytes of the code."""
        return self.flat.numel()

    @property
    def bits_per_weight(self) -> float:
        """Bits that an exact weight takes."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def slice_rows(vocabulary: int, hidden: int, room: int) -> list[tuple[int, int]]:
    """First row and number of rows of every slice: as few and as equal ones as fit ``room`` bytes when decoded.

    Raises:
        ValueError: not even :data:`ROW_MULTIPLE` rows fit.
    """
    most = room // (ITEMSIZE * hidden) // ROW_MULTIPLE * ROW_MULTIPLE
    if most == 0:
        raise ValueError(f"{ROW_MULTIPLE} rows of {hidden} weights do not fit into {room} bytes")
    slices = -(-vocabulary // most)
    rows = round_up(-(-vocabulary // slices), ROW_MULTIPLE)
    return [(first, min(rows, vocabulary - first)) for first in range(0, vocabulary, rows)]


def encode_head(weight: Tensor, codes: QuantizedWeight, substitute: LevelLinear, room: int) -> HeadCode:
    """Code the exact head, and prove it: every slice is decoded again and compared bit by bit.

    Args:
        weight: bfloat16 [vocabulary, hidden]; may be forgotten afterwards.
        codes: of the draft's head.
        substitute: the draft's head, made of these codes.
        room: bytes of the buffer that slices will be decoded into.

    Raises:
        SubspecError: what was decoded is not what was coded (a defect of this device or its software).
    """
    vocabulary, hidden = weight.shape
    run, slices = CodeRun(), []
    for first, count in slice_rows(vocabulary, hidden, room):
        part, own = weight[first : first + count], codes.rows(first, count)
        coded = encode_proven("lm_head.weight", part, own, substitute, Rows(first, False))
        slices.append(HeadSlice(first, count, run.add(coded), coded.margin))
    return HeadCode(tuple(slices), (vocabulary, hidden), run.flat(weight.device))


class CodedHead:
    """Multiplies with a coded LM head.

    Args:
        code: of the exact head.
        substitute: the draft's head that it was coded with.
        buffer: uint8, what slices are decoded into; layers are, too. That is safe because a pass decodes the head after
            its last layer was computed and before the next pass decodes its first one, all of it on the stream that is
            current: what runs ahead on other streams fills ring slots and drafts, and neither touches the buffer.
    """

    def __init__(self, code: HeadCode, substitute: LevelLinear, buffer: Tensor) -> None:
        self.code = code
        self._weights = [_view(buffer, part.count, code.shape[1]) for part in code.slices]
        self._decoders = [
            PieceRestorer([Piece(weight, substitute, Rows(part.first, False), part.spans, part.margin)])
            for part, weight in zip(code.slices, self._weights, strict=True)
        ]

    def decode(self, number: int) -> Tensor:
        """Rows of slice ``number``, bfloat16 [count, hidden]: a view of the buffer, good until it is written again."""
        self._decoders[number](self.code.flat)
        return self._weights[number]

    def logits(self, hidden: Tensor, bitwise: BitwiseArithmetic | None = None) -> Tensor:
        """The LM head: bfloat16 [n, hidden] -> [n, vocabulary], by ``bitwise`` or by the device's library."""
        logits = torch.empty(hidden.shape[0], self.code.shape[0], dtype=hidden.dtype, device=hidden.device)
        for number, part in enumerate(self.code.slices):
            own = logits[:, part.first : part.first + part.count]
            if bitwise is None:
                torch.mm(hidden, self.decode(number).t(), out=own)
            else:
                bitwise.linear("head", hidden, self.decode(number), own)
        return logits


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: ITEMSIZE * rows * columns].view(torch.bfloat16).view(rows, columns)
