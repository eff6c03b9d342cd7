"""Linear layers of 8, 4, 3 or 2 bits and any group size for the few rows of a draft level, in Triton.

Where our CUDA kernel (``int4.py``) has one format, this one has all of them, and needs nothing that is not installed
with PyTorch. The integers lie in words along the inputs so that unpacking is a shift and a mask for a whole tile: with
P integers to a word a row of K inputs takes S = K / P words, and word j holds the inputs j, j + S, ..., j + (P-1) S.
Each shift then gives the weights of neighbouring inputs, one tile of a matrix product. Words of neighbouring outputs
are neighbours, so are their scales. Three bits are a word of the two low bits and half a word of the high one.

Where a tile lies in one group the integers themselves are multiplied (they are exact in bfloat16) and the scale and
zero applied to the sums, ``s * (sum q x - z * sum x)`` in float32; else weights are dequantized one by one before the
product, in bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.kernels.activation import apply_swiglu
from subspec.kernels.int4 import PACKED_AT_ONCE
from subspec.utils.rounding import next_power_of_two

PER_WORD = {8: 4, 4: 8, 3: 16, 2: 16}
"""Integers that share a 32-bit word."""

LEAST_TILE, TILE = 16, 32
"""Words of a tile along the inputs: what a tensor core takes at least, and what is used where it fits."""

MAX_ROWS = 64


@dataclass(frozen=True)
class PackedWq:
    """A quantized weight in the kernel's order.

    Attributes:
        words: int32 [in_features / P, out_features].
        high: int16 [in_features / 16, out_features], the high bits of 3-bit integers; [1] when there are none.
        meta: float16 [2, in_features / group, out_features]: scales, then zeros.
        bits: 8, 4, 3 or 2.
        group: inputs that share a scale and a zero.
        swiglu: whether outputs alternate, 16 by 16, between a gate and an up projection.
    """

    words: Tensor
    high: Tensor
    meta: Tensor
    bits: int
    group: int
    swiglu: bool

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def in_features(self) -> int:
        return self.words.shape[0] * PER_WORD[self.bits]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        high = self.high.numel() * 2 if self.bits == 3 else 0
        return self.words.numel() * 4 + high + self.meta.numel() * 2

    @property
    def tile(self) -> int:
        """Words per tile: where 32 of them do not lie in one group, 16 may."""
        return LEAST_TILE if not self._whole(TILE) and self._whole(LEAST_TILE) else TILE

    @property
    def whole(self) -> bool:
        """Whether no tile crosses a group's border."""
        return self._whole(self.tile)

    def _whole(self, tile: int) -> bool:
        return self.group % tile == 0 and self.words.shape[0] % tile == 0


def unfit(bits: int, group: int, in_features: int) -> str | None:
    """Why a weight cannot be packed; None when it can."""
    if bits not in PER_WORD:
        return f"{bits} bits are not {', '.join(map(str, PER_WORD))}"
    if in_features % PER_WORD[bits]:
        return f"{in_features} inputs are not a multiple of {PER_WORD[bits]}"
    if in_features % group:
        return f"groups of {group} do not divide {in_features} inputs"
    return None


def packed_bytes(out_features: int, in_features: int, bits: int, group: int) -> int:
    """Device bytes of a packed weight: bits per weight, and four bytes per group."""
    return out_features * in_features * bits // 8 + 4 * out_features * (in_features // group)


