"""The code of an exact bfloat16 weight, given the interval in which its quantized weight places it.

The quantized weight on the device bounds the exact one by a real interval
(:meth:`subspec.quant.quantized_weight.QuantizedWeight.interval`): for HQQ ``[(q - z - 1/2) s, (q - z + 1/2) s]``. The
code selects one of the interval's bfloat16 numbers. Within an interval the weights' density is nearly constant, so the
ideal code of a number takes ``log2(interval / spacing)`` bits, with the spacing of bfloat16 numbers *at that weight*:
they are dense near zero and wide apart at the ends. The code:

1. **Cell.** The interval is cut into cells as wide as the spacing at its larger end, ``g = 2**(E - 7)`` with
   ``2**E <= max(|low|, |high|) < 2**(E + 1)``; cells are numbered by ``floor(w / g)``, magnitude and sign apart, so
   every cell lies in one binade. The cell's number within the interval is written in a truncated binary code: ``k`` or
   ``k + 1`` bits for ``S`` symbols, ``k = floor(log2 S)``, within 0.09 bits of ``log2 S`` whatever ``S`` is. Symbols
   from ``2**k`` up share their first ``k`` bits with the symbol ``S - 2**k`` below them; one bit more tells the two
   apart. Symbols count from the first cell on; where weights crowd in the middle of their interval (HIGGS) they count
   from the middle one, to either side in turn, so that the shorter codes are there.
2. **Rest.** A cell ``j`` cells from zero holds ``2**(7 - floor(log2 j))`` bfloat16 numbers: mantissa bits that tell
   them apart follow.
3. **Escape.** One symbol more than there are cells says that the 16 bits follow as they are: for weights outside their
   interval, or inside the cells at zero without being zero, and for everything where there is no finite interval.

Widths depend on the interval and on the cell alone, so restoring needs no side information but the place where a
chunk of :data:`CHUNK` weights begins; chunks are restored in parallel. Every bit pattern survives, NaN payloads and
signed zeros included. Intervals come from single rounded float32 operations in a fixed order, so the same integers and
scales give the same intervals everywhere; restoring compares nothing with a tolerance.

Costs 6.9 to 7.0 bits per weight for HQQ at 4 bits in groups of 64 (``experiments/codec``), where the entropy of the
exact weight given the substitute is about 6.8; 7.3 to 7.4 for HIGGS at 4 bits, of 7.0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.errors import SubspecError
from subspec.quant.quantized_weight import QuantizedWeight

CHUNK = 512
"""Weights, in row-major order, that are restored one after the other."""

MOST_WEIGHTS = (1 << 31) - 1
"""Weights of a matrix: the launcher of the CUDA kernels passes 32-bit integers, and would truncate longer ones."""

RAW_BITS = 16

PADDING_WORDS = 20
"""Words behind a stream: the CUDA kernels read ahead, three words or, by way of shared memory, up to 19."""

BLOCK = 1 << 21
"""Weights that are encoded at a time; a multiple of :data:`CHUNK`. Bounds the temporaries to a quarter of a GiB."""

MIN_EXPONENT, MAX_EXPONENT = -110, 126
"""Exponents of an interval's larger end; beyond, cells or their numbers would leave float32's normal range."""


@dataclass(frozen=True)
class Coded:
    """A coded weight matrix.

    Attributes:
        starts: int32 [chunks], the word of ``stream`` at which each chunk begins.
        stream: int32 [words], bits from the least significant one upwards.
        shape: of the weight.
        margin: of the intervals, see :attr:`~subspec.quant.quantized_weight.QuantizedWeight.margin`.
    """

    starts: Tensor
    stream: Tensor
    shape: torch.Size
    margin: float


@dataclass(frozen=True)
class _Cells:
    """Properties of the intervals' cells: int32 tensors of one shape.

    Attributes:
        first: number of the interval's first cell.
        count: cells of the interval; 0 where everything is raw.
        exponent: E of the module's text.
        bits: k, the shorter code's length.
        extra: symbols from ``2**k`` up.
    """

    first: Tensor
    count: Tensor
    exponent: Tensor
    bits: Tensor
    extra: Tensor


def encode(weight: Tensor, quantized: QuantizedWeight, margin: float) -> Coded:
    """Code an exact weight.

    Args:
        weight: bfloat16 [n, k].
        quantized: of its substitute, with the same rows and columns.
        margin: see :attr:`~subspec.quant.quantized_weight.QuantizedWeight.margin`.

    Raises:
        TypeError: the weight is not bfloat16, or the quantized weight has no intervals.
        SubspecError: the weight has more elements than the CUDA kernels can number.
    """
    if weight.dtype is not torch.bfloat16:
        raise TypeError(f"only bfloat16 weights are coded, not {weight.dtype}")
    if weight.numel() > MOST_WEIGHTS:
        raise SubspecError(
            f"offload.codec=substitute: a Linear of {weight.numel()} weights, and at most {MOST_WEIGHTS} can be coded: "
            "set offload.codec=none"
        )
    flat = weight.contiguous().view(torch.int16).flatten()
    starts, streams, words = [], [], 0
    for begin in range(0, flat.numel(), BLOCK):
        end = min(begin + BLOCK, flat.numel())
        cells = _cells(*quantized.interval(begin, end, margin))
        value, length = _symbols(flat[begin:end], cells, quantized.centred)
        offsets, stream = _pack(value, length)
        starts.append(offsets + words)
        streams.append(stream)
        words += stream.numel()
    streams.append(torch.zeros(PADDING_WORDS, dtype=torch.int32, device=flat.device))
    return Coded(torch.cat(starts).to(torch.int32), torch.cat(streams), weight.shape, margin)


def restore(coded: Coded, quantized: QuantizedWeight) -> Tensor:
    """The exact weight, bfloat16; the reference of the CUDA kernels (``kernels/csrc/restore.cu``).

    Only the work that the next weight's place depends on is done one weight of every chunk at a time.
    """
    total, device = coded.shape.numel(), coded.stream.device
    chunks = coded.starts.numel()
    place = torch.arange(chunks * CHUNK, device=device).view(chunks, CHUNK).t().clamp_max(total - 1)
    low, high = quantized.interval(0, total, coded.margin)
    cells = _cells(low[place], high[place])
    stream = coded.stream.to(torch.int64) & 0xFFFFFFFF
    windows = stream[:-1] | (stream[1:] << 32)
    tops = _log2(torch.arange(1 << 10, device=device).clamp_min(1))
    at = coded.starts.to(torch.int64) * 32
    symbols, behind = torch.empty_like(cells.count), torch.empty_like(place)
    for step in range(min(CHUNK, total)):
        k, extra = cells.bits[step], cells.extra[step]
        window = windows[(at >> 5).clamp_max(windows.numel() - 1)] >> (at & 31)
        symbol = (window & ((1 << k) - 1)).to(torch.int32)
        longer = (symbol + extra) >> k  # 0 or 1
        symbol = symbol + longer * ((window >> k) & 1).to(torch.int32) * extra
        used = k + longer
        symbols[step], behind[step] = symbol, window >> used
        number = _numbers(symbol, cells.first[step], cells.count[step], quantized.centred)
        magnitude = torch.where(number < 0, -1 - number, number)
        rest = torch.where(magnitude > 0, 7 - tops[magnitude.clamp(0, 1023)], 0)
        at = at + used + torch.where(symbol == cells.count[step], RAW_BITS, rest)
    number = _numbers(symbols, cells.first, cells.count, quantized.centred)
    negative = number < 0
    magnitude = torch.where(negative, -1 - number, number).clamp_max(1023)
    top = tops[magnitude]
    rest = torch.where(magnitude > 0, 7 - top, 0).clamp_min(0)
    mantissa = ((magnitude << rest) | (behind & ((1 << rest) - 1))) & 127
    bits = ((top + cells.exponent - 7 + 127) << 7) | mantissa
    bits = torch.where(magnitude > 0, bits, 0) | (negative.to(torch.int64) << 15)
    bits = torch.where(symbols == cells.count, behind & 0xFFFF, bits)
    flat = bits.to(torch.int32).to(torch.int16).t().flatten()[:total]
    return flat.view(torch.bfloat16).view(coded.shape)


def _cells(low: Tensor, high: Tensor) -> _Cells:
    """Cells of the intervals with these ends, float32 of one shape."""
    larger = torch.maximum(low.abs(), high.abs())
    exponent = (larger.view(torch.int32) >> 23) - 127
    usable = (low < high) & (exponent >= MIN_EXPONENT) & (exponent <= MAX_EXPONENT)
    exponent = torch.where(usable, exponent, 0)
    per_cell = ((7 + 127 - exponent) << 23).view(torch.float32)
    first = torch.where(usable, torch.floor(low * per_cell), 0.0).to(torch.int32)
    last = torch.where(usable, torch.floor(high * per_cell), -1.0).to(torch.int32)
    count = last - first + 1
    bits = _log2(count + 1).to(torch.int32)
    return _Cells(first, count, exponent, bits, count + 1 - (1 << bits))


def _numbers(symbol: Tensor, first: Tensor, count: Tensor, centred: bool) -> Tensor:
    """Numbers of the cells that symbols stand for."""
    if not centred:
        return first + symbol
    return first + (count >> 1) + ((symbol >> 1) ^ -(symbol & 1))


def _symbols(words: Tensor, cells: _Cells, centred: bool) -> tuple[Tensor, Tensor]:
    """Code (int64, first bit lowest) and length in bits of every weight; ``words`` int16 are the weights' bits."""
    raw = words.to(torch.int32) & 0xFFFF
    size, negative = raw & 0x7FFF, raw >> 15 == 1
    field = size >> 7
    mantissa = (size & 127) | 128
    # Cells from zero: the magnitude in units of g, whose exponent is E - 7. Denormals are below every cell but zero's.
    shift = cells.exponent + 127 - field
    number = torch.where(
        (shift >= 0) & (shift <= 7) & (field > 0), mantissa >> shift.clamp(0, 7), torch.zeros_like(mantissa)
    )
    found = (number > 0) | (size == 0)
    signed = torch.where(negative, -1 - number, number)
    symbol = signed - cells.first
    found &= (symbol >= 0) & (symbol < cells.count)
    if centred:
        aside = symbol - (cells.count >> 1)
        symbol = torch.where(aside < 0, -2 * aside - 1, 2 * aside)
    symbol = torch.where(found, symbol, cells.count)
    upper = symbol >> cells.bits  # 1: from 2**k up
    shared = symbol - upper * cells.extra
    longer = (shared + cells.extra) >> cells.bits
    value = (shared | upper << cells.bits).to(torch.int64)
    length = cells.bits + longer
    rest = torch.where(number > 0, shift, 0)
    behind = torch.where(found, size & ((1 << rest) - 1), raw)
    value |= behind.to(torch.int64) << length
    return value, length + torch.where(found, rest, RAW_BITS)


def _pack(value: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Codes one behind the other, every chunk from a new word: (first word of each chunk, int32 words)."""
    count = value.numel()
    chunks = -(-count // CHUNK)
    lengths = torch.nn.functional.pad(length, (0, chunks * CHUNK - count)).view(chunks, CHUNK).to(torch.int64)
    ends = lengths.cumsum(1)
    words = (ends[:, -1] + 31) >> 5
    starts = words.cumsum(0) - words
    at = ((ends - lengths) + (starts << 5)[:, None]).flatten()[:count]
    total = int(words.sum())
    stream = torch.zeros(total + 2, dtype=torch.int64, device=value.device)
    # A code has at most 26 bits and begins at any of 32, so it touches two words; bits are disjoint, sums are unions.
    placed = value << (at & 31)
    stream.index_add_(0, at >> 5, placed & 0xFFFFFFFF)
    stream.index_add_(0, (at >> 5) + 1, placed >> 32)
    stream = stream[:total]
    return starts, torch.where(stream >= 1 << 31, stream - (1 << 32), stream).to(torch.int32)


def _log2(number: Tensor) -> Tensor:
    """floor(log2) of positive integers below 2**24, exactly."""
    return (number.to(torch.float32).view(torch.int32) >> 23) - 127
