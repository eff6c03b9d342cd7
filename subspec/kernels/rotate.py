"""The Triton kernel that rotates inputs for ``quant=higgs`` (:mod:`subspec.quant.hadamard`)."""

import triton
import triton.language as tl


@triton.jit
def _sign(i, j):
    """Entry of the Hadamard matrix (unscaled): -1 where the numbers share an odd number of bits. Below 2 ** 5."""
    common = i & j
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return 1.0 - 2.0 * (common & 1).to(tl.float32)


@triton.jit
def _stage(values, BLOCK: tl.constexpr, RADIX: tl.constexpr):
    """Transform the lowest log2(RADIX) bits of the index and make them the highest ones; float32 [BLOCK]."""
    i = tl.arange(0, RADIX)
    matrix = _sign(i[:, None], i[None, :])
    table = tl.reshape(values, [BLOCK // RADIX, RADIX])
    return tl.reshape(tl.sum(matrix[:, None, :] * table[None, :, :], axis=2), [BLOCK])


@triton.jit
def rotate_inputs(
    x, signs, out, inputs, padded, factor,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
):  # fmt: skip
    """out = randomized Hadamard transform of x by blocks. Grid: (rows, padded / BLOCK).

    x: bfloat16 [rows, inputs]; out: bfloat16 [rows, padded]; signs: float32 [padded]; factor: BLOCK ** -0.5;
    FIRST * SECOND * THIRD = BLOCK: as every stage moves the bits it has transformed to the top, three stages leave
    them in order. All arithmetic is float32.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * inputs + column, mask=column < inputs, other=0.0).to(tl.float32)
    values = values * tl.load(signs + column)
    values = _stage(values, BLOCK, FIRST)
    values = _stage(values, BLOCK, SECOND)
    values = _stage(values, BLOCK, THIRD)
    tl.store(out + row * padded + column, (values * factor).to(tl.bfloat16))
