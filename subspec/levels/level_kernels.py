"""The operations of a captured level between its Linears, as launches of ``kernels/level.py``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.kernels.int4_wide import empty_rows, in_tiles
from subspec.kernels.modules import triton_kernels
from subspec.levels.model import Attention, LevelLayer, LevelModel
from subspec.quant.level_linear import FewRowsLinear, LevelLinear
from subspec.utils.rounding import next_power_of_two

TOP_K_BLOCK = 4096
SUM_BLOCK = 4096

MOST_PROGRAMS, FEWEST_SLICES = 768, 4
"""Programs of attention beyond which fewer slices of the keys, down to the fewest, save the writing and reading of
partial sums (``experiments/rows``)."""


@dataclass(frozen=True)
class LevelRows:
    """The rows of a level: the last nodes of trees of one shape.

    Attributes:
        tree, cache: of the first text; those of the others lie behind them.
        texts: their number. rows: of each.
        nodes: int64 [rows]. depths: int64 [texts * rows].
        lengths: int64, tokens of the prefixes, the first text's first.
        node_of_row: int64 [draft rows], the same for every text.
    """

    tree: Tree
    cache: KVCache
    texts: int
    rows: int
    nodes: Tensor
    depths: Tensor
    lengths: Tensor
    node_of_row: Tensor

    @property
    def start_row(self) -> int:
        """The first of the level's rows in the draft region, which is filled leftwards."""
        return self.cache.draft_rows - self.tree.size


