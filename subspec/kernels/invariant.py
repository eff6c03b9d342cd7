"""Batch-invariant kernels of the target's pass: a row's result has the same bits whatever rows are beside it.

Three rules make that so. Every sum of a row runs over the same operands in the same order, whatever the number of
rows (one tile shape, split points fixed by the matrix or by absolute positions, partial sums merged in order). One
loop body serves all cases: two loops that look alike may be contracted to other fused multiply-adds. Numbers that
change from pass to pass are not specialised on, so that one compiled kernel serves them all.

Rows that do not belong to a sum enter it with weight zero, which adds exact zeros.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "part_stride"])
def linear(
    x, w0, w1, w2, b0, b1, b2, out, rows, k, k_part, n0, n1, n2, x_stride, out_stride, part_stride,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, EVEN_K: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x @ concatenation(w0, w1, w2).T + bias. Grid: (row tiles * column tiles, parts of k).

    x: [rows, k]. w0, w1, w2: [n0, k], [n1, k], [n2, k]; n1 and n2 may be 0. out: [rows, n0 + n1 + n2] in its own dtype
    or, with PARTIAL, float32 [parts, rows, n0 + n1 + n2]: part p holds the sum over k_part * p .. k_part * (p + 1),
    the bias is in part 0.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program, part = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = program % row_tiles, program // row_tiles
    tiles0, tiles1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    w, bias, first, n, tile = w0, b0, 0, n0, column_tile
    if column_tile >= tiles0 + tiles1:
        w, bias, first, n, tile = w2, b2, n0 + n1, n2, column_tile - tiles0 - tiles1
    elif column_tile >= tiles0:
        w, bias, first, n, tile = w1, b1, n0, n1, column_tile - tiles0

    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = part * k_part
    end = tl.minimum(begin + k_part, k)
    depth = begin + tl.arange(0, BLOCK_K)
    # Columns past the end repeat others; their results are not stored. Rows past the end are zeros: were they repeated,
    # a pass of one row would read the same cache lines 64 times over.
    real_row = (row < rows)[:, None]
    at_x = x + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    at_w = w + (column % n).to(tl.int64)[:, None] * k + depth[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for at in range(begin, end, BLOCK_K):
        if EVEN_K:
            left = tl.load(at_x, mask=real_row, other=0.0)
            right = tl.load(at_w)
        else:
            inside = at + tl.arange(0, BLOCK_K) < end
            left = tl.load(at_x, mask=real_row & inside[None, :], other=0.0)
            right = tl.load(at_w, mask=inside[None, :], other=0.0)
        total = tl.dot(left.to(OPERAND), tl.trans(right.to(OPERAND)), total)
        at_x += BLOCK_K
        at_w += BLOCK_K
    stored = real_row & (column < n)[None, :]
    if HAS_BIAS:
        if part == 0:
            total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    at_out = out + row.to(tl.int64)[:, None] * out_stride + (first + column)[None, :]
    if PARTIAL:
        at_out += part.to(tl.int64) * part_stride
    tl.store(at_out, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def swiglu(gate_up, out, n, out_stride, BLOCK: tl.constexpr):
    """out = silu(gate) * up. Grid: (rows, blocks of n). gate_up: [rows, 2 n], gate first; out: rows of n, strided."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(gate_up + row * 2 * n + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * n + n + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "shared_causal", "path_width", "total_rows"])
