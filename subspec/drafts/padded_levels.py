"""Captured levels for nodes of any depth: every pass has the same number of rows, some of them padding.

A captured level runs all nodes of a tree's deepest level, whose number and rows are constant. A cascade's pass runs
nodes of several levels, and their number differs. So the passes are the levels of a tree of their own, which names
every node a second time; its depths, tokens and ancestors are those of the first.
"""

import torch
from torch import Tensor
from torch.nn import functional

from subspec.decoding.draft import Draft
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.levels.captured_draft import CapturedDraft


class PaddedLevels(Draft):
    """Runs any nodes of a tree in one captured pass.

    Args:
        levels: run whole levels.
        rows: of every pass: most nodes at a time.
        passes: most passes of a tree.
    """

    shares_cache = True

    def __init__(self, levels: CapturedDraft, rows: int, passes: int, device: torch.device) -> None:
        super().__init__(levels.temperature)
        self.levels, self.rows = levels, rows
        self.draft_rows = 1 + rows * passes
        self._tree = Tree(self.draft_rows, device)  # its root is never run
        self._ran = torch.full((self.draft_rows,), -1, device=device)  # the nodes of its nodes; -1: padding

    def begin(self, cache: KVCache) -> None:
        self.levels.begin(cache)
        self._tree.plant(torch.zeros_like(self._tree.tokens[:1]))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        own, first = self._tree, self._tree.size
        nodes = functional.pad(frontier, (0, self.rows - frontier.numel()), value=-1)
        if first + self.rows > own.capacity:
            raise ValueError(f"a tree takes at most {own.capacity // self.rows} passes")
        if own.levels == 0:
            self.levels.read_length()
        own.adopt_level(self.rows)
        new, known = slice(first, own.size), nodes.clamp(min=0)
        self._ran[new] = nodes
        own.tokens[new] = tree.tokens.index_select(0, known)
        own.depths[new] = tree.depths.index_select(0, known)
        ran = self._ran[: own.size]
        visible = tree.ancestors.index_select(0, known).index_select(1, ran.clamp(min=0))
        own.ancestors[new, : own.size] = visible & (ran >= 0) & (nodes >= 0)[:, None]
        return self.levels.expand(own, own.last_level)[: frontier.numel()]

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        self.levels.commit(tree, path, hidden)
        self._tree.plant(self._tree.tokens[:1].clone())

    def facts(self) -> dict[str, object]:
        return self.levels.facts()
