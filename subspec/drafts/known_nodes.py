"""The nodes that the drafts of a cascade run: a tree on the host, copied to the device when a draft needs it."""

from collections.abc import Iterable

import numpy as np
import torch

from subspec.decoding.tree import Tree
from subspec.utils.upload import upload_to


class KnownNodes:
    """Nodes by parent and token. Their numbers stay while the tree grows, and name them in both drafts.

    Args:
        capacity: most nodes.
        context: tokens that :attr:`ends` keep.

    Attributes:
        parents, depths: of every node.
        ancestors: bool [capacity, capacity] on the host, as of a :class:`~subspec.decoding.tree.Tree`.
        ends: the last tokens of every node's path, at most ``context`` and the node's own.
    """

    def __init__(self, capacity: int, context: int, device: torch.device) -> None:
        self.capacity, self.context = capacity, context
        self._tree = Tree(capacity, device)
        self.ancestors = np.zeros((capacity, capacity), dtype=bool)
        self.clear()

    def __len__(self) -> int:
        return len(self.parents)

    def clear(self) -> None:
        """Forget all nodes."""
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.ends: list[tuple[int, ...]] = []
        self._children: dict[tuple[int, int], int] = {}
        self._tree.size = 0

    def plant(self, token: int, before: tuple[int, ...]) -> None:
        """Start with a root behind the tokens ``before``."""
        self.clear()
        self._add(0, 0, (*before, token))

    def _add(self, parent: int, depth: int, end: tuple[int, ...]) -> None:
        number = len(self)
        self.ancestors[number] = self.ancestors[parent] if number else False
        self.ancestors[number, number] = True
        self.parents.append(parent)
        self.depths.append(depth)
        self.ends.append(end)

    def children(self, pairs: Iterable[tuple[int, int]]) -> list[int]:
        """Numbers of nodes by (parent, token); new ones are added."""
        found = []
        for pair in pairs:
            number = self._children.get(pair)
            if number is None:
                number = self._children[pair] = len(self)
                parent, token = pair
                self._add(parent, self.depths[parent] + 1, (*self.ends[parent][-self.context :], token))
            found.append(number)
        return found

    def on_device(self) -> Tree:
        """All nodes as a tree without levels: nodes of any depth follow each other."""
        tree, new = self._tree, slice(self._tree.size, len(self))
        if new.start < new.stop:
            upload_to(tree.tokens[new], [end[-1] for end in self.ends[new]])
            upload_to(tree.parents[new], self.parents[new])
            upload_to(tree.depths[new], self.depths[new])
            upload_to(tree.ancestors[new], self.ancestors[new])
            tree.size, tree.levels, tree.level_size = len(self), max(self.depths), 0
        return tree
