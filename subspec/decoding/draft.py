"""The one interface between the engine and whatever proposes tokens."""

from typing import Protocol

from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree


class Draft(Protocol):
    """Proposes a tree one level at a time.

    Per prompt the engine calls ``begin`` once and ``observe`` for every committed prefill chunk; per iteration
    ``expand`` once per level (the first call has the root alone) and ``commit`` once after verification.

    Attributes:
        temperature: of the draft's distribution; sharpens the tree only.
        needs_features: whether ``observe`` and ``commit`` want the target's hidden states (EAGLE).
        shares_cache: whether the draft keeps its rows in the target cache's draft region.
    """

    temperature: float
    needs_features: bool
    shares_cache: bool

    def begin(self, cache: KVCache) -> None:
        """A new prompt starts; ``cache`` is the target's, still empty."""

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        """``tokens`` int64 [c] were committed; ``features`` [c, hidden] are the target's final hidden states."""

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        """Logits [f, vocabulary] of the tokens that may follow the nodes ``frontier`` (int64 [f]).

        The frontier is the last level or, with some growths (``TreePolicy.whole_levels``), a part of it in any order.
        """

    def commit(self, tree: Tree, path: Tensor, features: Tensor | None) -> None:
        """The nodes ``path`` (int64 [n], root first) were accepted; ``features`` [n, hidden] belong to them.

        A growth may have taken nodes out since they were drafted: ``Tree.drafted_number`` has their old numbers.
        """
