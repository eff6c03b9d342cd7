"""A draft that computes every level of a tree in one forward, at the tree's root."""

from abc import abstractmethod

from torch import Tensor

from subspec.decoding.draft import Draft, Perturb
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy


class BlockLevels(Draft):
    """All nodes of a level share its logits, unless a subclass adds to them. No tree is deeper than ``levels``."""

    levels: int

    @abstractmethod
    def run_block(self, root: Tensor) -> Tensor:
        """Logits [levels, vocabulary of the target] of the tokens behind the token ``root``, int64 [1]."""

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        if tree.levels == 0:
            self._logits = self.run_block(tree.tokens[:1])
        return self._logits[tree.levels].expand(len(frontier), -1)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        if tree.levels == self.levels:
            return frontier[:0]
        return super().extend(tree, frontier, policy, perturb)
