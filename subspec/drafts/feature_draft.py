"""A draft with a head on the target's hidden states and a KV cache of its own, whatever the head computes."""

import copy
from abc import abstractmethod
from typing import Self

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
    """

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
        self.target, self.wants = target, wants or shape.wants(target.model.config)
        self._sizes = {
            "layers": shape.decoder_layers,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "draft_rows": shape.draft_rows(policy),
        }
        self._rows: DraftRows | None = None

    @property
    def rows(self) -> DraftRows:
        """The draft region of the head's own cache."""
        if self._rows is None:
            raise RuntimeError("begin() comes first")
        return self._rows

    @property
    def cache(self) -> KVCache:
        """The head's own cache."""
        return self.rows.cache

    def begin(self, cache: KVCache) -> None:
        if self._rows is None or self.cache.max_length != cache.max_length:
            own = KVCache(
                **self._sizes,
                max_length=cache.max_length,
                target_rows=0,
                dtype=self.target.dtype,
                device=self.target.device,
            )
            self._rows = DraftRows(own, self.target.device)
        self.cache.reset()
        self.rows.used = 0

    def fork(self) -> Self:
        other = copy.copy(self)
        other._rows = None
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