def attention(
    q, k_rows, v_rows, positions, prefix, paths, partial_out, partial_max, partial_sum,
    rows, shared_causal, path_width, total_rows, row_stride, head_stride, cache_stride, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Attention over one split of the absolute positions, for one kv head. Grid: (KV_HEADS, splits, texts * tiles).

    Every row sees the positions 0 .. its own. Position p of the prefix (p < past, the number that ``prefix`` points
    to, so that a captured pass can be replayed behind any prefix) lies in cache row p. Behind it, a
    chain (shared_causal = 1) has position p in row p as well; a tree's row finds its own ancestor at position p in row
    past + paths[row, p - past]. Positions are taken in blocks of BLOCK, and splits of SPLIT, both at fixed places.

    A tile holds TILE pairs of a row and one of its query heads. Blocks that are the same cache rows for the whole tile
    are read once; the others are gathered for one row of the tile after the other, with weight 0 for the rest.

    Several texts have as many rows each, one text's behind the other's, and caches that lie cache_stride numbers apart.

    q: [texts * rows, Q_HEADS, D]. k_rows, v_rows: [KV_HEADS, ., D], from position 0 on.
    positions: int64 [texts * rows]. prefix: int64 [texts]. paths: int32 [texts * rows, path_width].
    partial_*: float32 [splits, total_rows, Q_HEADS(, D)].
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    kv_head, split = tl.program_id(0), tl.program_id(1)
    tiles = tl.cdiv(rows * GROUP, TILE)
    text, tile = tl.program_id(2) // tiles, tl.program_id(2) % tiles
    past = tl.load(prefix + text).to(tl.int32)
    before = text * rows
    BLOCKS: tl.constexpr = SPLIT // BLOCK
    pair = tile * TILE + tl.arange(0, TILE)
    row = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    valid = row < rows
    first_row = tile * TILE // GROUP
    count = tl.minimum((tile * TILE + TILE - 1) // GROUP, rows - 1) - first_row + 1
    position = tl.load(positions + before + row, mask=valid, other=-1).to(tl.int32)
    dims = tl.arange(0, D_BLOCK)
    real = dims < D
    at_q = ((before + row) * Q_HEADS + head).to(tl.int64) * D
    query = tl.load(q + at_q[:, None] + dims[None, :], mask=valid[:, None] & real[None, :], other=0.0)

    deepest = tl.max(position, axis=0)
    last_block = deepest // BLOCK + 1
    first_block = split * BLOCKS
    shared_until = tl.where(shared_causal != 0, last_block, past // BLOCK)
    shared = tl.maximum(tl.minimum(shared_until - first_block, BLOCKS), 0)
    own_first = tl.maximum(first_block, shared_until)
    own = tl.maximum(tl.minimum(first_block + BLOCKS, last_block) - own_first, 0)

    highest = tl.full([TILE], -1e30, dtype=tl.float32)
    denominator = tl.zeros([TILE], dtype=tl.float32)
    output = tl.zeros([TILE, D_BLOCK], dtype=tl.float32)
    at_head = kv_head.to(tl.int64) * head_stride + text.to(tl.int64) * cache_stride
    k_head, v_head = k_rows + at_head, v_rows + at_head
    for step in range(shared + own * count):
        is_shared = step < shared
        place = tl.maximum(step - shared, 0)
        own_row = first_row + place // tl.maximum(own, 1)
        block = tl.where(is_shared, first_block + step, own_first + place % tl.maximum(own, 1))
        column = block * BLOCK + tl.arange(0, BLOCK)
        behind = column - past
        in_path = (behind >= 0) & (behind < tl.where(is_shared, 0, path_width))
        node = tl.load(paths + (before + own_row) * path_width + behind, mask=in_path, other=0)
        cache_row = tl.where(in_path, past + node, column).to(tl.int64) * row_stride
        exists = column <= deepest
        loaded = exists[:, None] & real[None, :]
        key = tl.load(k_head + cache_row[:, None] + dims[None, :], mask=loaded, other=0.0)
        value = tl.load(v_head + cache_row[:, None] + dims[None, :], mask=loaded, other=0.0)
        score = tl.dot(query.to(OPERAND), tl.trans(key.to(OPERAND))) * scale
        served = (row >= tl.where(is_shared, 0, own_row)) & (row <= tl.where(is_shared, rows, own_row))
        visible = (column[None, :] <= position[:, None]) & served[:, None]
        score = tl.where(visible, score, -1e30)
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.where(visible, tl.exp(score - new_highest[:, None]), 0.0)
        correction = tl.exp(highest - new_highest)
        denominator = denominator * correction + tl.sum(weight, axis=1)
        added = output * correction[:, None] + tl.dot(weight.to(OPERAND), value.to(OPERAND))
        output = tl.where(served[:, None], added, output)  # 0 * infinity of another row's value is no zero
        highest = new_highest
    slot = (split.to(tl.int64) * total_rows + before + row) * Q_HEADS + head
    tl.store(partial_max + slot, highest, mask=valid)
    tl.store(partial_sum + slot, denominator, mask=valid)
    stored = valid[:, None] & real[None, :]
    tl.store(partial_out + slot[:, None] * D + dims[None, :], output, mask=stored)


@triton.jit(do_not_specialize=["total_rows"])
def merge(
    partial_out, partial_max, partial_sum, positions, out, total_rows,
    Q_HEADS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add up the splits of :func:`attention` in order, those that the row sees. Grid: (rows, Q_HEADS).

    out: [rows, Q_HEADS * D].
    """
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, D_BLOCK)
    real = dims < D
    splits = tl.load(positions + row).to(tl.int32) // SPLIT + 1
    highest = tl.full([1], -1e30, dtype=tl.float32)
    denominator = tl.zeros([1], dtype=tl.float32)
    output = tl.zeros([D_BLOCK], dtype=tl.float32)
    slot = row.to(tl.int64) * Q_HEADS + head
    for _ in range(splits):
        own_highest = tl.load(partial_max + slot)
        new_highest = tl.maximum(highest, own_highest)
        before, now = tl.exp(highest - new_highest), tl.exp(own_highest - new_highest)
        denominator = denominator * before + tl.load(partial_sum + slot) * now
        part = tl.load(partial_out + slot * D + dims, mask=real, other=0.0)
        output = output * before + part * now
        highest = new_highest
        slot += total_rows * Q_HEADS
    at_out = (row.to(tl.int64) * Q_HEADS + head) * D + dims
    tl.store(out + at_out, (output / denominator).to(out.dtype.element_ty), mask=real)
