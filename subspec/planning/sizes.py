"""Bytes of everything a streamed run keeps on the device or in pinned memory, from shapes alone.

The formulas follow what the engine allocates today (``tests/offload/test_sizes.py`` counts its allocations on the
meta device and compares); where a figure is an allowance instead of a formula, it is a constant with its reason.
"""

import functools
import math
from dataclasses import dataclass

import torch

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import PIECE_ROWS, Sampling
from subspec.decoding.tree import Tree
from subspec.levels.captured_draft import USUAL_ROWS
from subspec.levels.model import Attention
from subspec.levels.quantization import LevelQuantization
from subspec.targets.model_spec import ModelSpec
from subspec.utils.rounding import round_up

MIB = 2**20
GIB = 2**30
META = torch.device("meta")

HEADROOM, LEAST_HEADROOM = 0.01, 64 * MIB
"""What of a budget no plan gives away: 1 %, at least 64 MiB.

The budget is enforced by a cap on PyTorch's allocator, and an allocator that meets its cap first frees what it has
cached, synchronising the device, and tries again: nothing fails, but passes stall. Its segments come in steps of
20 MiB and the plan was within some 30 MiB of what it reserved on an H200 (7B in 8 GiB), so 64 MiB keeps the cap two
segments away; workspaces and fragments grow with the model, hence the share.
"""

LIBRARY_BYTES = 2 * 32 * MIB
"""cuBLAS keeps a workspace per stream that multiplies (32 MiB on Hopper, 8 MiB before): the compute stream and the
stream that captured the draft's graph."""

GRAPH_BYTES = 32 * MIB
"""The captured graphs' private pool never gives memory back: the fragments between a level's activations, which are
counted apart. Levels never run at once, so their graphs share one pool; their logits lie outside it."""

ATTENTION_SPLITS, LINEAR_SPLITS = Attention().splits, 4
"""Float32 partial results of a fused level: slices of the prefix, and slices of a
Linear's inputs (our kernel's choice for a 7B on a card of 132 multiprocessors)."""

ALLOCATOR_BYTES = 64 * MIB
"""Segments that PyTorch's allocator holds partly empty: workspaces grow with the prefix, so blocks freed by one
pass do not fit the next one exactly."""

PER_LOGIT_GREEDY = 0
"""Bytes per logit that verification needs beside the logits: an argmax needs none."""

PER_LOGIT_SAMPLING = 16
"""Three float32 copies (scaled logits, the noise of each node's position, their sum) and the filters' masks."""

PER_LOGIT_TOP_P = 85
"""top-p sorts every row: values, 64-bit indices, their mass and its sums, 61 bytes counted on the CPU, and an estimated
24 for the GPU sort's own buffers."""

PER_LOGIT_DRAFT = 12
"""Three float32 copies of a sampled level's logits: scaled, their exponentials, and one more while scaling."""


def headroom(budget: int) -> int:
    """Bytes of ``budget`` that stay free: :data:`HEADROOM` says why."""
    return max(LEAST_HEADROOM, math.ceil(budget * HEADROOM))


def least_budget(used: int) -> int:
    """The smallest budget that has room for ``used`` bytes beside its headroom."""
    budget = max(used + LEAST_HEADROOM, math.ceil(used / (1 - HEADROOM)))
    return budget + max(0, used + headroom(budget) - budget)


