"""The substitute draft (SubSpec, arXiv 2509.18344, section 3): the target itself with quantized decoder Linears.

It shares the target's embeddings, norms, rotary tables, LM head and KV cache. Its own rows live in the cache's
draft region for one iteration only: the committed prefix it attends to always holds the target's exact keys and
values, which is why its acceptance stays high.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree


def share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A second module graph over the very same parameters and buffers; its modules can be replaced freely."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class SubstituteDraft:
    """Drafts with the substitute on the target's cache.

    Args:
        substitute: a graph made by :func:`share_parameters` whose decoder Linears were quantized.
        temperature: of the draft distribution (paper: 0.2).

    Attributes:
        whole_levels: whether every frontier of this tree so far was the whole last level.
    """

    needs_features = False
    shares_cache = True

    def __init__(self, substitute: PreTrainedModel, temperature: float = 0.2) -> None:
        if temperature <= 0:
            raise ValueError(f"draft.temperature must be positive, not {temperature}")
        self.decoder = TargetModel(substitute)
        self.temperature = temperature
        self._cache: KVCache | None = None
        self._used = 0
        self._node_of_row = torch.empty(0, dtype=torch.int64)
        self.whole_levels = True

    def begin(self, cache: KVCache) -> None:
        self._cache = cache
        self._used, self.whole_levels = 0, True
        if self._node_of_row.numel() != cache.draft_rows:
            self._node_of_row = torch.zeros(cache.draft_rows, dtype=torch.int64, device=self.decoder.device)

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        """Nothing to do: the committed rows are in the shared cache."""

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        cache, used, new = self._cache, self._used, frontier.numel()
        assert cache is not None
        view = cache.draft_view(used, new)
        # Rows are taken leftwards, so a row's node has to be looked up to know who may see it.
        start = cache.draft_rows - used - new
        self._node_of_row[start : start + new] = frontier
        drafted = tree.ancestors.index_select(0, frontier).index_select(1, self._node_of_row[start:])
        prefix = torch.ones(new, cache.length, dtype=torch.bool, device=frontier.device)
        hidden = self.decoder.forward(
            tree.tokens.index_select(0, frontier),
            tree.depths.index_select(0, frontier) + cache.length,
            torch.cat([drafted, prefix], dim=1),
            view,
        )
        self._used += new
        self.whole_levels = self.whole_levels and new == tree.level_size
        return self.decoder.logits(hidden)

    def commit(self, tree: Tree, path: Tensor, features: Tensor | None) -> None:
        """The draft's approximate rows are dropped; the target has written exact ones for the accepted nodes."""
        self._used, self.whole_levels = 0, True

    # ------------------------------------------------------ what a draft with a cache of its own asks besides

    @property
    def node_of_row(self) -> Tensor:
        """Node number of each row of the draft region, int64; right for the rows that are in use."""
        return self._node_of_row

    def rows_used(self, tree: Tree) -> int:
        """Rows of the draft region that ``tree`` has filled."""
        return self._used

    def append(self, tokens: Tensor) -> None:
        """Run ``tokens`` (int64 [n]) behind the prefix and commit their rows."""
        assert self._cache is not None
        self.decoder.append(tokens, self._cache)
