"""Where an exact weight lies, given its substitute: the intervals that :mod:`subspec.codec.format` codes within.

Two kinds, of which the decoder on the device has to repeat every bit; so both are single rounded float32 operations in
a fixed order.

- **Integers with a scale and a zero** (HQQ) name a bucket, ``[(q - z - 1/2) s, (q - z + 1/2) s]``, widened a little
  where scale and zero were rounded afterwards. The weights are spread evenly over it.
- **Grid points of a rotated weight** (HIGGS) name a value. What is missing is no bucket any more: rotating back mixes
  the errors of a whole block, and what comes out is Gaussian about the dequantized weight, with the grid's own root
  mean square error times the scales. The interval is :data:`REACH` of these deviations to either side of the
  dequantized weight, rounded to bfloat16. Wider ones cost bits for every weight, narrower ones more escapes; between
  2.5 and 2.9 the sum hardly changes (``experiments/codec``). Where a block has several scales their mean counts: after
  the rotation they differ little.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from subspec.quant.hadamard import LEAST_BLOCK
from subspec.quant.higgs_weight import HiggsCodes
from subspec.quant.quantized_weight import Codes, QuantizedWeight

REACH = 2.7
"""Standard deviations to either side of a rotated weight's dequantized value: 0.6 to 0.7 % of weights lie outside."""


class Intervals(Protocol):
    """Intervals of a weight matrix.

    Attributes:
        centred: whether weights crowd in the middle of their intervals; they are spread evenly otherwise.
    """

    centred: bool

    def between(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Ends of the intervals of weights ``begin .. end`` in row-major order: two of float32 [end - begin]."""


@dataclass(frozen=True)
class BucketIntervals:
    """Of integers with a scale and a zero."""

    codes: Codes
    margin: float
    centred = False

    def between(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """See :class:`Intervals`."""
        codes, half = self.codes, 0.5 + self.margin
        group = torch.arange(begin, end, device=codes.q.device) // codes.group_size
        scale, zero = codes.scale.flatten()[group], codes.zero.flatten()[group]
        centre = codes.q.flatten()[begin:end].float() - zero
        return (centre - half) * scale, (centre + half) * scale


@dataclass(frozen=True)
class GaussianIntervals:
    """Of grid points of a rotated weight."""

    codes: HiggsCodes
    margin: float
    centred = True

    def between(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """See :class:`Intervals`."""
        columns = self.codes.rotation.in_features
        first, last = begin // columns, -(-end // columns)
        rows = replace(self.codes, pairs=self.codes.pairs[first:last], scale=self.codes.scale[first:last])
        block = rows.rotation.block
        reach = block_sums(rows) * reach_factor(self.margin, block)
        reach = reach.repeat_interleave(block, dim=1)[:, :columns]
        own = slice(begin - first * columns, end - first * columns)
        weight, reach = rebuild(rows).float().flatten()[own], reach.flatten()[own]
        return weight - reach, weight + reach


def rebuild(codes: HiggsCodes) -> Tensor:
    """The dequantized weight, rotated back, with the same bits everywhere: bfloat16 [n, in_features]."""
    return codes.rotation.inverse_in_order(codes.rotated()).to(torch.bfloat16)


def block_sums(codes: HiggsCodes) -> Tensor:
    """Scales of the rotation's blocks, each counted for every 64 weights of a block: float32 [n, blocks]."""
    scale = codes.scale.float().repeat_interleave(codes.group_size // LEAST_BLOCK, dim=1)
    parts = scale.unflatten(1, (-1, codes.rotation.block // LEAST_BLOCK)).unbind(-1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def reach_factor(margin: float, block: int) -> float:
    """What :func:`block_sums` are multiplied with, in float32."""
    return margin / (block // LEAST_BLOCK)


def margin_for(bits: int) -> float:
    """Widening of a bucket, in scales, for a quantizer of that many bits.

    Scale and zero are rounded to float16 after the codes were chosen, which moves a level by up to about ``2**bits``
    half-precision roundings of a scale. On Gaussian weights 99.9 % lie within 0.5 scales of their level at 4 bits, and
    within 0.544 at 8.
    """
    return 2.0 ** (bits - 12)


def margin_of(codes: QuantizedWeight) -> float:
    """The margin to code a weight with, in scales: of a bucket its widening, of a grid's point how far it reaches.

    Raises:
        TypeError: codes of a kind that names no intervals.
    """
    if isinstance(codes, Codes):
        return margin_for(codes.bits)
    if isinstance(codes, HiggsCodes):
        return REACH * codes.grid.mse**0.5
    raise _unknown(codes)


def intervals_of(codes: QuantizedWeight, margin: float) -> Intervals:
    """The intervals that codes name.

    Raises:
        TypeError: codes of a kind that names none.
    """
    if isinstance(codes, Codes):
        return BucketIntervals(codes, margin)
    if isinstance(codes, HiggsCodes):
        return GaussianIntervals(codes, margin)
    raise _unknown(codes)


def _unknown(codes: QuantizedWeight) -> TypeError:
    return TypeError(f"{type(codes).__name__} names no intervals to code exact weights in")
