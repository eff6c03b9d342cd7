"""Target passes over trees as CUDA graphs: one launch in place of ten per decoder layer.

Plain decoding of a small target waits for launches: 19 of 21 ms a token for 135 M parameters on an H200. A captured
pass reads what changes between passes (tokens, depths, ancestors, the prefix's length) from tensors that stay in
place. Its attention is launched for the longest text. Splits behind a row's position add nothing, so the bits are
those of a pass that is not captured.
"""

from collections.abc import Sequence

import torch

from subspec.decoding.batch import TokenBatch, join
from subspec.decoding.hidden import Hidden
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.utils.capture import captured


class CapturedPasses:
    """Passes over the first rows of the first trees, behind any prefixes (on a CPU, for tests, as plain calls).

    Args:
        target: in batch-invariant arithmetic, with layers that stay in place.
        trees: their tensors are read by every pass.
        caches: the target's, one for each tree.
        levels: largest depth of the trees' nodes.
        hidden_of: decoder layers whose residual streams are returned, too.
    """

    def __init__(
        self,
        target: TargetModel,
        trees: Sequence[Tree],
        caches: Sequence[KVCache],
        levels: int,
        hidden_of: tuple[int, ...],
    ) -> None:
        self._target, self.trees, self.caches = target, trees, caches
        self._levels, self._hidden_of = levels, hidden_of
        self._prefixes = [torch.zeros(1, dtype=torch.int64, device=target.device) for _ in trees]
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Hidden]] = {}
        self._pool: tuple[int, int] | None = None

    def run(self, texts: int, rows: int) -> Hidden:
        """Hidden states of the first ``rows`` entries of the first ``texts`` trees, valid until the next pass."""
        for cache, prefix in zip(self.caches[:texts], self._prefixes, strict=False):
            prefix.fill_(cache.length)
        if self._target.device.type != "cuda":
            return self._forward(texts, rows)
        key = texts, rows
        if key not in self._graphs:
            self._graphs[key] = captured(lambda: self._forward(texts, rows), self._pool)
            self._pool = self._graphs[key][0].pool()
        graph, hidden = self._graphs[key]
        graph.replay()
        return hidden

    def _forward(self, texts: int, rows: int) -> Hidden:
        batches = [
            TokenBatch(
                tree.tokens[:rows],
                tree.depths[:rows],
                cache.max_length - self._levels - 1,
                cache.target_view(rows),
                self._levels,
                tree.ancestors[:rows, :rows],
                prefix=prefix,
            )
            for tree, cache, prefix in zip(self.trees[:texts], self.caches, self._prefixes, strict=False)
        ]
        return self._target.forward(join(batches), hidden_of=self._hidden_of)
