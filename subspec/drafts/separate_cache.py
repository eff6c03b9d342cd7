"""A draft with a KV cache of its own, for a model that cannot read the target's keys and values.

The draft runs the prompt itself, in chunks, and drafts in the draft region of its own cache, as a substitute does in
the target's. After verification the rows of the accepted nodes move from the draft region to the prefix, so they are
not computed again. Accepted nodes that were never run, such as one of the deepest level, are run then.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from subspec.decoding.draft import Draft, LevelDraft, Perturb, fit_vocabulary
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy

PROMPT_ROWS = 256
"""Tokens of a prompt per pass of the draft."""


def prompt_rows(max_length: int) -> int:
    """Rows of the cache's target region: a chunk of the prompt."""
    return min(PROMPT_ROWS, max_length)


def twin(cache: KVCache, model: TargetModel) -> KVCache:
    """Another cache of ``model``, of the same sizes."""
    sizes = {"max_length": cache.max_length, "draft_rows": cache.draft_rows, "target_rows": cache.target_rows}
    return model.new_cache(**sizes)


class SeparateCacheDraft(Draft):
    """Drafts with another model than the target.

    Args:
        levels: runs a level of the tree, as modules or as captured graphs.
        model: the same model, for the prompt.
        max_length: most tokens of prompt and output together.
        draft_rows: most nodes of a tree that are run (``TreePolicy.draft_rows``).
        vocab_size: of the target.
        width: most nodes of a level.

    Attributes:
        cache: the draft's own.
    """

    def __init__(
        self,
        levels: LevelDraft,
        model: TargetModel,
        *,
        max_length: int,
        draft_rows: int,
        vocab_size: int,
        width: int = 1,
    ) -> None:
        super().__init__(levels.temperature)
        self.levels = levels
        self.model = model
        self.vocab_size = vocab_size
        self.cache = model.new_cache(max_length=max_length, draft_rows=draft_rows, target_rows=prompt_rows(max_length))
        self._width = width
        self._is_warm = False

    def fork(self) -> "SeparateCacheDraft":
        other = copy.copy(self)
        other.levels, other._is_warm = self.levels.fork(), False
        other.cache = twin(self.cache, self.model)
        return other

    def facts(self) -> dict[str, Any]:
        return {"graphs_captured": 0, **self.levels.facts()}

    def begin(self, cache: KVCache) -> None:
        self.cache.reset()
        self.levels.begin(self.cache)
        if not self._is_warm:
            # Else captured when the first deepest node is accepted, possibly in a timed text.
            self._is_warm = True
            self.levels.warm_up(self._width)
            self.cache.reset()
            self.levels.begin(self.cache)

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        """Run a chunk of the prompt."""
        for chunk in tokens.split(self.cache.target_rows):
            self.model.append(chunk, self.cache)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        return fit_vocabulary(self.levels.expand(tree, frontier), self.vocab_size)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        # Beyond the draft's vocabulary nothing is drafted; a greedy level needs no padding to the target's.
        if perturb is None and self.levels.captures(policy):
            return self.levels.extend(tree, frontier, policy)
        return super().extend(tree, frontier, policy, perturb)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Keep the accepted nodes' rows; run those behind them that no level did."""
        used = self.levels.rows_used(tree)
        first = self.cache.draft_rows - used
        # Rows are known by the numbers that nodes had before the policy pruned the tree.
        holds = self.levels.node_of_row[first:][None, :] == tree.drafted_number(path)[:, None]
        kept = min(path.numel(), tree.levels) if used else 0
        if not self.levels.whole_levels:
            # The host does not know which nodes of partly expanded levels were run: one more read-back.
            kept = int(holds.any(dim=1).sum())
        if kept:
            self.cache.adopt(holds[:kept].to(torch.int8).argmax(dim=1) + first)
        self.levels.commit(tree, path, None)
        if kept < path.numel():
            self.levels.append(tree.tokens.index_select(0, path[kept:]))
