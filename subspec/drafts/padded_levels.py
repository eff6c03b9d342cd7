"""A cascade's passes of the substitute: over nodes of any depth, in any order.

A captured level runs all nodes of a tree's deepest level, whose number and rows are constant. A cascade's pass runs
nodes of several levels, and their number differs. So captured passes are the levels of a tree of their own, which names
every node a second time; its depths, tokens and ancestors are those of the first, and some of its rows are padding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from subspec.decoding.draft import LevelDraft
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import likeliest
from subspec.drafts.known_nodes import KnownNodes
from subspec.levels.captured_draft import CapturedDraft
from subspec.utils.upload import pinned, upload


class KnownLevels:
    """Runs known nodes through a substitute.

    Args:
        levels: the substitute.
        draft_rows: most nodes that it runs for a tree.

    Attributes:
        rows: of every pass; 0: as many as it has nodes.
    """

    rows = 0

    def __init__(self, levels: LevelDraft, draft_rows: int, device: torch.device) -> None:
        self.levels, self.draft_rows, self.device = levels, draft_rows, device

    def begin(self, cache: KVCache) -> None:
        """As of a :class:`~subspec.decoding.draft.Draft`."""
        self.levels.begin(cache)

    def commit(self, tree: Tree, path: Tensor) -> None:
        """As of a draft; the next pass is the first of a tree."""
        self.levels.commit(tree, path, None)

    def expand(self, known: KnownNodes, nodes: Sequence[int]) -> Tensor:
        """Logits [n, vocabulary] after ``nodes``; the next pass may overwrite them."""
        return self.levels.expand(known.on_device(), upload(nodes, self.device))

    def likeliest(self, known: KnownNodes, nodes: Sequence[int], temperature: float, count: int) -> Tensor:
        """The likeliest ``count`` tokens after ``nodes``, then their log-probabilities: float32 [n, 2 ``count``].

        Ids below 2**24 are exact in float32.
        """
        tokens, log_probs = likeliest(self.expand(known, nodes), temperature, count)
        return torch.cat([tokens.float(), log_probs], dim=1)


class PaddedLevels(KnownLevels):
    """Captured passes.

    Args:
        levels: run whole levels.
        rows: of every pass: most nodes at a time.
        passes: most passes of a tree.
    """

    levels: CapturedDraft

    def __init__(self, levels: CapturedDraft, rows: int, passes: int, device: torch.device) -> None:
        super().__init__(levels, 1 + rows * passes, device)
        self.rows = rows
        self._tree = Tree(self.draft_rows, device)  # its root is never run
        self._ran = np.full(self.draft_rows, -1)  # the nodes of its nodes; -1: padding
        # Of a pass, on the host: pinned once, since pinning takes longer than copying.
        self._tokens, self._depths, self._visible = (
            pinned(torch.zeros_like(values[:rows], device="cpu"), device)
            for values in (self._tree.tokens, self._tree.depths, self._tree.ancestors)
        )
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def begin(self, cache: KVCache) -> None:
        super().begin(cache)
        self._tree.plant(torch.zeros_like(self._tree.tokens[:1]))

    def commit(self, tree: Tree, path: Tensor) -> None:
        super().commit(tree, path)
        self._tree.plant(torch.zeros_like(self._tree.tokens[:1]))

    def expand(self, known: KnownNodes, nodes: Sequence[int]) -> Tensor:
        self._place(known, nodes)
        return self.levels.expand(self._tree, self._tree.last_level)[: len(nodes)]

    def likeliest(self, known: KnownNodes, nodes: Sequence[int], temperature: float, count: int) -> Tensor:
        self._place(known, nodes)
        return self.levels.likeliest(self._tree, self._tree.last_level, temperature, count)[: len(nodes)]

    def _place(self, known: KnownNodes, nodes: Sequence[int]) -> None:
        """Make ``nodes`` the deepest level."""
        own, new = self._tree, slice(self._tree.size, self._tree.size + self.rows)
        if new.stop > own.capacity:
            raise ValueError(f"a tree takes at most {own.capacity // self.rows} passes")
        if own.levels == 0:
            self.levels.read_length()
        own.adopt_level(self.rows)
        padding = [0] * (self.rows - len(nodes))
        self._ran[new] = [*nodes, *[-1] * len(padding)]
        ran, visible = self._ran[: own.size], self._visible.numpy()
        if self._copied is not None:
            self._copied.synchronize()  # the last pass's; done, if its result was read
        visible[:] = False
        visible[: len(nodes), : own.size] = known.ancestors[np.asarray(nodes)[:, None], ran] & (ran >= 0)
        self._tokens.numpy()[:] = [*(known.ends[node][-1] for node in nodes), *padding]
        self._depths.numpy()[:] = [*(known.depths[node] for node in nodes), *padding]
        own.tokens[new].copy_(self._tokens, non_blocking=True)
        own.depths[new].copy_(self._depths, non_blocking=True)
        own.ancestors[new].copy_(self._visible, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))
