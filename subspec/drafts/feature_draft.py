"""A draft with a head on the target's hidden states and a KV cache of its own, whatever the head computes."""

import copy
from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from subspec.decoding.batch import DraftRows
from subspec.decoding.draft import Draft
from subspec.decoding.hidden import HiddenRequest
from subspec.decoding.kv_cache import KVCache, KVView
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle_head import EagleHead

SETTLE_ROWS = 256
"""Rows of a prompt written at once: bounds the workspace beside a long prefill chunk."""


class FeatureDraft(Draft):
    """Keeps the cache; a subclass writes the rows of committed tokens (:meth:`settle`) and drafts.

    Args:
        head: in the target's dtype, on its device.
        target: its embedding and LM head are the draft's, unless the head has its own.
        policy: of the trees that will be drafted, for sizes.
        temperature: of the draft distribution (EAGLE-2: 1).
        wants: hidden states of the target; None: those that the head asks for.

    Attributes:
        rows: the draft region of the head's own cache, from :meth:`begin` on.
        features: predicted ones by node number, so that a level finds its parents' wherever they are in the tree.
    """

    rows: DraftRows | None = None

    def __init__(
        self,
        head: EagleHead,
        target: TargetModel,
        policy: TreePolicy,
        temperature: float = 1.0,
        wants: HiddenRequest | None = None,
    ) -> None:
        super().__init__(temperature)
        shape = head.shape
        self.head, self.target, self.wants = head, target, wants or shape.wants(target.model.config)
        self._draft_rows = shape.draft_rows(policy)
        nodes = policy.capacity if shape.keeps_features else 0
        self.features = torch.zeros(nodes, shape.hidden, dtype=target.dtype, device=target.device)

    @property
    def cache(self) -> KVCache:
        """The head's own cache."""
        return self.rows.cache

    def begin(self, cache: KVCache) -> None:
        if self.rows is None or self.cache.max_length != cache.max_length:
            shape, target = self.head.shape, self.target
            sizes: dict[str, Any] = {"max_length": cache.max_length, "draft_rows": self._draft_rows, "target_rows": 0}
            sizes |= {"layers": shape.decoder_layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
            self.rows = DraftRows(KVCache(**sizes, dtype=target.dtype, device=target.device), target.device)
        self.cache.reset()
        self.rows.used = 0

    def fork(self) -> Self:
        other = copy.copy(self)
        other.features = torch.zeros_like(self.features)
        other.rows = None
        return other

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        """Write the rows of a prefill chunk."""
        assert hidden is not None
        self.settle(tokens, hidden)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Write the rows of the accepted nodes, with the target's hidden states in place of predicted ones."""
        assert hidden is not None
        self.settle(tree.tokens.index_select(0, path), hidden)
        self.rows.used = 0

    def append_rows(self, count: int) -> tuple[Tensor, KVView]:
        """Commit ``count`` rows, which the caller writes: their positions, int64 [count], and where they lie."""
        cache = self.cache
        positions = torch.arange(cache.length, cache.length + count, device=self.target.device)
        rows = (cache.draft_rows + cache.length, cache.draft_rows + cache.length + count)
        cache.extend(count)
        return positions, KVView(cache.rows, rows, rows)

    @abstractmethod
    def settle(self, tokens: Tensor, states: Tensor) -> None:
        """Write the rows of committed tokens, int64 [n], with the target's hidden states in ``wants``, [n, width]."""
