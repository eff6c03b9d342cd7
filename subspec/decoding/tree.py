"""The draft tree as tensors on the device, grown without host synchronisation.

Nodes are numbered in the order they are appended, level by level, so a parent's number is always smaller than
its children's. Node 0 is the root: the last emitted token, whose keys and values are not committed yet.
"""

import torch
from torch import Tensor

from subspec.utils.upload import upload

STACKED = ("tokens", "parents", "depths", "scores", "ancestors")
"""The tensors that differ between trees."""


class Tree:
    """A token tree with room for ``capacity`` nodes.

    Attributes (the first ``size`` entries are valid):
        tokens, parents, depths: int64 [capacity]; the root is its own parent, at depth 0.
        scores: float32 [capacity], cumulative log-probability under the draft (float16 would underflow
            around depth 25).
        ancestors: bool [capacity, capacity]; row i marks the path from the root to node i, both included.
        size: number of nodes; known on the host because tree policies are static schedules.
        levels: number of levels below the root.
        level_size: nodes of the deepest level (0 once the tree was pruned: it then grows no further).
        confidence: a draft's own estimate that the target's continuation runs through the deepest level, a scalar
            float32; None: it has none but the scores.
        stack: the tensors of all trees of :meth:`several`, [count, ...] each, by name; empty: it is alone.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.parents = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.depths = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.scores = torch.zeros(capacity, dtype=torch.float32, device=device)
        self.ancestors = torch.eye(capacity, dtype=torch.bool, device=device)
        self._identity = torch.eye(capacity, dtype=torch.bool, device=device)
        self._slots = torch.arange(capacity, device=device)
        self.size = 0
        self.levels = 0
        self.level_size = 0
        self.confidence: Tensor | None = None
        self._kept: Tensor | None = None
        self.stack: dict[str, Tensor] = {}

    @classmethod
    def several(cls, count: int, capacity: int, device: torch.device) -> "list[Tree]":
        """Trees whose tensors lie behind each other, so that a kernel grows the first ones together."""
        trees = [cls(capacity, device) for _ in range(count)]
        for name in STACKED if count > 1 else ():
            whole = torch.stack([getattr(tree, name) for tree in trees])
            for tree, own in zip(trees, whole, strict=True):
                setattr(tree, name, own)
                tree.stack[name] = whole
        return trees

    def plant(self, root: Tensor) -> Tensor:
        """Start a new tree from the token ``root`` (int64 [1]); returns the root's node number [1]."""
        self.tokens[0:1] = root
        self.size, self.levels, self.level_size = 1, 0, 1
        self.confidence = self._kept = None
        return self._slots[:1]

    def append(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Tensor:
        """Add one level.

        Args:
            tokens, parents: int64 [m]; parents are node numbers.
            scores: float32 [m], cumulative log-probabilities.

        Returns:
            The new nodes' numbers, int64 [m].
        """
        start, end = self.size, self.size + tokens.numel()
        if end > self.capacity:
            raise ValueError(f"{end} nodes exceed the tree's capacity of {self.capacity}")
        self.tokens[start:end] = tokens
        self.parents[start:end] = parents
        self.depths[start:end] = self.depths.index_select(0, parents) + 1
        self.scores[start:end] = scores
        self.ancestors[start:end] = self.ancestors.index_select(0, parents) | self._identity[start:end]
        self.adopt_level(end - start)
        return self.last_level

    def adopt_level(self, count: int) -> None:
        """Count ``count`` nodes behind the last one, whose entries are already written, as a level."""
        self.size, self.levels, self.level_size = self.size + count, self.levels + 1, count

    def keep(self, nodes: Tensor) -> None:
        """Remove all other nodes; the kept ones are renumbered in order. ``levels`` stays the number that was drafted.

        Args:
            nodes: int64 [n], ascending, the root first, every node with its parent. Not checked: no read-back.
        """
        count = nodes.numel()
        number = torch.zeros_like(self._slots).scatter_(0, nodes, self._slots[:count])
        for values in (self.tokens, self.depths, self.scores):
            values[:count] = values.index_select(0, nodes)
        self.parents[:count] = number.index_select(0, self.parents.index_select(0, nodes))
        block = self.ancestors.index_select(0, nodes).index_select(1, nodes)
        # Whole rows: a pass rounds its rows up, and entries behind the last node must stay invisible.
        self.ancestors[:count] = False
        self.ancestors[:count, :count] = block
        self.size, self.level_size, self._kept = count, 0, nodes

    def copy_from(self, other: "Tree") -> None:
        """Become a copy of a tree on the host, of at most this capacity, without waiting for the device."""
        count, device = other.size, self.tokens.device
        whole = upload(torch.stack([other.tokens[:count], other.parents[:count], other.depths[:count]]), device)
        for values, own in zip((self.tokens, self.parents, self.depths), whole, strict=True):
            values[:count] = own
        self.scores[:count] = upload(other.scores[:count], device, torch.float32)
        self.ancestors[:count, : other.capacity] = upload(other.ancestors[:count], device, torch.bool)
        self.size, self.levels, self.level_size = count, other.levels, other.level_size
        self._kept = None if other._kept is None else upload(other._kept, device)

    def drafted_number(self, nodes: Tensor) -> Tensor:
        """The numbers that ``nodes`` (int64 [n]) had while the tree grew."""
        return nodes if self._kept is None else self._kept.index_select(0, nodes)

    @property
    def last_level(self) -> Tensor:
        """Node numbers of the deepest level, int64 [level_size]."""
        return self._slots[self.size - self.level_size : self.size]
