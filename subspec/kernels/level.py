"""The small operations of a draft level as Triton kernels: everything between the Linear layers.

A level has a handful of rows, so a launch costs more than its arithmetic; operations are fused where possible. A kernel
that reads the partial sums of a Linear adds them up. The length of the committed prefix is read from device memory, so
that a captured graph serves any length; attention loops over the rows that exist.

With OVERLAP a kernel is launched with ``launch_pdl=True`` and keeps the rule of :mod:`subspec.kernels.launch`: it lets
the next kernel start at once, reads constants only, and waits for the kernel before ahead of everything else.
"""

import triton
import triton.language as tl


@triton.jit
def embed_rows(table, tokens, out, hidden: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False):
    """out[row] = table[tokens[row]]; the table may lie in pinned host memory. Grid: rows.

    The first kernel of a level: it waits for nothing, and is launched the ordinary way.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    value = tl.load(table + token * hidden + columns, mask=inside)
    tl.store(out + row * hidden + columns, value, mask=inside)


@triton.jit
def place(row, column, columns: tl.constexpr, TILE: tl.constexpr):
    """Where a number lies: row by row, or in tiles of TILE rows (``int4_wide.py``: ``in_tiles``)."""
    at = row * columns + column
    if TILE > 0:
        chunk = column % 16 // 2 ^ row % 8
        group = row // TILE * (columns // 64) + column // 64
        at = (group * TILE + row % TILE) * 64 + chunk * 8 + column % 64 // 16 * 2 + column % 2
    return at


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm(
    residual, partial, weight, out, rows, eps, hidden: tl.constexpr, stride: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr = 0, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """residual += sum of the partial sums; out = RMSNorm(residual) * weight. Grid: rows.

    partial: float32 [SPLITS, rows, stride]; residual, weight: of one dtype; out: of 16 bits. TILE: rows of a tile of
    ``out``, or 0.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    value = tl.load(residual + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            at = (split * rows + row).to(tl.int64) * stride
            total += tl.load(partial + at + columns, mask=inside, other=0.0)
        value += total
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row * hidden + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    variance = tl.sum(value * value, axis=0) / hidden
    scaled = (value * tl.rsqrt(variance + eps)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place(row, columns, hidden, TILE), (scaled * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "write_row"])
def rope_store(
    partial, bias, q_norm, k_norm, inverse_frequency, depths, length, q_out, k_rows, v_rows,
    rows, write_row, row_stride, head_stride, attention_scaling, eps, text_rows, cache_stride,
    q_heads: tl.constexpr, kv_heads: tl.constexpr, stride: tl.constexpr,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, BEHIND: tl.constexpr = False, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Finish a fused q/k/v projection: add slices and bias, norm, rotate, write q and the cache rows.

    Grid: (rows, q_heads + 2 * kv_heads). Head dimension 2 * HALF; HALF_BLOCK: the power of two that holds HALF.
    depths: int64 [rows] of the nodes; their position is length + depth. k_rows, v_rows: this layer's cache
    [kv_heads, rows, head_dim]; row i goes to cache row write_row + i or, with BEHIND, to write_row + length + i.
    Several texts have text_rows rows each, a length each, and caches that lie cache_stride numbers apart.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    text = row // text_rows
    half = tl.arange(0, HALF_BLOCK)
    real = half < HALF
    base = head * 2 * HALF
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    first = tl.zeros([HALF_BLOCK], dtype=tl.float32)
    second = tl.zeros([HALF_BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at = partial + (split * rows + row).to(tl.int64) * stride + base
        first += tl.load(at + half, mask=real, other=0.0)
        second += tl.load(at + HALF + half, mask=real, other=0.0)
    if HAS_BIAS:
        first += tl.load(bias + base + half, mask=real, other=0.0).to(tl.float32)
        second += tl.load(bias + base + HALF + half, mask=real, other=0.0).to(tl.float32)
    if head < q_heads + kv_heads:
        if HAS_NORM:
            mean = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
            scale = tl.rsqrt(mean + eps)
            norm = q_norm if head < q_heads else k_norm
            first = first * scale * tl.load(norm + half, mask=real, other=0.0).to(tl.float32)
            second = second * scale * tl.load(norm + HALF + half, mask=real, other=0.0).to(tl.float32)
        position = (tl.load(length + text) + tl.load(depths + row)).to(tl.float32)
        angle = position * tl.load(inverse_frequency + half, mask=real, other=0.0)
        # The model's own tables are rounded to its dtype; so are these.
        dtype = q_out.dtype.element_ty
        cosine = (tl.cos(angle) * attention_scaling).to(dtype).to(tl.float32)
        sine = (tl.sin(angle) * attention_scaling).to(dtype).to(tl.float32)
        rotated = first * cosine - second * sine
        second = second * cosine + first * sine
        first = rotated
    if head < q_heads:
        at_q = q_out + (row * q_heads + head) * 2 * HALF
        tl.store(at_q + half, first.to(q_out.dtype.element_ty), mask=real)
        tl.store(at_q + HALF + half, second.to(q_out.dtype.element_ty), mask=real)
    else:
        is_key = head < q_heads + kv_heads
        kv_head = tl.where(is_key, head - q_heads, head - q_heads - kv_heads).to(tl.int64)
        target = (k_rows if is_key else v_rows) + text.to(tl.int64) * cache_stride
        cache_row = (write_row + row - text * text_rows).to(tl.int64)
        if BEHIND:
            cache_row += tl.load(length + text)
        at_kv = target + kv_head * head_stride + cache_row * row_stride
        tl.store(at_kv + half, first.to(k_rows.dtype.element_ty), mask=real)
        tl.store(at_kv + HALF + half, second.to(k_rows.dtype.element_ty), mask=real)


@triton.jit
def visible_keys(ancestors, node, valid, node_of_column, column, exists, drafted, capacity):
    """Which keys a query sees, [M, BLOCK]: ancestors of its node, and all of the prefix."""
    in_tree = column < drafted
    key_node = tl.load(node_of_column + column, mask=exists & in_tree, other=0)
    is_ancestor = tl.load(
        ancestors + node[:, None] * capacity + key_node[None, :],
        mask=valid[:, None] & (exists & in_tree)[None, :],
        other=0,
    )
    return exists[None, :] & ((is_ancestor != 0) | (column >= drafted)[None, :])


@triton.jit
def tree_attention(
    q, k_rows, v_rows, ancestors, nodes, node_of_row, length, partial_out, partial_max, partial_sum,
    rows, start_row, drafted, capacity, row_stride, head_stride, scale, texts, cache_stride,
    q_heads: tl.constexpr, kv_heads: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, OPERAND: tl.constexpr,
    MASKS_PREFIX: tl.constexpr = True, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """One slice of attention for one kv head (split-KV decoding). Grid: (kv_heads, SPLITS, texts x chunks of M).

    The keys are rows start_row .. of the cache: first ``drafted`` rows of the tree (visible where the row's node
    is an ancestor of the query's node), then the committed prefix of ``length`` rows (visible to all).
    M: of the query rows x heads per kv head those of one program, a power of two of at least 16. MASKS_PREFIX: blocks
    without rows of the tree are masked like the others; else a branch leads around the look-ups. OPERAND: type of
    the products' factors, bfloat16 on a GPU (Triton's interpreter multiplies no bfloat16). rows: of one text; several
    texts share nodes and node_of_row, and have a length each, trees behind each other, and caches cache_stride apart.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head, split = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = q_heads // kv_heads
    chunks = tl.num_programs(2) // texts
    text = tl.program_id(2) // chunks
    m = tl.program_id(2) % chunks * M + tl.arange(0, M)
    row = m // group
    head = kv_head * group + m % group
    valid = row < rows
    dims = tl.arange(0, D)
    at_q = ((text * rows + row) * q_heads + head) * D
    query = tl.load(q + at_q[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
    node = tl.load(nodes + row, mask=valid, other=0)

    ancestors += text * capacity * capacity
    total = drafted + tl.load(length + text).to(tl.int32)
    per_split = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    begin = split * per_split
    end = tl.minimum(begin + per_split, total)
    highest = tl.full([M], -1e30, dtype=tl.float32)
    denominator = tl.zeros([M], dtype=tl.float32)
    output = tl.zeros([M, D], dtype=tl.float32)
    behind = text.to(tl.int64) * cache_stride + kv_head.to(tl.int64) * head_stride
    k_head, v_head = k_rows + behind, v_rows + behind
    for at in range(begin, end, BLOCK):
        column = at + tl.arange(0, BLOCK)
        exists = column < end
        memory_row = (start_row + column).to(tl.int64) * row_stride
        key = tl.load(k_head + memory_row[:, None] + dims[None, :], mask=exists[:, None], other=0.0)
        value = tl.load(v_head + memory_row[:, None] + dims[None, :], mask=exists[:, None], other=0.0)
        score = tl.dot(query.to(OPERAND), tl.trans(key).to(OPERAND)) * scale
        if MASKS_PREFIX:
            visible = visible_keys(ancestors, node, valid, node_of_row + start_row, column, exists, drafted, capacity)
        else:
            visible = tl.broadcast_to(exists[None, :], (M, BLOCK))
            if at < drafted:
                visible = visible_keys(
                    ancestors, node, valid, node_of_row + start_row, column, exists, drafted, capacity
                )
        score = tl.where(visible, score, -1e30)
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.where(visible, tl.exp(score - new_highest[:, None]), 0.0)
        correction = tl.exp(highest - new_highest)
        denominator = denominator * correction + tl.sum(weight, axis=1)
        output = output * correction[:, None] + tl.dot(weight.to(OPERAND), value.to(OPERAND))
        highest = new_highest
    slot = ((split * texts + text) * rows + row) * q_heads + head
    tl.store(partial_max + slot, highest, mask=valid)
    tl.store(partial_sum + slot, denominator, mask=valid)
    tl.store(partial_out + slot[:, None] * D + dims[None, :], output, mask=valid[:, None])


@triton.jit
def merge_attention(
    partial_out, partial_max, partial_sum, out, rows,
    q_heads: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr = 0, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Add up the slices of :func:`tree_attention`. Grid: (rows, q_heads). out: [rows, q_heads * D].

    TILE: rows of a tile of ``out``, or 0.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, D)
    splits = tl.arange(0, SPLITS)
    slot = (splits * rows + row) * q_heads + head
    maxima = tl.load(partial_max + slot)
    factor = tl.exp(maxima - tl.max(maxima, axis=0))
    denominator = tl.sum(tl.load(partial_sum + slot) * factor, axis=0)
    parts = tl.load(partial_out + slot[:, None] * D + dims[None, :])
    total = tl.sum(parts * factor[:, None], axis=0) / denominator
    tl.store(out + place(row, head * D + dims, q_heads * D, TILE), total.to(out.dtype.element_ty))


@triton.jit
def sum_slices(partial, out, rows, n, stride, SLICES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr = False):
    """out[row, :n] = sum of the partial sums of a Linear. Grid: (rows, blocks of n).

    partial: any floating dtype [SLICES, rows, stride]; out: bfloat16 [rows, n].
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(SLICES):
        at = (part * rows + row).to(tl.int64) * stride + column
        total += tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * n + column, total.to(tl.bfloat16), mask=inside)


@triton.jit
def block_candidates(
    logits, best, best_token, block_max, block_sum, vocab, inverse_temperature,
    BLOCKS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """The K largest logits of one block of one row, and its share of the softmax sum. Grid: (rows, BLOCKS).

    best, best_token: [rows, BLOCKS, K]; block_max, block_sum: float32 [rows, BLOCKS], of logits / temperature.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    value = tl.load(logits + row.to(tl.int64) * vocab + column, mask=inside, other=-float("inf")).to(tl.float32)
    value = value * inverse_temperature
    # No number is no candidate: a row of them has no maximum, and would name a token outside the vocabulary.
    value = tl.where(value == value, value, -1e30)
    highest = tl.max(value, axis=0)
    slot = row * BLOCKS + block
    tl.store(block_max + slot, highest)
    tl.store(block_sum + slot, tl.sum(tl.where(inside, tl.exp(value - highest), 0.0), axis=0))
    for k in tl.static_range(K):
        top = tl.max(value, axis=0)
        at = tl.min(tl.where(value == top, column, 2147483647), axis=0)
        tl.store(best + slot * K + k, top)
        tl.store(best_token + slot * K + k, at)
        value = tl.where(column == at, -float("inf"), value)


@triton.jit
def grow_level(
    best, best_token, block_max, block_sum, tokens, parents, depths, scores, ancestors, frontier, rows,
    first_slot, capacity,
    BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CAPACITY: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):  # fmt: skip
    """Append the best WIDTH of all children of the frontier to the tree. Grid: texts; their trees lie in order.

    Joint score: the parent's cumulative log-probability + logit / T - log-sum-exp, all in float32.
    frontier: int64 [rows] node numbers, of every text; new nodes get first_slot, first_slot + 1, ...
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    text = tl.program_id(0)
    best += text * rows * BLOCKS * K
    best_token += text * rows * BLOCKS * K
    block_max += text * rows * BLOCKS
    block_sum += text * rows * BLOCKS
    tokens += text * capacity
    parents += text * capacity
    depths += text * capacity
    scores += text * capacity
    ancestors += text * capacity * capacity
    row = tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS_PADDED)
    there = (row < rows)[:, None] & (block < BLOCKS)[None, :]
    slot = row[:, None] * BLOCKS + block[None, :]
    maxima = tl.load(block_max + slot, mask=there, other=-1e30)
    sums = tl.load(block_sum + slot, mask=there, other=0.0)
    highest = tl.max(maxima, axis=1)
    log_sum = highest + tl.log(tl.sum(sums * tl.exp(maxima - highest[:, None]), axis=1))
    parent = tl.load(frontier + row, mask=row < rows, other=0)
    base = tl.load(scores + parent, mask=row < rows, other=0.0) - log_sum

    candidate = tl.arange(0, CANDIDATES)
    exists = (row < rows)[:, None] & (candidate < BLOCKS * K)[None, :]
    entry = row[:, None] * (BLOCKS * K) + candidate[None, :]
    joint = tl.load(best + entry, mask=exists, other=-float("inf")) + base[:, None]
    joint = tl.where(exists, joint, -float("inf"))
    flat = row[:, None] * CANDIDATES + candidate[None, :]
    columns = tl.arange(0, CAPACITY)
    for k in tl.static_range(WIDTH):
        top = tl.max(tl.max(joint, axis=1), axis=0)
        at = tl.min(tl.min(tl.where(joint == top, flat, 2147483647), axis=1), axis=0)
        winner_row = at // CANDIDATES
        token = tl.load(best_token + winner_row * (BLOCKS * K) + at % CANDIDATES)
        winner = tl.load(frontier + winner_row)
        new = first_slot + k
        tl.store(tokens + new, token.to(tl.int64))
        tl.store(parents + new, winner)
        tl.store(depths + new, tl.load(depths + winner) + 1)
        tl.store(scores + new, top)
        line = tl.load(ancestors + winner * capacity + columns, mask=columns < capacity, other=0)
        line = tl.where(columns == new, 1, line)
        tl.store(ancestors + new * capacity + columns, line.to(tl.int8), mask=columns < capacity)
        joint = tl.where(flat == at, -float("inf"), joint)