def held(size: int) -> int:
    """Device bytes that PyTorch's allocator takes for a tensor of ``size`` bytes.

    Up to 1 MiB: rounded up to 512 bytes. From 10 MiB: a segment of its own in steps of 2 MiB. Between them, tensors
    share segments of 20 MiB: size counts as the share of a segment filled with tensors like it.
    """
    if size <= MIB:
        return round_up(size, 512)
    if size < 10 * MIB:
        return math.ceil(20 * MIB / (20 * MIB // size))
    return round_up(size, 2 * MIB)


def rounding(sizes: list[int]) -> int:
    """What the allocator takes for tensors of these bytes beyond them."""
    return sum(held(size) - size for size in sizes)


@dataclass(frozen=True)
class SubstituteSizes:
    """Bytes of a fused substitute.

    Attributes:
        quantized, exact: of one layer: its quantized Linears, and those it keeps exact copies of.
        skipped: of a layer that is exact as a whole (``quant.skip_layers``).
        head: of the draft's own LM head; 0: it uses the target's.
        quantized_rounding, ...: what the allocator adds to each of them.
    """

    quantized: int
    exact: int
    skipped: int
    head: int
    quantized_rounding: int
    exact_rounding: int
    skipped_rounding: int
    head_rounding: int


def substitute_sizes(quantization: LevelQuantization, itemsize: int) -> SubstituteSizes:
    """A fused substitute: a layer's packed weights are one allocation, each exact fused Linear is one."""
    exact = [n * k * itemsize for n, k in quantization.exact.values()]
    layer = {**quantization.shapes, **quantization.exact}
    skipped = [n * k * itemsize for role, (n, k) in layer.items() if role != "head"]
    quantized, head = quantization.layer_bytes, quantization.head_bytes
    return SubstituteSizes(
        quantized,
        sum(exact),
        sum(skipped),
        head,
        rounding([quantized]),
        rounding(exact),
        rounding(skipped),
        rounding([head]),
    )


def kv_bytes(shapes: ModelSpec, *, max_length: int, draft_rows: int, target_rows: int, itemsize: int) -> int:
    """layers * 2 * kv heads * head dim * (draft + max_length + target rows) * itemsize, asked of the cache itself."""
    cache = KVCache(
        layers=shapes.layers,
        kv_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        max_length=max_length,
        draft_rows=draft_rows,
        target_rows=target_rows,
        dtype={2: torch.bfloat16, 4: torch.float32}[itemsize],
        device=META,
    )
    return cache.nbytes


@functools.lru_cache(maxsize=256)
def tree_bytes(capacity: int) -> int:
    """Two bool [capacity, capacity] (ancestors, identity) and some 40 bytes per node, asked of the tree itself."""
    tensors = [value for value in vars(Tree(capacity, META)).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def pass_bytes(shapes: ModelSpec, rows: int, visible: int, itemsize: int) -> int:
    """Most that a forward pass of ``rows`` tokens over ``visible`` cached rows holds at once, logits left out.

    itemsize * 4 * rows * hidden (embedding, residual, normed, output) + mask + the largest of

    * MLP: itemsize * 3 * rows * intermediate (gate, up, product);
    * attention: itemsize * rows * head dim * (4 heads + 4 kv heads) for queries, keys, values and outputs, each
      twice, and with grouped heads itemsize * 2 * heads * head dim * visible (keys and values repeated for every
      head: the fused kernels take a mask only so);
    * norm: 8 * rows * hidden (float32 copy and its square).

    mask = rows * visible * (2 * itemsize + 2): bool, its negation, additive, and a padded copy for alignment.
    """
    width = shapes.heads * shapes.head_dim
    kv_width = shapes.kv_heads * shapes.head_dim
    attention = itemsize * rows * (4 * width + 4 * kv_width)
    if shapes.heads != shapes.kv_heads:
        attention += itemsize * 2 * width * visible
    mlp = itemsize * 3 * rows * shapes.intermediate
    norm = 8 * rows * shapes.hidden
    mask = rows * visible * (2 * itemsize + 2)
    return itemsize * 4 * rows * shapes.hidden + mask + max(attention, mlp, norm)


def verify_bytes(shapes: ModelSpec, nodes: int, levels: int, sampling: Sampling, itemsize: int) -> int:
    """Logits of the whole tree and what choosing from them takes.

    itemsize * nodes * (vocab + hidden) + b * min(nodes, 32) * vocab, with b = 0 for greedy, 16 for sampling, 85 with
    top-p, as rows are sampled 32 at a time; sampling also keeps a float32 row of noise per level, and a stacked copy of
    them: 8 * (levels + 1) * vocab.
    """
    noise = 0 if sampling.greedy else 8 * (levels + 1) * shapes.vocab
    piece = min(nodes, PIECE_ROWS) * shapes.vocab * _per_logit(sampling)
    return itemsize * nodes * (shapes.vocab + shapes.hidden) + piece + noise


def level_bytes(
    shapes: ModelSpec, width: int, sampling: Sampling, itemsize: int, *, own_head: bool = False
) -> int:
    """The fused draft's levels: their logits, one level's activations, and what growing it takes.

    * logits: itemsize * max(width, 8) * vocab, one buffer that all captured levels write to (``USUAL_ROWS``);
    * activations: width * (4 * (32 * heads * head dim + 4 * (heads + 2 kv heads) * head dim)
      + itemsize * (3 * intermediate + 2 * heads * head dim + 4 * hidden)); the prefix is read where it lies;
    * sampling: width * vocab * (12 + b), b as above. A greedy level grows inside its graph, from a few candidates;
    * a quantized head: 4 * width * vocab for its float32 result, twice that where a kernel takes 8 rows at a time.
    """
    query, kv_width = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    partial = 4 * (ATTENTION_SPLITS * query + LINEAR_SPLITS * (query + 2 * kv_width))
    activations = partial + itemsize * (3 * shapes.intermediate + 2 * query + 4 * shapes.hidden)
    growing = 0 if sampling.greedy else shapes.vocab * (PER_LOGIT_DRAFT + _per_logit(sampling))
    if own_head:
        growing += 4 * shapes.vocab * (1 if width <= USUAL_ROWS else 2)
    return itemsize * max(width, USUAL_ROWS) * shapes.vocab + width * (activations + growing)


def growing_bytes(shapes: ModelSpec, rows: int, sampling: Sampling, itemsize: int) -> int:
    """Logits of a level that no kernel grows in one go, and what growing from them takes.

    rows * vocab * (itemsize + 12 + b), b as above: float32 copies while scaling and summing, and the sample's noise.
    """
    return rows * shapes.vocab * (itemsize + PER_LOGIT_DRAFT + _per_logit(sampling))


def _per_logit(sampling: Sampling) -> int:
    if sampling.greedy:
        return PER_LOGIT_GREEDY
    return PER_LOGIT_TOP_P if sampling.top_p < 1 else PER_LOGIT_SAMPLING
