"""The exact LM head, coded by the draft's quantized one: resident on the device, and restored slice by slice.

A draft with an LM head of its own (:func:`~subspec.codec.coding.draft_head`) drafts faster, but the exact head would
take device memory beside it for one product per target pass. It is one more coded matrix instead, cut into slices of
rows (:class:`~subspec.codec.coded_layer.CodedPart`) that fit the buffer of :class:`~subspec.codec.coded_layer.
LayerRestorer`. A slice is restored there, the hidden states are multiplied with it, and the products are columns of the
logits. In batch-invariant arithmetic these have the bits of the product with the whole head; the device's library may
take another kernel for a slice, and differ in the last bit. The code is not kept on disk: making it takes a fraction of
a second.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.codec.coded_layer import CodedPart, Encoder, bits_per_weight
from subspec.codec.restore import Restorer, Rows
from subspec.decoding.bitwise import BitwiseArithmetic
from subspec.quant.level_linear import LevelLinear
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.utils.rounding import equal_slices

ROW_MULTIPLE = 32
"""Rows of a slice, but for the last one: products and their logits begin at multiples of 64 bytes."""

ITEMSIZE = 2
"""Bytes of an exact weight: only bfloat16 is coded."""


@dataclass(frozen=True)
class HeadCode:
    """A coded LM head: slices of rows, ascending, that together are all rows, and their code, uint8 on the device."""

    parts: tuple[CodedPart, ...]
    flat: Tensor

    @property
    def nbytes(self) -> int:
        """Device bytes."""
        return self.flat.numel()

    @property
    def bits_per_weight(self) -> float:
        """See :func:`~subspec.codec.coded_layer.bits_per_weight`."""
        return bits_per_weight(self.parts)


def slice_rows(vocabulary: int, hidden: int, room: int) -> list[tuple[int, int]]:
    """First row and number of rows of every slice: as few and as equal slices as fit ``room`` bytes when restored.

    Raises:
        ValueError: not even :data:`ROW_MULTIPLE` rows fit.
    """
    most = room // (ITEMSIZE * hidden)
    if most < ROW_MULTIPLE:
        raise ValueError(f"{ROW_MULTIPLE} rows of {hidden} weights do not fit into {room} bytes")
    return equal_slices(vocabulary, most, ROW_MULTIPLE)


def encode_head(weight: Tensor, codes: QuantizedWeight, substitute: LevelLinear, room: int) -> HeadCode:
    """Code the exact head with :class:`~subspec.codec.coded_layer.Encoder`, whose errors it raises.

    Args:
        weight: bfloat16 [vocabulary, hidden]; may be freed afterwards.
        codes: of the draft's head.
        substitute: the draft's head, made of these codes.
        room: bytes of the buffer that slices will be restored into.
    """
    encoder = Encoder()
    for first, count in slice_rows(*weight.shape, room):
        rows, own = weight[first : first + count], codes.rows(first, count)
        encoder.add("lm_head.weight", "head", Rows(first, False), rows, own, substitute)
    return HeadCode(encoder.parts, encoder.flat(weight.device))


class CodedHead:
    """Multiplies with a coded LM head.

    Args:
        substitute: the draft's head that ``code`` was made with.
        buffer: uint8, what slices are restored into; layers are, too. This is safe: a pass restores the head after its
            last layer was computed and before the next pass restores its first one, all of it on the current stream.
            What runs ahead on other streams fills ring slots and drafts, and does not touch the buffer.
    """

    def __init__(self, code: HeadCode, substitute: LevelLinear, buffer: Tensor) -> None:
        self.code = code
        self._weights = [
            buffer[: ITEMSIZE * part.shape.numel()].view(torch.bfloat16).view(part.shape) for part in code.parts
        ]
        self._restorers = [
            Restorer([part.piece(weight, substitute)]) for part, weight in zip(code.parts, self._weights, strict=True)
        ]

    def restore(self, number: int) -> Tensor:
        """Rows of slice ``number``, bfloat16 [count, hidden]: a view of the buffer, valid until it is written again."""
        self._restorers[number](self.code.flat)
        return self._weights[number]

    def logits(self, hidden: Tensor, bitwise: BitwiseArithmetic | None = None) -> Tensor:
        """The LM head: bfloat16 [n, hidden] -> [n, vocabulary], by ``bitwise`` or by the device's library."""
        vocabulary = sum(part.shape[0] for part in self.code.parts)
        logits = torch.empty(hidden.shape[0], vocabulary, dtype=hidden.dtype, device=hidden.device)
        for number, part in enumerate(self.code.parts):
            first, count = part.rows.first, part.shape[0]
            own = logits[:, first : first + count]
            if bitwise is None:
                torch.mm(hidden, self.restore(number).t(), out=own)
            else:
                bitwise.linear("head", hidden, self.restore(number), own)
        return logits
