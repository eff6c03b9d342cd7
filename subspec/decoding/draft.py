"""The interface between the engine and a draft."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from subspec.decoding.hidden import NO_HIDDEN, HiddenRequest
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.errors import ConfigError


class Perturb(Protocol):
    """Adds the sampling noise of a tree level, or of one ``ahead`` levels below it, to logits [f, vocabulary]."""

    def __call__(self, logits: Tensor, ahead: int = 0) -> Tensor: ...


class Draft(ABC):
    """Proposes a tree one level at a time.

    Per prompt the engine calls ``begin`` once and ``observe`` for every committed prefill chunk; per iteration
    ``plant`` once, ``extend`` once per level (the first call has the root alone), ``place`` once when the tree has its
    final shape, and ``commit`` once after verification.

    Attributes:
        wants: hidden states of the target that ``observe`` and ``commit`` receive.
        shares_cache: whether the draft keeps its rows in the draft region of the target's cache.
        extra_rows: rows of that region besides those of the policy's nodes (``TreePolicy.draft_rows``).

    Args:
        temperature: of the draft's distribution; sharpens the tree only.
    """

    wants: HiddenRequest = NO_HIDDEN
    shares_cache: bool = False
    extra_rows: int = 0

    def __init__(self, temperature: float) -> None:
        if temperature <= 0:
            raise ValueError(f"draft.temperature must be positive, not {temperature}")
        self.temperature = temperature

    @abstractmethod
    def begin(self, cache: KVCache) -> None:
        """Start a prompt; ``cache`` is the target's, still empty."""

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:  # noqa: B027 (optional)
        """Take note of committed prompt tokens.

        Args:
            tokens: int64 [c].
            hidden: the hidden states in ``wants``, [c, width]; None if it wants none.
        """

    def plant(self, tree: Tree, root: Tensor) -> Tree:
        """Start a tree from the token ``root`` (int64 [1], on the device).

        Args:
            tree: that will be verified.

        Returns:
            The tree that grows: ``tree``, or one on the host, which :meth:`place` copies to ``tree``.
        """
        tree.plant(root)
        return tree

    def place(self, tree: Tree) -> None:  # noqa: B027 (optional)
        """Copy the tree that has grown to ``tree``, unless it is that tree."""

    @abstractmethod
    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        """Logits [f, vocabulary] of the tokens that may follow the nodes ``frontier`` (int64 [f]).

        The frontier is the last level or, unless ``TreePolicy.whole_levels``, a part of it in any order.
        """

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        """Draft one level below ``frontier`` (int64 [f]); returns the next frontier, empty if nothing follows.

        A draft with an estimate of its own of the level's acceptance writes it to ``Tree.confidence``.

        Args:
            perturb: adds the noise of sampling to the logits; None: greedy.
        """
        return NextLevel(self, tree, frontier, perturb).grow(policy, self.expand(tree, frontier))

    def fork(self) -> "Draft":
        """A draft for another text that runs beside this one's: with the same weights and state of its own.

        Raises:
            ConfigError: the draft serves one text at a time.
        """
        raise ConfigError(
            f"decoding.texts: {type(self).__name__} drafts one text at a time: set decoding.texts=1, or another draft"
        )

    def move(self, cache: KVCache) -> None:  # noqa: B027 (optional)
        """The text goes on in ``cache``, which holds its prefix; between two trees."""

    def extend_together(self, levels: "Sequence[NextLevel]", policy: TreePolicy) -> list[Tensor]:
        """As :meth:`extend`, for several texts, whose drafts are this one and forks of it."""
        return [own.draft.extend(own.tree, own.frontier, policy, own.perturb) for own in levels]

    @abstractmethod
    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Take note of accepted nodes.

        Args:
            path: int64 [n], the root first. A policy may have pruned the tree since these nodes were drafted:
                ``Tree.drafted_number`` returns their numbers of that time.
            hidden: the hidden states in ``wants`` of these nodes, [n, width]; None if it wants none.
        """

    def passes(self, tree: Tree) -> int:
        """Passes of the draft's model that drafted ``tree``, before ``commit``."""
        return tree.levels

    def facts(self) -> dict[str, Any]:
        """Facts about the execution for the run's record: ``graphs_captured``, ``draft_launches``."""
        return {}


@dataclass(frozen=True)
class NextLevel:
    """The level to be drafted for one of several texts; attributes as the arguments of :meth:`Draft.extend`."""

    draft: Draft
    tree: Tree
    frontier: Tensor
    perturb: Perturb | None = None

    def grow(self, policy: TreePolicy, logits: Tensor) -> Tensor:
        """Append the level that the draft's ``logits`` [f, vocabulary] propose; returns the new frontier."""
        if self.perturb is not None:
            logits = self.perturb(logits)
        return policy.grow(self.tree, self.frontier, logits, self.draft.temperature)


class LevelDraft(Draft):
    """A draft that keeps its rows in the draft region of the cache that ``begin`` is given.

    On the target's cache it drafts with the target's keys and values; on a cache of its own it is the model of a
    :class:`~subspec.drafts.separate_cache.SeparateCacheDraft`.
    """

    @property
    @abstractmethod
    def whole_levels(self) -> bool:
        """Whether every frontier of this tree so far was the whole last level."""

    @property
    @abstractmethod
    def node_of_row(self) -> Tensor:
        """Node of each row of the draft region, int64 [draft rows]; valid for the rows in use."""

    @abstractmethod
    def fork(self) -> "LevelDraft": ...

    @abstractmethod
    def rows_used(self, tree: Tree) -> int:
        """Rows of the draft region that ``tree`` has filled."""

    @abstractmethod
    def append(self, tokens: Tensor) -> None:
        """Run ``tokens`` (int64 [n]) behind the prefix and commit their rows."""

    def warm_up(self, width: int) -> None:
        """Compile and capture ``append``, before anything is timed; it may write rows of an empty cache.

        Args:
            width: most nodes of a level.
        """

    def captures(self, policy: TreePolicy) -> bool:
        """Whether a greedy level and the tree's new nodes under ``policy`` are one captured graph."""
        return False


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits [n, v] cut or padded with -inf to [n, ``vocab_size``]: ids unknown to the draft are never drafted."""
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
