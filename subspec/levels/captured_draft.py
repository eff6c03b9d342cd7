"""Draft levels on a GPU: nine kernels a layer, a level replayed as one CUDA graph.

The draft and its region of the KV cache are those of :class:`~subspec.drafts.substitute.SubstituteDraft`; the execution
differs: q/k/v and gate/up are one Linear each, the operations between the Linears are fused (``kernels/level.py``), and
a level from the embedding look-up to the tree's new nodes is captured once and replayed. With a fixed schedule of tree
growth everything but the tree's contents, the cache and the prefix length is constant, and the length is read from
device memory: one graph per level serves the whole run. Several texts, whose trees and caches lie behind each other and
grow in step, share a graph for each level and number of texts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from subspec.config.schema import SubstituteDraftConfig
from subspec.decoding.draft import LevelDraft, NextLevel, Perturb
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
    """The constants of a level; ``rows`` of each text."""

    rows: int
    used: int
    first_frontier: int
    first_new: int


@dataclass(eq=False)
class _Shared:
    """What a draft and its forks share: one memory pool, and one buffer for the logits of all levels."""

    pool: tuple[int, int] | None = None
    logits: Tensor | None = None
    known: Tensor | None = None


@dataclass(eq=False)
class _OnBuffer:
    """What holds addresses in a KV buffer, for the texts that have their caches in it.

    Attributes:
        lengths: int64 [texts], tokens of the prefixes.
        node_of_row: int64 [draft rows], the same for every text.
        graphs: with their logits, by (tree, number of texts, level, nodes of the level, new nodes of each tree).
    """

    lengths: Tensor
    node_of_row: Tensor
    graphs: dict[tuple[int, int, int, int, int | None], tuple[torch.cuda.CUDAGraph, Tensor]] = field(
        default_factory=dict
    )


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
            {"OVERLAP": True, "launch_pdl": True} if self.overlap else {}  # the interpreter knows no launch_pdl
        )
        self._cache: KVCache | None = None
        self._shared = _Shared()
        self._scratch = Tree(1, self.device)

    def facts(self) -> dict[str, Any]:
        """Number of captured graphs, and how their kernels are launched (:func:`subspec.kernels.launch.how`)."""
        graphs = 0 if self._cache is None else len(self._state.graphs)
        return {"graphs_captured": graphs, "draft_launches": self.launches}

    # ------------------------------------------------------------------------------- the draft interface

    def begin(self, cache: KVCache) -> None:
        self._cache = cache

    def fork(self) -> "CapturedDraft":
        other = copy.copy(self)
        other._cache, other._scratch = None, Tree(1, self.device)
        return other

    def move(self, cache: KVCache) -> None:
        self._cache = cache

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        pass

    @property
    def cache(self) -> KVCache:
        """The cache that the levels run on."""
        if self._cache is None:
            raise RuntimeError("begin() comes first")
        return self._cache

    @property
    def _state(self) -> _OnBuffer:
        cache = self.cache
        if self._shared not in cache.attached:
            sizes = len(cache.buffer), cache.draft_rows
            cache.attached[self._shared] = _OnBuffer(
                *(torch.zeros(size, dtype=torch.int64, device=self.device) for size in sizes)
            )
        return cache.attached[self._shared]

    # ----------------------------------------------------------------------- on a cache of the draft's own

    @property
    def whole_levels(self) -> bool:
        return True

    @property
    def node_of_row(self) -> Tensor:
        return self._state.node_of_row

    def rows_used(self, tree: Tree) -> int:
        """The rows of all levels but the last."""
        return tree.size - tree.level_size

    def warm_up(self, width: int) -> None:
        if self.device.type == "cuda":
            self._logits_of(width)
            self.append(torch.zeros(1, dtype=torch.int64, device=self.device))

    def append(self, tokens: Tensor) -> None:
        """Run one token (int64 [1]) behind the prefix and commit its row, as a level of its own."""
        self.expand(self._scratch, self._scratch.plant(tokens))
        self.cache.adopt(torch.full_like(tokens, self.cache.draft_rows - 1))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        """Logits of the frontier, which must be the whole last level."""
        if frontier.numel() != tree.level_size:
            raise ValueError(
                f"captured levels draft whole levels: {frontier.numel()} of {tree.level_size} nodes were asked for"
            )
        return self._run([(tree, self.cache)], frontier.numel(), None)

    def read_length(self) -> None:
        """Take note of the prefix's length, for levels of a tree whose root is not run."""
        self._state.lengths[self.cache.place].fill_(self.cache.length)

    def captures(self, policy: TreePolicy) -> bool:
        return isinstance(policy, Beam)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        """One level; of a greedy beam, the tree's new nodes are part of the captured graph."""
        if perturb is not None or not self.captures(policy):
            return super().extend(tree, frontier, policy, perturb)
        assert isinstance(policy, Beam)
        self._run([(tree, self.cache)], self._place(tree, policy.breadth).rows, policy.breadth)
        tree.adopt_level(policy.breadth)
        return tree.last_level

    def extend_together(self, levels: Sequence[NextLevel], policy: TreePolicy) -> list[Tensor]:
        """One level of all texts, which have the first caches of the buffer, in order, and trees of one shape."""
        texts = []
        for own in levels:
            assert isinstance(own.draft, CapturedDraft)
            texts.append((own.tree, own.draft.cache))
        assert [cache.place for _, cache in texts] == list(range(len(texts)))
        rows = levels[0].frontier.numel()
        if any(own.perturb is not None for own in levels) or not self.captures(policy):
            logits = self._run(texts, rows, None).split(rows)
            return [own.grow(policy, part) for own, part in zip(levels, logits, strict=True)]
        assert isinstance(policy, Beam)
        self._run(texts, rows, policy.breadth)
        for tree, _ in texts:
            tree.adopt_level(policy.breadth)
        return [tree.last_level for tree, _ in texts]

    # --------------------------------------------------------------------------------------- one level

    def _place(self, tree: Tree, rows: int) -> _Level:
        rows = 1 if tree.levels == 0 else rows
        return _Level(rows=rows, used=tree.size - rows, first_frontier=tree.size - rows, first_new=tree.size)

    def _run(self, texts: Sequence[tuple[Tree, KVCache]], rows: int, width: int | None) -> Tensor:
        """Run the last levels of trees of one shape; returns the logits, [texts * rows, vocabulary].

        Args:
            width: the trees grow by as many nodes each; None: they do not grow.
        """
        tree, count, state = texts[0][0], len(texts), self._state
        # Before the first level, of one row, is captured.
        self._logits_of(count * max(rows, width or 0))
        if tree.levels == 0:
            for _, cache in texts:
                state.lengths[cache.place].fill_(cache.length)
        place = self._place(tree, rows)
        if self.device.type != "cuda":
            return self._level(tree, count, place, width)
        key = (id(tree), count, tree.levels, rows, width)  # a graph holds its trees' addresses
        if key not in state.graphs:
            shared = self._shared
            state.graphs[key] = captured(lambda: self._level(tree, count, place, width), shared.pool)
            shared.pool = state.graphs[key][0].pool()
        graph, logits = state.graphs[key]
        graph.replay()
        return logits

    def _level(self, tree: Tree, texts: int, place: _Level, width: int | None) -> Tensor:
        """The level's kernels; with ``width`` the trees grow by as many nodes. Returns the logits.

        Args:
            tree: the first of ``texts`` trees that lie behind each other.
        """
        with launch.overlapping(self.overlap):
            return self._launch_level(tree, texts, place, width)

    def _launch_level(self, tree: Tree, texts: int, place: _Level, width: int | None) -> Tensor:
        model, rows = self.model, texts * place.rows
        level = slice(place.first_frontier, place.first_frontier + place.rows)
        nodes, tokens, depths = tree._slots[level], tree.tokens[level], tree.depths[level]
        if texts > 1:
            tokens, depths = (tree.stack[name][:texts, level].flatten().contiguous() for name in ("tokens", "depths"))
        residual = torch.empty(rows, model.hidden, dtype=torch.bfloat16, device=self.device)
        block = next_power_of_two(model.hidden)
        self._remember(self.cache.draft_rows - place.used - place.rows, nodes)
        self.kernels.embed_rows[(rows,)](
            model.embedding, tokens, residual, model.hidden, BLOCK=block, OVERLAP=self.overlap
        )
        partial: Tensor | None = None
        for place_among, layer in enumerate(model.layers):
            index = place_among if layer.cache_layer is None else layer.cache_layer
            x = self._norm(residual, partial, layer.input_norm)
            attended = self._attention(index, layer, layer.qkv(x), tree, texts, nodes, depths, place)
            x = self._norm(residual, layer.out(attended), layer.post_norm)
            partial = layer.down(layer.gate_up(x))
        x = self._norm(residual, partial, model.final_norm)
        logits = self._head(x)
        if width is not None:
            self._grow(tree, texts, nodes, logits, place, width)
        return logits

    def _head(self, x: Tensor) -> Tensor:
        """Logits, bfloat16 [rows, vocabulary]; of a quantized head the sum of its slices."""
        model, out = self.model, self._logits_of(x.shape[0])
        known = out if self._shared.known is None else self._shared.known[: x.shape[0]]
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
        shared = self._shared
        if shared.logits is None or shared.logits.shape[0] < rows:
            if self._cache is not None:
                self._state.graphs.clear()  # they write to the narrower buffer
            shape, ids = (max(rows, USUAL_ROWS), self.model.vocab_size), self.model.ids
            shared.logits = torch.full(shape, NEVER, dtype=torch.bfloat16, device=self.device)
            if ids is not None:
                shared.known = shared.logits.new_empty(shape[0], len(ids))
        return shared.logits[:rows]

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
        texts: int,
        nodes: Tensor,
        depths: Tensor,
        place: _Level,
    ) -> Tensor:
        model, rows, state = self.model, texts * place.rows, self._state
        cache = self.cache
        heads, kv_heads, dim = model.q_heads, model.kv_heads, model.head_dim
        k_rows, v_rows = cache.buffer[0, index] if texts > 1 else cache.rows[index]
        head_stride, row_stride = k_rows.stride(0), k_rows.stride(1)
        start_row = cache.draft_rows - place.used - place.rows
        lengths = state.lengths if texts > 1 else state.lengths[cache.place :]
        query = torch.empty(rows, heads, dim, dtype=torch.bfloat16, device=self.device)
        norm = layer.q_norm is not None
        self.kernels.rope_store[(rows, heads + 2 * kv_heads)](
            qkv,
            layer.qkv_bias if layer.qkv_bias is not None else qkv,
            layer.q_norm if norm else qkv,
            layer.k_norm if norm else qkv,
            model.inverse_frequency,
            depths,
            lengths,
            query,
            k_rows,
            v_rows,
            rows,
            start_row,
            row_stride,
            head_stride,
            model.attention_scaling,
            model.eps,
            rows // texts,
            cache.rows.numel(),
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
        # More texts are more programs: fewer slices then save the writing and reading of partial sums.
        splits = min(how.splits, max(8, 2 * how.splits // next_power_of_two(texts)))
        group = next_power_of_two(place.rows * heads // kv_heads)
        chunk = max(16, min(how.chunk or group, group))
        sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=self.device)
        outs = torch.empty(splits, rows, heads, dim, dtype=torch.float32, device=self.device)
        chunks = -(-place.rows * heads // kv_heads // chunk)
        self.kernels.tree_attention[(kv_heads, splits, texts * chunks)](
            query,
            k_rows,
            v_rows,
            tree.ancestors.view(torch.int8),
            nodes,
            state.node_of_row,
            lengths,
            outs,
            sums[0],
            sums[1],
            place.rows,
            start_row,
            place.used + place.rows,
            tree.capacity,
            row_stride,
            head_stride,
            dim**-0.5,
            texts,
            cache.rows.numel(),
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
            outs, sums[0], sums[1], attended, rows, heads, SPLITS=splits, D=dim, num_warps=1, **self._overlapped
        )
        return attended

    def _remember(self, start_row: int, nodes: Tensor) -> None:
        """Store the nodes of a level's draft rows, which are constant: before the capture, not per replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._state.node_of_row[start_row : start_row + nodes.numel()] = nodes

    def _grow(self, tree: Tree, texts: int, nodes: Tensor, logits: Tensor, place: _Level, width: int) -> None:
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
        self.kernels.grow_level[(texts,)](
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
            place.rows,
            place.first_new,
            tree.capacity,
            BLOCKS=blocks,
            BLOCKS_PADDED=next_power_of_two(blocks),
            K=width,
            WIDTH=width,
            ROWS=next_power_of_two(place.rows),
            CANDIDATES=next_power_of_two(blocks * width),
            CAPACITY=next_power_of_two(tree.capacity),
            num_warps=8,
            **self._overlapped,
        )
