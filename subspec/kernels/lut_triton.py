"""Triton kernels of ``quant=higgs``: the look-up-table Linear, the rotation of its inputs, and the sums' activation."""

import triton
import triton.language as tl


@triton.jit
def _look_up(table, codes, SIZE: tl.constexpr, GATHER: tl.constexpr):
    """Table entries int32 [N, T] for codes [N, T]; with GATHER through shared memory, else through the L1 cache."""
    index = codes.to(tl.int32)
    if GATHER:
        entries = tl.load(table + tl.arange(0, SIZE))
        flat = tl.gather(entries, tl.reshape(index, [index.shape[0] * index.shape[1]]), 0)
        return tl.reshape(flat, [index.shape[0], index.shape[1]])
    return tl.load(table + index)


@triton.jit
def _both(pair, OPERAND: tl.constexpr):
    """Two bfloat16 in each int32 [N, T], side by side: [N, 2 T]."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [pair.shape[0], 2 * pair.shape[1]]).to(OPERAND)


@triton.jit
def lut_linear(
    x, packed, scale, table, out,
    rows, n, inputs, groups, per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    GATHER: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """out[split, row, i] = sum over the split's inputs of scale * table[code[i, k]] * x[row, k].

    Grid: (blocks of N outputs, splits). The weights are the left operand of the product and the few rows of x the
    right one, so that no row of weights is padding and 16 rows of x cost as much as one.

    x: bfloat16 [rows, inputs], rows <= M; packed: uint8 [n, inputs * BITS / 8] of ``pack_pairs``; scale: float16
    [n, groups]; table: int32 [4 ** BITS], the first weight of a pair in the low half; out: float32
    [splits, rows, n]. K: inputs per step, a power of two of at least 64 that divides GROUP; per_split: inputs, a
    multiple of K. OPERAND: as in ``tree_attention``.
    """
    output = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    exists = output < n
    row = tl.arange(0, M)
    begin = split * per_split
    end = tl.minimum(begin + per_split, inputs)
    line = packed + output[:, None].to(tl.int64) * (inputs // 8 * BITS)
    # Pairs of a step: with 4 bits all of them in order, else the eight of one quarter of each chunk of 64 weights.
    T: tl.constexpr = K // 2 if BITS == 4 else K // 8
    pair = tl.arange(0, T)
    member = tl.arange(0, 2 * T)
    if BITS == 4:
        byte = pair
        column = member
    else:
        byte = pair // 8 * (8 * BITS) + pair % 8
        column = member // 16 * 64 + member % 16
    x_at = x + row[None, :] * inputs + column[:, None]
    x_exists = (row < rows)[None, :]
    here = line + byte[None, :]
    zero = tl.zeros([N, 1], dtype=tl.int32)  # makes a mask of a comparison of scalars

    # The next step's codes fly while this one's are multiplied.
    at = here + begin // 8 * BITS
    some = exists[:, None] & (zero + begin < end)
    first = tl.load(at, mask=some, other=0)
    second, third = first, first
    if BITS < 4:
        second = tl.load(at + 8, mask=some, other=0)
    if BITS == 3:
        third = tl.load(at + 16, mask=some, other=0)
    total = tl.zeros([N, M], dtype=tl.float32)
    for k in range(begin, end, K):
        at = here + (k + K) // 8 * BITS
        some = exists[:, None] & (zero + (k + K) < end)
        next_first = tl.load(at, mask=some, other=0)
        next_second, next_third = next_first, next_first
        if BITS < 4:
            next_second = tl.load(at + 8, mask=some, other=0)
        if BITS == 3:
            next_third = tl.load(at + 16, mask=some, other=0)
        factor = tl.load(scale + output * groups + k // GROUP, mask=exists, other=0.0).to(tl.float32)
        if BITS == 4:
            weight = _both(_look_up(table, first, 256, GATHER), OPERAND)
            values = tl.load(x_at + k, mask=x_exists, other=0.0).to(OPERAND)
            sums = tl.dot(weight, values)
        else:
            sums = tl.zeros([N, M], dtype=tl.float32)
            for quarter in tl.static_range(4):
                run = first if quarter < 2 else second
                code = (run >> (4 * (quarter % 2))) & 15
                if BITS == 3:
                    code = code | (((third >> (2 * quarter)) & 3) << 4)
                weight = _both(_look_up(table, code, 4**BITS, GATHER), OPERAND)
                values = tl.load(x_at + k + 16 * quarter, mask=x_exists, other=0.0).to(OPERAND)
                sums = tl.dot(weight, values, sums)
        total += sums * factor[:, None]
        first, second, third = next_first, next_second, next_third
    place = out + (split * rows + row[None, :]) * n + output[:, None]
    tl.store(place, total, mask=exists[:, None] & x_exists)


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


@triton.jit
def swiglu_sums(partial, out, rows, half, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the slices of a fused gate/up Linear and apply its activation. Grid: (rows, blocks of outputs).

    partial: float32 [SPLITS, rows, 2 * half], gate and up alternating 16 by 16; out: bfloat16 [rows, half].
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < half
    at = column // 16 * 32 + column % 16
    gate = tl.zeros([BLOCK], dtype=tl.float32)
    up = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        line = partial + (split * rows + row) * (2 * half) + at
        gate += tl.load(line, mask=inside, other=0.0)
        up += tl.load(line + 16, mask=inside, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * half + column, value.to(tl.bfloat16), mask=inside)
