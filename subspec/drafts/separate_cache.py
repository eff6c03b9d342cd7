"""A draft with a KV cache of its own: what it has computed for a token is kept once the token is accepted.

The model that drafts is not the target, so it cannot read the target's keys and values. It runs the prompt itself,
in chunks, and drafts in the draft region of its own cache exactly as a substitute does in the target's. After
verification the rows of the accepted nodes move from the draft region to the prefix: nothing that was accepted is
computed again. Only an accepted node of the deepest level, which no level ever ran, is run alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.substitute import SubstituteDraft
from subspec.levels.captured_draft import CapturedDraft

PROMPT_ROWS = 256
"""Tokens of a prompt per pass of the draft."""


def prompt_rows(max_length: int) -> int:
    """Rows of the cache's target region: a chunk of the prompt."""
    return min(PROMPT_ROWS, max_length)


class SeparateCacheDraft:
    """Drafts with another model than the target.

    Args:
        levels: runs a level of the tree on whatever cache it is given, module by module or fused.
        decoder: the same model, for the prompt.
        max_length: most tokens of prompt and output together.
        draft_rows: most nodes of a tree that are run (``TreePolicy.draft_rows``).
        vocab_size: of the target.
        width: most nodes of a level.

    Attributes:
        cache: the draft's own.
    """

    needs_features = False
    shares_cache = False

    def __init__(
        self,
        levels: SubstituteDraft | CapturedDraft,
        decoder: TargetModel,
        *,
        max_length: int,
        draft_rows: int,
        vocab_size: int,
        width: int = 1,
    ) -> None:
        self.levels = levels
        self.decoder = decoder
        self.temperature = levels.temperature
        self.vocab_size = vocab_size
        self.cache = decoder.new_cache(
            max_length=max_length, draft_rows=draft_rows, target_rows=prompt_rows(max_length)
        )
        self._width = width
        self._is_ready = False
        if isinstance(levels, CapturedDraft):
            # The engine takes a draft that has this for one that can draft and grow a level in one go.
            self.level_step: Callable[[TreePolicy], Callable[[Tree], None]] = levels.level_step

    @property
    def graphs_captured(self) -> int:
        """Number of captured graphs, for the record; 0 where levels run module by module."""
        return getattr(self.levels, "graphs_captured", 0)

    @property
    def launches(self) -> str:
        """How the levels' kernels are launched, for the record; empty where levels run module by module."""
        return getattr(self.levels, "launches", "")

    def begin(self, cache: KVCache) -> None:
        self.cache.reset()
        self.levels.begin(self.cache)
        if not self._is_ready and isinstance(self.levels, CapturedDraft):
            self._is_ready = True
            if self.levels.device.type == "cuda":
                # Captured now, not when the first deepest node is accepted, which may be in a timed text.
                self.levels.reserve(self._width)
                self.levels.append(torch.zeros(1, dtype=torch.int64, device=self.levels.device))
                self.cache.reset()
                self.levels.begin(self.cache)

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        """Run a chunk of the prompt."""
        for chunk in tokens.split(self.cache.target_rows):
            self.decoder.append(chunk, self.cache)

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        return fit_vocabulary(self.levels.expand(tree, frontier), self.vocab_size)

    def commit(self, tree: Tree, path: Tensor, features: Tensor | None) -> None:
        """Keep the accepted nodes' rows; run the last of them if no level did."""
        used = self.levels.rows_used(tree)
        first = self.cache.draft_rows - used
        # Rows were noted down by the numbers that nodes had before the growth took some of them out.
        holds = self.levels.node_of_row[first:][None, :] == tree.drafted_number(path)[:, None]
        has_run = path.numel() - 1 < tree.levels
        if not self.levels.whole_levels:
            # Of a level that was expanded in part the host does not know whether the node was in it: the one
            # read-back of such a tree, after the iteration's own.
            has_run = bool(holds[-1].any())
        kept = path.numel() if has_run else path.numel() - 1
        if kept:
            self.cache.adopt(holds[:kept].to(torch.int8).argmax(dim=1) + first)
        self.levels.commit(tree, path, None)
        if not has_run:
            self.levels.append(tree.tokens.index_select(0, path[-1:]))


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits [n, v] cut or padded with -inf to [n, ``vocab_size``]: what the draft does not know is never drafted."""
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