class LevelKernels:
    """Launches the kernels; results are new tensors.

    Args:
        overlap: whether kernels start while the one before still runs.
    """

    def __init__(self, model: LevelModel, overlap: bool) -> None:
        self.model, self.device, self.overlap = model, model.final_norm.device, overlap
        self.kernels = triton_kernels("level", self.device)
        self._overlapped = {"OVERLAP": True, "launch_pdl": True} if overlap else {}  # the interpreter has no launch_pdl

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream, bfloat16 [n, hidden]."""
        hidden = self.model.hidden
        residual = self._empty(len(tokens), hidden, dtype=torch.bfloat16)
        self.kernels.embed_rows[(len(tokens),)](
            self.model.embedding, tokens, residual, hidden, BLOCK=next_power_of_two(hidden), OVERLAP=self.overlap
        )
        return residual

    def norm(self, residual: Tensor, partial: Tensor | None, weight: Tensor, reader: LevelLinear | None) -> Tensor:
        """Add the partial sums of a Linear to ``residual``, in place, and norm it for the Linear that reads it."""
        rows, hidden = residual.shape
        splits, stride = (0, 0) if partial is None else (partial.shape[0], partial.shape[-1])
        out = empty_rows(rows, hidden, self.device, reader.reads if reader else torch.bfloat16)
        self.kernels.add_rms_norm[(rows,)](
            residual, residual if partial is None else partial, weight, out, rows, self.model.eps, hidden, stride,
            SPLITS=splits, BLOCK=next_power_of_two(hidden), TILE=reader.tile(rows) if reader else 0, num_warps=8,
            **self._overlapped,
        )  # fmt: skip
        return out

    def multiply(self, layer: LevelLayer, x: Tensor) -> Tensor:
        """The partial sums of a layer's MLP."""
        gate_up, down, rows = layer.gate_up, layer.down, x.shape[0]
        tile = down.tile(rows)
        if not isinstance(gate_up, FewRowsLinear):
            return down(in_tiles(_finite(gate_up(x), down.reads), tile))
        tiled = tile > 0 and gate_up.tile(rows) > 0
        x = gate_up(x, dtype=down.reads, tiled=tiled)
        return down(x if tiled else in_tiles(x, tile))

    def add_slices(self, partial: Tensor, out: Tensor) -> None:
        """Write the sum of a Linear's slices, [slices, n, stride], to ``out``, [n, v]."""
        rows, vocab = out.shape
        self.kernels.sum_slices[(rows, -(-vocab // SUM_BLOCK))](
            partial, out, rows, vocab, partial.shape[-1],
            SLICES=partial.shape[0], BLOCK=SUM_BLOCK, num_warps=4, **self._overlapped,
        )  # fmt: skip

    def attention(self, level: LevelRows, index: int, layer: LevelLayer, qkv: Tensor, how: Attention) -> Tensor:
        """Store keys and values in layer ``index`` of the cache, and attend: [n, heads * dim] for ``layer.out``."""
        model, cache, texts, rows = self.model, level.cache, level.texts, level.texts * level.rows
        heads, kv_heads, dim = model.q_heads, model.kv_heads, model.head_dim
        k_rows, v_rows = cache.buffer[0, index] if texts > 1 else cache.rows[index]
        head_stride, row_stride = k_rows.stride(0), k_rows.stride(1)
        query = self._empty(rows, heads, dim, dtype=torch.bfloat16)
        norm = layer.q_norm is not None
        self.kernels.rope_store[(rows, heads + 2 * kv_heads)](
            qkv, layer.qkv_bias if layer.qkv_bias is not None else qkv,
            layer.q_norm if norm else qkv, layer.k_norm if norm else qkv,
            model.inverse_frequency, level.depths, level.lengths, query, k_rows, v_rows,
            rows, level.start_row, row_stride, head_stride, model.attention_scaling, model.eps, level.rows,
            cache.rows.numel(), heads, kv_heads, qkv.shape[-1],
            SPLITS=qkv.shape[0], HAS_BIAS=layer.qkv_bias is not None, HAS_NORM=norm, HALF=dim // 2,
            HALF_BLOCK=next_power_of_two(dim // 2), num_warps=1, **self._overlapped,
        )  # fmt: skip
        group = next_power_of_two(level.rows * heads // kv_heads)
        chunk = max(16, min(how.chunk or group, group))
        chunks = -(-level.rows * heads // kv_heads // chunk)
        splits = how.splits
        while splits > max(FEWEST_SLICES, MOST_PROGRAMS // (kv_heads * texts * chunks)):
            splits //= 2
        sums = self._empty(2, splits, rows, heads)
        outs = self._empty(splits, rows, heads, dim)
        self.kernels.tree_attention[(kv_heads, splits, texts * chunks)](
            query, k_rows, v_rows, level.tree.ancestors.view(torch.int8), level.nodes, level.node_of_row, level.lengths,
            outs, sums[0], sums[1], level.rows, level.start_row, level.tree.size, level.tree.capacity,
            row_stride, head_stride, dim**-0.5, texts, cache.rows.numel(), heads, kv_heads,
            SPLITS=splits, M=chunk, BLOCK=how.block, D=dim,
            OPERAND=self.kernels.tl.bfloat16 if self.device.type == "cuda" else self.kernels.tl.float32,
            MASKS_PREFIX=how.masks_prefix, num_warps=how.warps, num_stages=how.stages, **self._overlapped,
        )  # fmt: skip
        attended = empty_rows(rows, heads * dim, self.device, layer.out.reads)
        self.kernels.merge_attention[(rows, heads)](
            outs, sums[0], sums[1], attended, rows, heads, SPLITS=splits, D=dim, TILE=layer.out.tile(rows), num_warps=1,
            **self._overlapped,
        )  # fmt: skip
        return attended

    def candidates(self, logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The largest ``count`` logits / temperature of every block of every row, and the blocks' parts of the softmax.

        Returns:
            Logits and tokens, [rows, blocks, count]; maxima, and sums of exp(logit - maximum), [2, rows, blocks].
        """
        rows, vocab = logits.shape
        blocks = -(-vocab // TOP_K_BLOCK)
        best = self._empty(rows, blocks, count)
        best_token = self._empty(rows, blocks, count, dtype=torch.int32)
        sums = self._empty(2, rows, blocks)
        self.kernels.block_candidates[(rows, blocks)](
            logits, best, best_token, sums[0], sums[1], vocab, 1.0 / temperature,
            BLOCKS=blocks, K=count, BLOCK=TOP_K_BLOCK, num_warps=4, **self._overlapped,
        )  # fmt: skip
        return best, best_token, sums

    def likeliest(self, logits: Tensor, count: int, temperature: float) -> Tensor:
        """The likeliest ``count`` tokens of every row, then their log-probabilities: float32 [rows, 2 ``count``]."""
        best, tokens, (maxima, sums) = self.candidates(logits, count, temperature)
        values, places = best.flatten(1).topk(count, dim=-1)
        highest = maxima.amax(dim=-1, keepdim=True)
        log_sum = highest + (sums * (maxima - highest).exp()).sum(dim=-1, keepdim=True).log()
        return torch.cat([tokens.flatten(1).gather(1, places).float(), values - log_sum], dim=1)

    def grow(self, level: LevelRows, logits: Tensor, width: int, temperature: float) -> None:
        """Append the ``width`` best children of the level's nodes to each tree."""
        best, best_token, sums = self.candidates(logits, width, temperature)
        blocks, tree = best.shape[1], level.tree
        self.kernels.grow_level[(level.texts,)](
            best, best_token, sums[0], sums[1], tree.tokens, tree.parents, tree.depths, tree.scores,
            tree.ancestors.view(torch.int8), level.nodes, level.rows, tree.size, tree.capacity,
            BLOCKS=blocks, BLOCKS_PADDED=next_power_of_two(blocks), K=width, WIDTH=width,
            ROWS=next_power_of_two(level.rows), CANDIDATES=next_power_of_two(blocks * width),
            CAPACITY=next_power_of_two(tree.capacity), num_warps=8, **self._overlapped,
        )  # fmt: skip


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """bfloat16 in ``dtype``, whose largest number takes the place of larger ones."""
    return x if x.dtype is dtype else x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
