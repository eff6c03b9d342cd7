"""The Triton kernel of :mod:`subspec.kernels.wq`, which says how the weight is laid out."""

import triton
import triton.language as tl


@triton.jit
def _products(
    total, words, high, meta, x, columns, inside, row, rows, n, size, first, last, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, PER_WORD: tl.constexpr, HIGH: tl.constexpr, WHOLE: tl.constexpr,
    TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """total [ROWS, BLOCK] += x times the weights of ``columns``, over the tiles first .. last of ``size`` words."""
    k = size * PER_WORD
    for at in range(first, last):
        word_row = at * TILE + tl.arange(0, TILE)
        exists = word_row < size
        place = word_row.to(tl.int64)[:, None] * n + columns[None, :]
        there = exists[:, None] & inside[None, :]
        packed = tl.load(words + place, mask=there, other=0)
        if HIGH:
            packed_high = tl.load(high + place, mask=there, other=0).to(tl.int32)
        for field in tl.static_range(PER_WORD):
            q = (packed >> (field * BITS)) & ((1 << BITS) - 1)
            if HIGH:
                q = q | (((packed_high >> field) & 1) << 2)
            start = field * size
            value = tl.load(
                x + row[:, None] * k + start + word_row[None, :],
                mask=(row < rows)[:, None] & exists[None, :],
                other=0.0,
            )
            if WHOLE:
                group = (start + at * TILE) // GROUP
                scale = tl.load(meta + group * n + columns, mask=inside, other=0.0).to(tl.float32)
                zero = tl.load(meta + (groups + group) * n + columns, mask=inside, other=0.0).to(tl.float32)
                if BITS < 8:
                    # OR-ing an integer into bfloat16 128.0 gives 128 + q, exact, for less than a conversion.
                    factor = (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
                    zero += 128.0
                else:
                    factor = q.to(tl.float32)
                sums = tl.sum(value.to(tl.float32), axis=1)
                product = tl.dot(value.to(OPERAND), factor.to(OPERAND))
                total += (product - sums[:, None] * zero[None, :]) * scale[None, :]
            else:
                group = (start + word_row) // GROUP
                spot = group[:, None] * n + columns[None, :]
                scale = tl.load(meta + spot, mask=there, other=0.0).to(tl.float32)
                zero = tl.load(meta + groups * n + spot, mask=there, other=0.0).to(tl.float32)
                weight = (q.to(tl.float32) - zero) * scale
                total += tl.dot(value.to(OPERAND), weight.to(OPERAND))
    return total


@triton.jit
def wq_linear(
    words, high, meta, x, out, rows, n, columns_out, size, per_split, groups,
    GROUP: tl.constexpr, BITS: tl.constexpr, PER_WORD: tl.constexpr, HIGH: tl.constexpr, WHOLE: tl.constexpr,
    SWIGLU: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Outputs BLOCK at a time, the inputs' words in slices of ``per_split`` tiles. Grid: (blocks, splits).

    x: bfloat16 [rows, size * PER_WORD]. out: float32 [splits, rows, n], or with SWIGLU bfloat16 [rows, n / 2], whose
    column c comes from the outputs of gate and up, (c / 16) * 32 + c % 16 and 16 after it.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns_out
    first = split * per_split
    last = tl.minimum(first + per_split, tl.cdiv(size, TILE))
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    if SWIGLU:
        gate_column = (column // 16) * 32 + column % 16
        gate = _products(
            total, words, high, meta, x, gate_column, inside, row, rows, n, size, first, last, groups,
            GROUP, BITS, PER_WORD, HIGH, WHOLE, TILE, OPERAND,
        )  # fmt: skip
        up = _products(
            total, words, high, meta, x, gate_column + 16, inside, row, rows, n, size, first, last, groups,
            GROUP, BITS, PER_WORD, HIGH, WHOLE, TILE, OPERAND,
        )  # fmt: skip
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(
            out + row[:, None] * columns_out + column[None, :],
            y.to(tl.bfloat16),
            mask=(row < rows)[:, None] & inside[None, :],
        )
    else:
        y = _products(
            total, words, high, meta, x, column, inside, row, rows, n, size, first, last, groups,
            GROUP, BITS, PER_WORD, HIGH, WHOLE, TILE, OPERAND,
        )  # fmt: skip
        at = (split * rows + row).to(tl.int64)[:, None] * columns_out + column[None, :]
        tl.store(out + at, y, mask=(row < rows)[:, None] & inside[None, :])
