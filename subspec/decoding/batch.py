"""Tokens that one target pass runs: a run of text behind the committed prefix, or a tree."""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVView


@dataclass(frozen=True)
class TokenBatch:
    """One text's share of a pass.

    Attributes:
        tokens: int64 [n].
        depths: int64 [n], positions counted from the end of the prefix.
        past: tokens of the prefix.
        view: the cache rows: written behind the prefix, read from position 0 on.
        levels: largest depth.
        ancestors: bool [n, n]; row i marks the path from the root to node i, both included. None: a run of text, whose
            depths are 0 .. n - 1.
    """

    tokens: Tensor
    depths: Tensor
    past: int
    view: KVView
    levels: int
    ancestors: Tensor | None = None

    @classmethod
    def chain(cls, tokens: Tensor, past: int, view: KVView) -> "TokenBatch":
        """A run of text: every token sees the prefix and the tokens before it."""
        depths = torch.arange(tokens.numel(), device=tokens.device)
        return cls(tokens, depths, past, view, tokens.numel() - 1)

    @property
    def positions(self) -> Tensor:
        """int64 [n]."""
        return self.depths + self.past

    @property
    def length(self) -> int:
        """No position reaches it."""
        return self.past + self.levels + 1

    def visible(self) -> Tensor:
        """Which cache row of ``view`` each token attends to, its own included: bool [n, past + n]."""
        n, device = self.tokens.numel(), self.tokens.device
        if self.ancestors is None:
            return torch.ones(n, self.past + n, dtype=torch.bool, device=device).tril_(self.past)
        prefix = torch.ones(n, self.past, dtype=torch.bool, device=device)
        return torch.cat([prefix, self.ancestors], dim=1)
