"""Tree policies: which candidates of a draft level become nodes, and when to stop.

A policy never reads a tensor back to the host (``adaptive`` reads one number every few levels, see
:mod:`subspec.decoding.adaptive`). The draft's temperature affects the scores only, not the verification.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.tree import Tree


@dataclass(frozen=True)
class IterationOutcome:
    """The outcome of one draft-and-verify iteration of one or several texts, from which an adaptive policy learns.

    Attributes:
        levels: levels drafted.
        nodes: tree nodes verified, roots included.
        accepted: deepest accepted level of each text (0: only the bonus token was emitted).
        draft_s, verify_s: seconds spent drafting, and on the target pass with its verification.
    """

    levels: int
    nodes: int
    accepted: tuple[int, ...]
    draft_s: float
    verify_s: float


class TreePolicy(ABC):
    """The shape of draft trees.

    Attributes:
        max_depth: most levels that are verified.
        width: most nodes of a frontier.
        capacity: most nodes.
        pass_nodes: most nodes of a verification pass.
        draft_rows: most nodes that the draft runs.
        whole_levels: whether all nodes of a level, in order, are the next frontier.
    """

    max_depth: int
    width: int
    capacity: int
    pass_nodes: int
    draft_rows: int
    whole_levels: bool = True

    def grow(self, tree: Tree, frontier: Tensor, logits: Tensor, temperature: float) -> Tensor:
        """Append a level below ``frontier``.

        Args:
            tree: the tree, extended in place.
            frontier: int64 [f], the nodes that the draft has just run.
            logits: [f, vocabulary], the draft's logits after each of them.
            temperature: of the draft's distribution.

        Returns:
            The next frontier, int64 node numbers.
        """
        return self.select(tree, frontier, *likeliest(logits, self.sharpened(temperature), self.width))

    def sharpened(self, temperature: float) -> float:
        """The temperature of the tree's scores, given the draft's."""
        return temperature

    @abstractmethod
    def select(self, tree: Tree, frontier: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """As :meth:`grow`, from the likeliest tokens after each node.

        Args:
            tokens: int64 [f, n], best first; n is at least :attr:`width`.
            log_probs: float32 [f, n].
        """

    def begin_tree(self, texts: int = 1) -> None:  # noqa: B027 (optional)
        """Called before new trees, one for each of ``texts`` texts."""

    def wants_level(self, *trees: Tree) -> bool:
        """Whether to draft another level of all ``trees`` (the engine also stops at the length limit)."""
        return max(tree.levels for tree in trees) < self.max_depth

    def finish(self, tree: Tree) -> None:  # noqa: B027 (optional)
        """Prune the drafted tree before it is verified."""

    def learn(self, outcome: IterationOutcome) -> None:  # noqa: B027 (optional)
        """Take note of the last tree's outcome. Static shapes ignore it."""


def likeliest(logits: Tensor, temperature: float, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest ``count`` tokens of every row of ``logits`` [f, vocabulary], best first.

    Returns:
        Tokens, int64 [f, count], and their log-probabilities at ``temperature``, float32 [f, count].
    """
    scaled = logits.float() / temperature
    best, tokens = scaled.topk(count, dim=-1)
    return tokens, best - scaled.logsumexp(dim=-1, keepdim=True)


LEVEL_ROWS = 32
"""Nodes of a draft level of several texts together, at most: from there on the level's time grows with its nodes
(``experiments/rows``), and the last ones of a wide level are rarely accepted."""


class Beam(TreePolicy):
    """The paper's tree (SubSpec, section 3): every level keeps the best ``width`` of all children of the last.

    ``width=1`` is a chain. Trees that grow beside many others are narrower (:data:`LEVEL_ROWS`).

    Attributes:
        breadth: nodes of a level of the current trees.
    """

    def __init__(self, depth: int, width: int) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree.depth and tree.width must be at least 1, not {depth} and {width}")
        self.max_depth = depth
        self.width = self.breadth = width
        self.capacity = self.pass_nodes = 1 + depth * width
        self.draft_rows = 1 + (depth - 1) * width

    def begin_tree(self, texts: int = 1) -> None:
        self.breadth = self.width if texts == 1 else max(1, min(self.width, LEVEL_ROWS // texts))

    def select(self, tree: Tree, frontier: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        # The best `breadth` overall are among the best `breadth` of each row.
        joint = tree.scores.index_select(0, frontier)[:, None] + log_probs[:, : self.breadth]
        scores, chosen = joint.flatten().topk(self.breadth)
        return tree.append(tokens[:, : self.breadth].flatten()[chosen], frontier[chosen // self.breadth], scores)


def level_mass(tree: Tree) -> Tensor:
    """The draft's probability that the target's continuation runs through the deepest level: a scalar tensor."""
    if tree.confidence is not None:
        return tree.confidence
    return torch.exp(tree.scores[tree.size - tree.level_size : tree.size]).sum()


def level_masses(trees: Sequence[Tree]) -> list[float]:
    """:func:`level_mass` of every tree, read from the device at once."""
    first = trees[0]
    if len(trees) == 1:
        return [float(level_mass(first))]
    level = slice(first.size - first.level_size, first.size)
    alike = all(tree.size == first.size and tree.confidence is None for tree in trees)
    if alike and first.stack:  # trees that grow in step
        return first.stack["scores"][: len(trees), level].exp().sum(dim=1).tolist()
    return torch.stack([level_mass(tree) for tree in trees]).tolist()
