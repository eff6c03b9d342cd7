"""Drafting with an EAGLE head (arXiv 2401.15077, 2406.16858): it continues the target's features, not only its text.

Row i of the head pairs the embedding of token i+1 with the target's feature of token i, and stands at position i.
So behind L committed tokens the head has L-1 rows with true features, the feature of the last committed token waits
for the next token, and the root of a tree, the token just emitted, pairs with it. Every deeper node is paired with
the feature that the head itself predicted for its *parent*. (The published code feeds the root's feature to all
levels of a tree; that is not what the paper says and costs acceptance, so figures here may exceed its own.)

Rows of accepted nodes are written anew with the target's true features before the next tree, as EAGLE does.
"""

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache, KVView
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle_head import EagleHead

SETTLE_ROWS = 256
"""Rows of a prompt written at once: bounds the workspace beside a long prefill chunk."""


class EagleDraft:
    """Drafts with a head that has a KV cache of its own, of one layer.

    Args:
        head: in the target's dtype, on its device.
        decoder: the target; its embedding and LM head are the draft's.
        growth: of the trees that will be drafted, for sizes.
        temperature: of the draft distribution (EAGLE-2: 1).
    """

    needs_features = True
    shares_cache = False

    def __init__(
        self, head: EagleHead, decoder: TargetModel, growth: TreePolicy, temperature: float = 1.0
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"draft.temperature must be positive, not {temperature}")
        self.head = head
        self.decoder = decoder
        self.temperature = temperature
        self.growth = growth
        device, dtype = decoder.device, decoder.dtype
        # By node number, so that a level finds its parents' features wherever they are in the tree.
        self._predicted = torch.zeros(growth.capacity, head.shape.hidden, dtype=dtype, device=device)
        self._node_of_row = torch.zeros(growth.draft_rows, dtype=torch.int64, device=device)
        self._cache: KVCache | None = None
        self._waiting: Tensor | None = None
        self._used = 0

    @property
    def cache(self) -> KVCache:
        """The head's own rows: one per committed token but the first."""
        if self._cache is None:
            raise RuntimeError("begin() comes first")
        return self._cache

    def begin(self, cache: KVCache) -> None:
        own = self._cache
        if own is None or own.max_length != cache.max_length:
            shape = self.head.shape
            self._cache = KVCache(
                layers=1,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                max_length=cache.max_length,
                draft_rows=self.growth.draft_rows,
                target_rows=0,
                dtype=self.decoder.dtype,
                device=self.decoder.device,
            )
        self.cache.reset()
        self._waiting = None
        self._used = 0

    def observe(self, tokens: Tensor, features: Tensor | None) -> None:
        """Rows of a prefill chunk; its last feature waits for the token that comes first after it."""
        assert features is not None
        self._settle(tokens, features)

    def commit(self, tree: Tree, path: Tensor, features: Tensor | None) -> None:
        """Rows of the accepted nodes, with true features in place of predicted ones."""
        assert features is not None
        self._settle(tree.tokens.index_select(0, path), features)
        self._used = 0

    def _settle(self, tokens: Tensor, features: Tensor) -> None:
        if self._waiting is None:  # the text's first token follows no feature
            tokens, earlier = tokens[1:], features[:-1]
        else:
            earlier = torch.cat([self._waiting, features[:-1]])
        self._waiting = features[-1:].clone()  # not a view, which would keep the whole chunk
        for piece, before in zip(tokens.split(SETTLE_ROWS), earlier.split(SETTLE_ROWS), strict=True):
            if piece.numel():  # a first chunk of one token settles nothing
                self._write(piece, before)

    def _write(self, tokens: Tensor, earlier: Tensor) -> None:
        cache, count = self.cache, tokens.numel()
        positions = torch.arange(cache.length, cache.length + count, device=tokens.device)
        start = cache.draft_rows + cache.length
        cache.extend(count)
        rows = (start, start + count)
        self.head.store(self.decoder.embed(tokens), earlier, positions, KVView(cache.rows, rows, rows))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        cache, new = self.cache, frontier.numel()
        if tree.levels == 0:
            assert self._waiting is not None
            self._used = 0
            features = self._waiting
        else:
            features = self._predicted.index_select(0, tree.parents.index_select(0, frontier))
        view = cache.draft_view(self._used, new)
        # Rows are taken leftwards, so a row's node has to be looked up to know who may see it.
        start = cache.draft_rows - self._used - new
        self._node_of_row[start : start + new] = frontier
        drafted = tree.ancestors.index_select(0, frontier).index_select(1, self._node_of_row[start:])
        prefix = torch.ones(new, cache.length, dtype=torch.bool, device=frontier.device)
        hidden = self.head(
            self.decoder.embed(tree.tokens.index_select(0, frontier)),
            features,
            tree.depths.index_select(0, frontier) + cache.length,
            self.decoder.additive_mask(torch.cat([drafted, prefix], dim=1))[0, 0],
            view,
        )
        self._predicted.index_copy_(0, frontier, hidden)
        self._used += new
        return self.decoder.logits(hidden)