def pack(q: Tensor, scale: Tensor, zero: Tensor, *, bits: int, swiglu: bool = False) -> PackedWq:
    """Bring a quantized weight w = scale * (q - zero) into the kernel's order.

    Args:
        q: integers below 2**bits, uint8 [n, k].
        scale, zero: [n, k / group]; the group size follows from them.
        swiglu: outputs are interleaved gate and up (:func:`subspec.kernels.int4.interleave`).

    Raises:
        ValueError: the inputs do not fill words or groups, or interleaved outputs are no whole tiles.
    """
    n, k = q.shape
    group = k // scale.shape[1]
    if reason := unfit(bits, group, k):
        raise ValueError(reason)
    if swiglu and n % 32:
        raise ValueError(f"{n} interleaved rows are not a multiple of 32")
    per = PER_WORD[bits]
    low = 2 if bits == 3 else bits
    words = torch.empty(k // per, n, dtype=torch.int32, device=q.device)
    high = torch.empty((k // 16, n) if bits == 3 else (1,), dtype=torch.int16, device=q.device)
    step = max(1, PACKED_AT_ONCE // k)  # in pieces: the widened integers take eight bytes each
    for start in range(0, n, step):
        part = q[start : start + step].to(torch.int64).unflatten(1, (per, -1))
        words[:, start : start + step] = _word(part & ((1 << low) - 1), low, 32).to(torch.int32).t()
        if bits == 3:
            high[:, start : start + step] = _word(part >> 2, 1, 16).to(torch.int16).t()
    meta = torch.stack([scale.t(), zero.t()]).to(torch.float16).contiguous()
    return PackedWq(words, high, meta, bits, group, swiglu)


def _word(fields: Tensor, width: int, size: int) -> Tensor:
    """[n, fields, words] -> [n, words], each a signed number of ``size`` bits."""
    shifts = torch.arange(fields.shape[1], device=fields.device) * width
    word = (fields << shifts[:, None]).sum(1)
    return torch.where(word >= 1 << (size - 1), word - (1 << size), word)


def unpack_codes(weight: PackedWq) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`pack` was given: uint8 [out_features, in_features], and float32 scales and zeros per group."""
    per = PER_WORD[weight.bits]
    low = 2 if weight.bits == 3 else weight.bits
    fields = torch.arange(per, device=weight.words.device)
    q = (weight.words.t().to(torch.int64).unsqueeze(1) >> (fields * low)[:, None]) & ((1 << low) - 1)
    if weight.bits == 3:
        q += ((weight.high.t().to(torch.int64).unsqueeze(1) >> fields[:, None]) & 1) << 2
    scale, zero = weight.meta.float().transpose(1, 2).contiguous()
    return q.flatten(1).to(torch.uint8), scale, zero


def unpack(weight: PackedWq) -> Tensor:
    """The dequantized weight, float32 [out_features, in_features]: the reference of everything here."""
    q, scale, zero = unpack_codes(weight)
    groups = q.float().unflatten(1, (-1, weight.group))
    return (scale.unsqueeze(-1) * (groups - zero.unsqueeze(-1))).flatten(1)


def reference(weight: PackedWq, x: Tensor) -> Tensor:
    """What :func:`linear` computes, in float32 torch: [rows, out_features], or the SwiGLU of it."""
    y = x.float() @ unpack(weight).t()
    return apply_swiglu(y) if weight.swiglu else y


def linear(weight: PackedWq, x: Tensor, out: Tensor, *, tiles: int, splits: int = 1) -> None:
    """Run the kernel on up to 64 rows.

    Args:
        x: bfloat16 [rows, in_features], contiguous.
        out: float32 [splits, rows, out_features], to be added over the splits by the reader; with SwiGLU bfloat16
            [rows, out_features / 2] and ``splits`` 1.
        tiles: outputs per program, in sixteens: 2, 4 or 8.
        splits: slices of the inputs.
    """
    # Imported here: Triton is not there on machines that only compose configurations or run on a CPU.
    from subspec.kernels import wq_kernel

    rows, words = x.shape[0], weight.words.shape[0]
    columns = out.shape[-1]
    tile, block = weight.tile, tiles * 16
    tile_count = -(-words // tile)
    per_split = -(-tile_count // splits)
    wq_kernel.wq_linear[(-(-columns // block), splits)](
        weight.words,
        weight.high,
        weight.meta,
        x,
        out,
        rows,
        weight.out_features,
        columns,
        words,
        per_split,
        weight.in_features // weight.group,
        GROUP=weight.group,
        BITS=2 if weight.bits == 3 else weight.bits,
        PER_WORD=PER_WORD[weight.bits],
        HIGH=weight.bits == 3,
        WHOLE=weight.whole,
        SWIGLU=weight.swiglu,
        TILE=tile,
        ROWS=max(16, next_power_of_two(rows)),
        BLOCK=block,
        OPERAND=wq_kernel.tl.bfloat16 if x.is_cuda else wq_kernel.tl.float32,
        num_warps=4,
        # Loading ahead where every weight has its own scale takes more shared memory than a multiprocessor has.
        num_stages=3 if weight.whole else 1,
    )
