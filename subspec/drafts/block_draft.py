"""``draft=block_head``: DFlash, JetSpec and DSpark heads, one forward per tree.

Every committed position has a row of true keys and values in each of the head's layers. A tree begins with one forward
of the block behind them, whose logits every level takes its row of. So a level costs a top-k, and, with a Markov head,
one small product. No tree is deeper than the block.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from subspec.decoding.draft import Draft, Perturb, fit_vocabulary
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle import EagleMemory, EagleSpec
from subspec.drafts.feature_draft import SETTLE_ROWS, FeatureDraft
from subspec.drafts.spec import BuiltDraft


class BlockLevels(Draft):
    """Computes every level of a tree in one forward, at the tree's root. No tree is deeper than ``levels``.

    All nodes of a level share its logits, unless a subclass adds to them.
    """

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


class BlockDraft(BlockLevels, FeatureDraft):
    """Drafts with a block head; arguments as of :class:`~subspec.drafts.feature_draft.FeatureDraft`."""

    @property
    def levels(self) -> int:
        return self.head.shape.levels

    def settle(self, tokens: Tensor, states: Tensor) -> None:
        for piece in states.split(SETTLE_ROWS):
            self.head.write(self.head.fuse(piece)[None], *self.append_rows(len(piece)))

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        logits, tokens = super().expand(tree, frontier), tree.tokens.index_select(0, frontier)
        added, acceptance = self.head.branch(tokens), self.head.acceptance(self._hidden[tree.levels], tokens)
        if acceptance is not None:
            expected = tree.scores.index_select(0, frontier).softmax(0) @ acceptance
            tree.confidence = expected if tree.confidence is None else tree.confidence * expected
        return logits if added is None else logits + added[:, : logits.shape[-1]]

    def run_block(self, root: Tensor) -> Tensor:
        head, target, shape, past = self.head, self.target, self.head.shape, self.cache.length
        tokens = torch.full((shape.block,), shape.mask_id, device=target.device)
        tokens[:1] = root
        positions = torch.arange(past, past + shape.block, device=target.device)
        visible = torch.ones(shape.block, shape.block + past, dtype=torch.bool, device=target.device)
        if shape.causal:
            visible[:, : shape.block].tril_()
        view = self.cache.draft_view(0, shape.block)
        hidden = head.run(head.embed(tokens, target)[None], positions, target.additive_mask(visible), view)[0]
        self._hidden = hidden[-shape.levels :]
        logits = head.logits(self._hidden, target)[:, : target.vocab_size]
        return fit_vocabulary(logits, target.vocab_size)


class BlockMemory(EagleMemory):
    """A block head with its own KV cache; the logits of a tree's levels are part of a level."""

    name = "block"
    draft = BlockDraft


class BlockSpec(EagleSpec):
    """``draft=block_head``: a published or a planted head, in the target's dtype."""

    memory = BlockMemory

    def build(self, target: TargetModel) -> BuiltDraft:
        shape, depth, built = self._loaded.head.shape, self.context.policy.max_depth, super().build(target)
        if depth > shape.levels:
            self.context.note(
                f"tree.depth={depth}: the {shape.method} head drafts {shape.levels} levels (block_size={shape.block}), "
                "and no tree is deeper"
            )
        built.facts |= {"method": shape.method, "block": shape.levels}
        built.summary = f"{shape.method} {built.summary}, {shape.levels} levels"
        return built
