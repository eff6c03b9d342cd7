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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspec.config.schema import SubstituteDraftConfig
from subspec.decoding.draft import LevelDraft, NextLevel, Perturb
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.kernels import launch
from subspec.levels.level_kernels import LevelKernels, LevelRows
from subspec.levels.model import NEVER, Attention, LevelModel
from subspec.utils.capture import captured

USUAL_ROWS = 8
"""Rows of the buffer for a level's logits, unless a level is wider."""


class Ending(NamedTuple):
    """The end of a level, behind its logits.

    Attributes:
        count: of nodes or tokens. temperature: of their log-probabilities.
        grows: whether every tree grows by the best ``count`` nodes; else the likeliest tokens are returned.
    """

    count: int
    temperature: float
    grows: bool


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
        levels: by level, what ``node_of_row`` was last written for: nodes of the tree up to the level and with it, and
            nodes of the level.
        graphs: with their results, by (tree, number of texts, level, nodes of the level, ending).
    """

    lengths: Tensor
    node_of_row: Tensor
    levels: dict[int, tuple[int, int]] = field(default_factory=dict)
    graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)


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
    whole_levels = True

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
        self.launches = launch.how(self.device, overlap)
        self.overlap = self.launches == launch.OVERLAPPING
        self._kernels = LevelKernels(model, self.overlap)
        self.cache: KVCache | None = None  # that the levels run on, from begin() on
        self._shared = _Shared()
        self._scratch = Tree(1, self.device)

    def facts(self) -> dict[str, Any]:
        """Number of captured graphs, and how their kernels are launched (:func:`subspec.kernels.launch.how`)."""
        graphs = 0 if self.cache is None else len(self._state.graphs)
        return {"graphs_captured": graphs, "draft_launches": self.launches}

    # ------------------------------------------------------------------------------- the draft interface

    def begin(self, cache: KVCache) -> None:
        self.cache = cache

    def fork(self) -> "CapturedDraft":
        other = copy.copy(self)
        other.cache, other._scratch = None, Tree(1, self.device)
        return other

    def move(self, cache: KVCache) -> None:
        self.cache = cache

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        pass

    @property
    def _state(self) -> _OnBuffer:
        known, sizes = self.cache.attached, (len(self.cache.buffer), self.cache.draft_rows)
        if self._shared not in known:
            known[self._shared] = _OnBuffer(*(torch.zeros(n, dtype=torch.int64, device=self.device) for n in sizes))
        return known[self._shared]

    # ----------------------------------------------------------------------- on a cache of the draft's own

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
        return self._run([(tree, self.cache)], len(frontier), None)

    def likeliest(self, tree: Tree, frontier: Tensor, temperature: float, count: int) -> Tensor:
        """After each node of the frontier, the whole last level: see :meth:`LevelKernels.likeliest`."""
        return self._run([(tree, self.cache)], len(frontier), Ending(count, temperature, grows=False))

    def read_length(self) -> None:
        """Take note of the prefix's length, for levels of a tree whose root is not run."""
        self._state.lengths[self.cache.place].fill_(self.cache.length)

    def captures(self, policy: TreePolicy) -> bool:
        return isinstance(policy, Beam)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        return self.extend_together([NextLevel(self, tree, frontier, perturb)], policy)[0]

    def extend_together(self, levels: Sequence[NextLevel], policy: TreePolicy) -> list[Tensor]:
        """One level of all texts; of greedy beams, the trees' new nodes are part of the captured graph.

        Several texts have the first caches of the buffer, in order, and trees of one shape.
        """
        texts, rows = [(own.tree, own.draft.cache) for own in levels], len(levels[0].frontier)
        assert len(texts) == 1 or [cache.place for _, cache in texts] == list(range(len(texts)))
        if any(own.perturb is not None for own in levels) or not self.captures(policy):
            logits = self._run(texts, rows, None).split(rows)
            return [own.grow(policy, part) for own, part in zip(levels, logits, strict=True)]
        self._run(texts, rows, Ending(policy.breadth, policy.sharpened(self.temperature), grows=True))
        for tree, _ in texts:
            tree.adopt_level(policy.breadth)
        return [tree.last_level for tree, _ in texts]

    # --------------------------------------------------------------------------------------- one level

    def _run(self, texts: Sequence[tuple[Tree, KVCache]], rows: int, ending: Ending | None) -> Tensor:
        """Run the last levels of trees of one shape; returns the logits, [texts * rows, vocabulary].

        Args:
            rows: of each text.
        """
        tree, count = texts[0][0], len(texts)
        if rows != tree.level_size:
            raise ValueError(f"captured levels draft whole levels: {rows} of {tree.level_size} nodes were asked for")
        state = self._state
        # Before the first level, of one row, is captured.
        self._logits_of(count * max(rows, ending.count if ending and ending.grows else 0))
        if tree.levels == 0:
            for _, cache in texts:
                state.lengths[cache.place].fill_(cache.length)
        self._remember(tree)
        if self.device.type != "cuda":
            return self._level(tree, count, ending)
        key = (id(tree), count, tree.levels, rows, ending)  # a graph holds its trees' addresses
        if key not in state.graphs:
            shared = self._shared
            state.graphs[key] = captured(lambda: self._level(tree, count, ending), shared.pool)
            shared.pool = state.graphs[key][0].pool()
        graph, result = state.graphs[key]
        graph.replay()
        return result

    def _remember(self, tree: Tree) -> None:
        """Store the nodes of the last level's draft rows, which differ with the width of trees (beside other texts)."""
        state, level = self._state, (tree.size, tree.level_size)
        if state.levels.get(tree.levels) == level:
            return
        state.levels = {n: known for n, known in state.levels.items() if n < tree.levels} | {tree.levels: level}
        first = self.cache.draft_rows - tree.size
        state.node_of_row[first : first + tree.level_size] = tree.last_level

    def _level(self, tree: Tree, texts: int, ending: Ending | None) -> Tensor:
        """The level's kernels; arguments and result as of :meth:`_run`, ``tree`` the first of the trees."""
        model, kernels, state, cache = self.model, self._kernels, self._state, self.cache
        last = slice(tree.size - tree.level_size, tree.size)
        tokens, depths = tree.tokens[last], tree.depths[last]
        if texts > 1:
            tokens, depths = (tree.stack[name][:texts, last].flatten().contiguous() for name in ("tokens", "depths"))
        lengths = state.lengths if texts > 1 else state.lengths[cache.place :]
        level = LevelRows(tree, cache, texts, tree.level_size, tree.last_level, depths, lengths, state.node_of_row)
        with launch.overlapping(self.overlap):
            residual, partial = kernels.embed(tokens), None
            for place, layer in enumerate(model.layers):
                index = place if layer.cache_layer is None else layer.cache_layer
                x = kernels.norm(residual, partial, layer.input_norm, layer.qkv)
                attended = kernels.attention(level, index, layer, layer.qkv(x), self.attention)
                x = kernels.norm(residual, layer.out(attended), layer.post_norm, layer.gate_up)
                partial = kernels.multiply(layer, x)
            logits = self._head(kernels.norm(residual, partial, model.final_norm, model.draft_head))
            if ending is None:
                return logits
            if not ending.grows:
                return kernels.likeliest(logits, ending.count, ending.temperature)
            kernels.grow(level, logits, ending.count, ending.temperature)
        return logits

    def _head(self, x: Tensor) -> Tensor:
        """Logits, bfloat16 [rows, vocabulary]; of a quantized head the sum of its slices."""
        model, out = self.model, self._logits_of(x.shape[0])
        known = out if self._shared.known is None else self._shared.known[: x.shape[0]]
        if model.draft_head is None:
            torch.mm(x, model.head.t(), out=known)
        else:
            self._kernels.add_slices(model.draft_head(x), known)
        if model.ids is not None:
            out.index_copy_(1, model.ids, known)
        return out

    def _logits_of(self, rows: int) -> Tensor:
        """One buffer for the logits of all levels, so that captured levels do not keep one tensor each."""
        shared = self._shared
        if shared.logits is None or shared.logits.shape[0] < rows:
            if self.cache is not None:
                self._state.graphs.clear()  # they write to the narrower buffer
            shape, ids = (max(rows, USUAL_ROWS), self.model.vocab_size), self.model.ids
            shared.logits = torch.full(shape, NEVER, dtype=torch.bfloat16, device=self.device)
            if ids is not None:
                shared.known = shared.logits.new_empty(shape[0], len(ids))
        return shared.logits[:rows]
