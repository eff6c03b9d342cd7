"""The tokens of one forward pass: a run of text behind the committed prefix, a verification tree, or a draft level."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache, KVView, KVViews
from subspec.decoding.tree import Tree


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of one text in a pass.

    Attributes:
        tokens: int64 [n].
        depths: int64 [n], positions counted from the end of the prefix.
        past: tokens of the prefix; its upper bound if ``prefix`` is given.
        view: the cache rows that the pass writes and reads.
        levels: largest depth.
        ancestors: bool [n, n]; row i marks the path from the root to node i, both included. None: a run of text, whose
            depths are 0 .. n - 1, or a draft level.
        drafted: bool [n, rows in front of the prefix], the draft rows that each token attends to; None: the rows lie
            behind the prefix.
        prefix: int64 [1], tokens of the prefix, of a captured pass that is replayed behind any prefix.
    """

    tokens: Tensor
    depths: Tensor
    past: int
    view: KVView
    levels: int
    ancestors: Tensor | None = None
    drafted: Tensor | None = None
    prefix: Tensor | None = None

    @classmethod
    def chain(cls, tokens: Tensor, past: int, view: KVView) -> "TokenBatch":
        """A run of text: every token attends to the prefix and the tokens before it."""
        depths = torch.arange(tokens.numel(), device=tokens.device)
        return cls(tokens, depths, past, view, tokens.numel() - 1)

    @property
    def parts(self) -> "tuple[TokenBatch, ...]":
        """The batch itself, as a :class:`JointBatch` of one text."""
        return (self,)

    @property
    def positions(self) -> Tensor:
        """int64 [n], below ``length``."""
        if self.prefix is None:
            return self.depths + self.past
        return (self.depths + self.prefix).clamp_(max=self.length - 1)

    @property
    def length(self) -> int:
        """Upper bound of the positions, exclusive."""
        return self.past + self.levels + 1

    def visible(self) -> Tensor:
        """The rows of ``view`` that each token attends to, its own included: bool [n, rows]."""
        n, device = self.tokens.numel(), self.tokens.device
        if self.ancestors is None and self.drafted is None:
            return torch.ones(n, self.past + n, dtype=torch.bool, device=device).tril_(self.past)
        prefix = torch.ones(n, self.past, dtype=torch.bool, device=device)
        if self.drafted is not None:
            return torch.cat([self.drafted, prefix], dim=1)
        assert self.ancestors is not None
        return torch.cat([prefix, self.ancestors], dim=1)


@dataclass(frozen=True)
class JointBatch:
    """The tokens of several texts in a pass, one text's behind the other's. Each text sees its own rows alone.

    Attributes:
        parts: the texts' tokens; no two write the same cache.
    """

    parts: tuple[TokenBatch, ...]

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [n]."""
        return torch.cat([part.tokens for part in self.parts])

    @cached_property
    def positions(self) -> Tensor:
        """int64 [n]."""
        return torch.cat([part.positions for part in self.parts])

    @property
    def view(self) -> KVViews:
        """The cache rows of all texts."""
        return KVViews([part.view for part in self.parts])

    def visible(self) -> Tensor:
        """As :meth:`TokenBatch.visible`, for the rows of :attr:`view`."""
        return torch.block_diag(*(part.visible() for part in self.parts))


def join(batches: Sequence[TokenBatch]) -> TokenBatch | JointBatch:
    """One pass over all ``batches``."""
    return batches[0] if len(batches) == 1 else JointBatch(tuple(batches))


class DraftRows:
    """Assigns the rows of a cache's draft region to tree nodes, level by level.

    Attributes:
        used: number of rows in use.
        node_of_row: int64 [draft rows], the node of each row; valid for the rows in use.
    """

    def __init__(self, cache: KVCache, device: torch.device) -> None:
        self.cache = cache
        self.used = 0
        self.node_of_row = torch.zeros(cache.draft_rows, dtype=torch.int64, device=device)

    def take(self, tree: Tree, frontier: Tensor) -> TokenBatch:
        """A pass over the nodes ``frontier`` (int64 [f]), whose keys and values go to the next free rows."""
        cache, new = self.cache, frontier.numel()
        view = cache.draft_view(self.used, new)
        self.used += new
        # Rows are assigned leftwards.
        start = cache.draft_rows - self.used
        self.node_of_row[start : start + new] = frontier
        return TokenBatch(
            tree.tokens.index_select(0, frontier),
            tree.depths.index_select(0, frontier),
            cache.length,
            view,
            tree.levels,
            drafted=tree.ancestors.index_select(0, frontier).index_select(1, self.node_of_row[start:]),
        )
