"""Target passes over a tree as CUDA graphs: one launch in place of ten per decoder layer.

Plain decoding of a small target waits for launches: 19 of 21 ms a token for 135 M parameters on an H200. A captured
pass reads what changes between passes (tokens, depths, ancestors, the prefix's length) from tensors that stay in
place. Its attention is launched for the longest text. Splits behind a row's position add nothing, so the bits are
those of a pass that is not captured.
"""

import torch

from subspec.decoding.batch import TokenBatch
from subspec.decoding.hidden import Hidden
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.utils.capture import captured


class CapturedPasses:
    """Passes over the first rows of one tree, behind any prefix (on a CPU, for tests, as plain calls).

    Args:
        target: in batch-invariant arithmetic, with layers that stay in place.
        tree: its tensors are read by every pass.
        cache: the target's.
        levels: largest depth of the tree's nodes.
        hidden_of: decoder layers whose residual streams are returned, too.
    """

    def __init__(
        self, target: TargetModel, tree: Tree, cache: KVCache, levels: int, hidden_of: tuple[int, ...]
    ) -> None:
        self._target, self.tree, self.cache = target, tree, cache
        self._levels, self._hidden_of = levels, hidden_of
        self._prefix = torch.zeros(1, dtype=torch.int64, device=target.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Hidden]] = {}
        self._pool: tuple[int, int] | None = None

    def run(self, rows: int) -> Hidden:
        """Hidden states of the tree's first ``rows`` entries, valid until the next pass."""
        self._prefix.fill_(self.cache.length)
        if self._target.device.type != "cuda":
            return self._forward(rows)
        if rows not in self._graphs:
            self._graphs[rows] = captured(lambda: self._forward(rows), self._pool)
            self._pool = self._graphs[rows][0].pool()
        graph, hidden = self._graphs[rows]
        graph.replay()
        return hidden

    def _forward(self, rows: int) -> Hidden:
        tree, cache = self.tree, self.cache
        batch = TokenBatch(
            tree.tokens[:rows],
            tree.depths[:rows],
            cache.max_length - self._levels - 1,
            cache.target_view(rows),
            self._levels,
            tree.ancestors[:rows, :rows],
            prefix=self._prefix,
        )
        return self._target.forward(batch, hidden_of=self._hidden_of)
