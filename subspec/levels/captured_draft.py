"""Draft levels on a GPU: nine kernels a layer, a level replayed as one CUDA graph.

The draft and its region of the KV cache are those of :class:`~subspec.drafts.substitute.SubstituteDraft`; the execution
differs: q/k/v and gate/up are one Linear each, the operations between the Linears are fused (``kernels/level.py``), and
a level from the embedding look-up to the tree's new nodes is captured once and replayed. With a fixed schedule of tree
growth everything but the tree's contents, the cache and the prefix length is constant, and the length is read from
device memory: one graph per level serves the whole run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspec.config.schema import SubstituteDraftConfig
from subspec.decoding.draft import LevelDraft, Perturb
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.kernels import launch
from subspec.kernels.modules import triton_kernels
from subspec.levels.model import NEVER, Attention, LevelLayer, LevelModel
from subspec.utils.capture import captured
from subspec.utils.rounding import next_power_of_two

TOP_K_BLOCK = 4096
SUM_BLOCK = 4096

USUAL_ROWS = 8
"""Rows of the buffer for a level's logits, unless a level is wider."""


@dataclass
class _Level:
    """The constants of a level."""

    rows: int
    used: int
    first_frontier: int
    first_new: int


class CapturedDraft(LevelDraft):
    """A draft whose levels run as captured graphs (on a CPU, for tests, as plain calls).

    Args:
        model: the layers and the tensors shared with the target.
        temperature: of the draft distribution.
        attention: settings of attention.
        overlap: whether kernels start while the one before still runs (:mod:`subspec.kernels.launch`); None: if the
            device supports it.
    """

    shares_cache = True

    def __init__(
        self,
        model: LevelModel,
        temperature: float = SubstituteDraftConfig.temperature,
        *,
        attention: Attention = Attention(),  # noqa: B008 (frozen)
        overlap: bool | None = None,
    ) -> None:
        super().__init__(temperature)
        self.model = model
        self.attention = attention
        self.device = model.final_norm.device
        self.kernels = triton_kernels("level", self.device)
        self.launches = launch.how(self.device, overlap)
        self.overlap = self.launches == launch.OVERLAPPING
        self._overlapped: dict[str, bool] = (
            {"OVERLAP": True, "launch_pdl": True}
            if self.overlap
            else {}  # the interpreter knows no launch_pdl
        )
        self._length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._cache: KVCache | None = None
        self._graphs: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: tuple[int, int] | None = None
        self._logits: Tensor | None = None
        self._known: Tensor | None = None
        self._node_of_row = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._length_is_set = False
        self._scratch = Tree(1, self.device)

    def facts(self) -> dict[str, Any]:
        """Number of captured graphs, and how their kernels are launched (:func:`subspec.kernels.launch.how`)."""
        return {"graphs_captured": len(self._graphs), "draft_launches": self.launches}

    # ------------------------------------------------------------------------------- the draft interface

    def begin(self, cache: KVCache) -> None:
        if self._cache is not cache:
            self._graphs.clear()  # they hold the old cache's addresses
            self._cache = cache
            self._node_of_row = torch.zeros(cache.draft_rows, dtype=torch.int64, device=self.device)
        self._length_is_set = False

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        self._length_is_set = False

    # ----------------------------------------------------------------------- on a cache of the draft's own

    @property
    def whole_levels(self) -> bool:
        return True

    @property
    def node_of_row(self) -> Tensor:
        return self._node_of_row

    def rows_used(self, tree: Tree) -> int:
        """The rows of all levels but the last."""
        return tree.size - tree.level_size

    def warm_up(self, width: int) -> None:
        if self.device.type == "cuda":
            self._logits_of(width)
            self.append(torch.zeros(1, dtype=torch.int64, device=self.device))

    def append(self, tokens: Tensor) -> None:
        """Run one token (int64 [1]) behind the prefix and commit its row, as a level of its own."""
        cache = self._cache
        assert cache is not None
        self._length_is_set = False
        self.expand(self._scratch, self._scratch.plant(tokens))
        self._length_is_set = False
        cache.adopt(torch.full_like(tokens, cache.draft_rows - 1))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        """Logits of the frontier, which must be the whole last level."""
        if frontier.numel() != tree.level_size:
            raise ValueError(
                f"captured levels draft whole levels: {frontier.numel()} of {tree.level_size} nodes were asked for"
            )
        return self._run(tree, frontier.numel(), None)

    def captures(self, policy: TreePolicy) -> bool:
        return isinstance(policy, Beam)

    def extend(
        self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None
    ) -> Tensor:
        """One level; of a greedy beam, the tree's new nodes are part of the captured graph."""
        if perturb is not None or not self.captures(policy):
            return super().extend(tree, frontier, policy, perturb)
        self._run(tree, self._place(tree, policy.width).rows, policy.width)
        tree.adopt_level(policy.width)
        return tree.last_level

    # --------------------------------------------------------------------------------------- one level

    def _place(self, tree: Tree, rows: int) -> _Level:
        rows = 1 if tree.levels == 0 else rows
        return _Level(rows=rows, used=tree.size - rows, first_frontier=tree.size - rows, first_new=tree.size)

    def _run(self, tree: Tree, rows: int, width: int | None) -> Tensor:
        cache = self._cache
        assert cache is not None
        self._logits_of(max(rows, width or 0))  # before the first level, of one row, is captured
        if not self._length_is_set:
            self._length.fill_(cache.length)
            self._length_is_set = True
        place = self._place(tree, rows)
        if self.device.type != "cuda":
            return self._level(tree, place, width)
        key = (id(tree), tree.levels, width is not None)  # a graph holds its tree's addresses
        if key not in self._graphs:
            self._capture(key, tree, place, width)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, key: tuple[int, int, bool], tree: Tree, place: _Level, width: int | None) -> None:
        self._graphs[key] = captured(lambda: self._level(tree, place, width), self._pool)
        self._pool = self._graphs[key][0].pool()

    def _level(self, tree: Tree, place: _Level, width: int | None) -> Tensor:
        """The level's kernels; with ``width`` the tree grows by as many nodes. Returns the logits."""
        with launch.overlapping(self.overlap):
            return self._launch_level(tree, place, width)

    def _launch_level(self, tree: Tree, place: _Level, width: int | None) -> Tensor:
        model, rows = self.model, place.rows
        nodes = tree._slots[place.first_frontier : place.first_frontier + rows]
        tokens = tree.tokens[place.first_frontier : place.first_frontier + rows]
        depths = tree.depths[place.first_frontier : place.first_frontier + rows]
        residual = torch.empty(rows, model.hidden, dtype=torch.bfloat16, device=self.device)
        block = next_power_of_two(model.hidden)
        cache = self._cache
        assert cache is not None
        self._remember(cache.draft_rows - place.used - rows, nodes)
        self.kernels.embed_rows[(rows,)](
            model.embedding, tokens, residual, model.hidden, BLOCK=block, OVERLAP=self.overlap
        )
        partial: Tensor | None = None
        for place_among, layer in enumerate(model.layers):
            index = place_among if layer.cache_layer is None else layer.cache_layer
            x = self._norm(residual, partial, layer.input_norm)
            attended = self._attention(index, layer, layer.qkv(x), tree, nodes, depths, place)
            x = self._norm(residual, layer.out(attended), layer.post_norm)
            partial = layer.down(layer.gate_up(x))
        x = self._norm(residual, partial, model.final_norm)
        logits = self._head(x)
        if width is not None:
            self._grow(tree, nodes, logits, place, width)
        return logits

    def _head(self, x: Tensor) -> Tensor:
        """Logits, bfloat16 [rows, vocabulary]; of a quantized head the sum of its slices."""
        model, out = self.model, self._logits_of(x.shape[0])
        known = out if self._known is None else self._known[: x.shape[0]]
        if model.draft_head is None:
            assert model.head is not None
            torch.mm(x, model.head.t(), out=known)
        else:
            self._add_slices(model.draft_head(x), known)
        if model.ids is not None:
            out.index_copy_(1, model.ids, known)
        return out

    def _add_slices(self, partial: Tensor, out: Tensor) -> None:
        rows, vocab = out.shape
        self.kernels.sum_slices[(rows, -(-vocab // SUM_BLOCK))](
            partial,
            out,
            rows,
            vocab,
            partial.shape[-1],
            SLICES=partial.shape[0],
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **self._overlapped,
        )

    def _logits_of(self, rows: int) -> Tensor:
        """One buffer for the logits of all levels, so that captured levels do not keep one tensor each."""
        if self._logits is None or self._logits.shape[0] < rows:
            self._graphs.clear()  # they write to the narrower buffer
            shape, ids = (max(rows, USUAL_ROWS), self.model.vocab_size), self.model.ids
            self._logits = torch.full(shape, NEVER, dtype=torch.bfloat16, device=self.device)
            if ids is not None:
                self._known = self._logits.new_empty(shape[0], len(ids))
        return self._logits[:rows]

    def _norm(self, residual: Tensor, partial: Tensor | None, weight: Tensor) -> Tensor:
        rows, hidden = residual.shape
        out = torch.empty_like(residual)
        self.kernels.add_rms_norm[(rows,)](
            residual,
            residual if partial is None else partial,
            weight,
            out,
            rows,
            self.model.eps,
            hidden,
            0 if partial is None else partial.shape[-1],
            SPLITS=0 if partial is None else partial.shape[0],
            BLOCK=next_power_of_two(hidden),
            num_warps=8,
            **self._overlapped,
        )
        return out

    def _attention(
        self,
        index: int,
        layer: LevelLayer,
        qkv: Tensor,
        tree: Tree,
        nodes: Tensor,
        depths: Tensor,
        place: _Level,
    ) -> Tensor:
        model, rows, cache = self.model, place.rows, self._cache
        assert cache is not None
        heads, kv_heads, dim = model.q_heads, model.kv_heads, model.head_dim
        k_rows, v_rows = cache.rows[index, 0], cache.rows[index, 1]
        head_stride, row_stride = k_rows.stride(0), k_rows.stride(1)
        start_row = cache.draft_rows - place.used - rows
        query = torch.empty(rows, heads, dim, dtype=torch.bfloat16, device=self.device)
        norm = layer.q_norm is not None
        self.kernels.rope_store[(rows, heads + 2 * kv_heads)](
            qkv,
            layer.qkv_bias if layer.qkv_bias is not None else qkv,
            layer.q_norm if norm else qkv,
            layer.k_norm if norm else qkv,
            model.inverse_frequency,
            depths,
            self._length,
            query,
            k_rows,
            v_rows,
            rows,
            start_row,
            row_stride,
            head_stride,
            model.attention_scaling,
            model.eps,
            heads,
            kv_heads,
            qkv.shape[-1],
            SPLITS=qkv.shape[0],
            HAS_BIAS=layer.qkv_bias is not None,
            HAS_NORM=norm,
            HALF=dim // 2,
            HALF_BLOCK=next_power_of_two(dim // 2),
            num_warps=1,
            **self._overlapped,
        )
        how = self.attention
        splits, group = how.splits, next_power_of_two(rows * heads // kv_heads)
        chunk = max(16, min(how.chunk or group, group))
        sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=self.device)
        outs = torch.empty(splits, rows, heads, dim, dtype=torch.float32, device=self.device)
        self.kernels.tree_attention[(kv_heads, splits, -(-rows * heads // kv_heads // chunk))](
            query,
            k_rows,
            v_rows,
            tree.ancestors.view(torch.int8),
            nodes,
            self._node_of_row,
            self._length,
            outs,
            sums[0],
            sums[1],
            rows,
            start_row,
            place.used + rows,
            tree.capacity,
            row_stride,
            head_stride,
            dim**-0.5,
            heads,
            kv_heads,
            SPLITS=splits,
            M=chunk,
            BLOCK=how.block,
            D=dim,
            OPERAND=self.kernels.tl.bfloat16 if self.device.type == "cuda" else self.kernels.tl.float32,
            MASKS_PREFIX=how.masks_prefix,
            num_warps=how.warps,
            num_stages=how.stages,
            **self._overlapped,
        )
        attended = torch.empty(rows, heads * dim, dtype=torch.bfloat16, device=self.device)
        self.kernels.merge_attention[(rows, heads)](
            outs,
            sums[0],
            sums[1],
            attended,
            rows,
            heads,
            SPLITS=splits,
            D=dim,
            num_warps=1,
            **self._overlapped,
        )
        return attended

    def _remember(self, start_row: int, nodes: Tensor) -> None:
        """Store the nodes of a level's draft rows, which are constant: before the capture, not per replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._node_of_row[start_row : start_row + nodes.numel()] = nodes

    def _grow(self, tree: Tree, nodes: Tensor, logits: Tensor, place: _Level, width: int) -> None:
        rows, vocab = logits.shape
        blocks = -(-vocab // TOP_K_BLOCK)
        best = torch.empty(rows, blocks, width, dtype=torch.float32, device=self.device)
        best_token = torch.empty(rows, blocks, width, dtype=torch.int32, device=self.device)
        sums = torch.empty(2, rows, blocks, dtype=torch.float32, device=self.device)
        self.kernels.block_candidates[(rows, blocks)](
            logits,
            best,
            best_token,
            sums[0],
            sums[1],
            vocab,
            1.0 / self.temperature,
            BLOCKS=blocks,
            K=width,
            BLOCK=TOP_K_BLOCK,
            num_warps=4,
            **self._overlapped,
        )
        self.kernels.grow_level[(1,)](
            best,
            best_token,
            sums[0],
            sums[1],
            tree.tokens,
            tree.parents,
            tree.depths,
            tree.scores,
            tree.ancestors.view(torch.int8),
            nodes,
            rows,
            place.first_new,
            tree.capacity,
            BLOCKS=blocks,
            BLOCKS_PADDED=next_power_of_two(blocks),
            K=width,
            WIDTH=width,
            ROWS=next_power_of_two(rows),
            CANDIDATES=next_power_of_two(blocks * width),
            CAPACITY=next_power_of_two(tree.capacity),
            num_warps=8,
            **self._overlapped,
        )
