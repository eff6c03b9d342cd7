"""Target passes over the trees and prompt pieces of several texts, and their logits in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.batch import TokenBatch, join
from subspec.decoding.captured_pass import CapturedPasses
from subspec.decoding.hidden import Hidden, HiddenRequest
from subspec.decoding.target_model import TargetModel
from subspec.decoding.text import Place, Text
from subspec.utils.rounding import round_up

LOGITS_ROWS = 512
"""Rows whose logits are in memory at once, unless one tree has more: of several texts, tokens are chosen in pieces."""

JOINING_ROWS = 256
"""Prompt tokens per pass, of all joining texts together, while others decode: a pass takes little longer for them."""


@dataclass(frozen=True)
class Share:
    """A text's rows of a target pass.

    Attributes:
        is_tree: whether the rows are a tree's; else a piece of the prompt.
        levels: largest depth of the rows whose logits are needed.
        hidden: of all rows of the pass. first, rows: the text's part of them.
        count: rows whose logits are needed, the first ones of a tree, or the last one of a prompt.
    """

    text: Text
    is_tree: bool
    levels: int
    hidden: Hidden
    first: int
    rows: int
    count: int

    @property
    def own_hidden(self) -> Hidden:
        """The hidden states of this text's rows."""
        return self.hidden.rows(self.first, self.rows)


class SharedPass:
    """Runs one target pass for several texts.

    Args:
        wants: hidden states that the drafts read.
        row_multiple: rows of a tree are rounded up to it.
        prefill_chunk: most prompt tokens of a pass.
        captured: passes over trees; None: they are launched one by one.
    """

    def __init__(
        self,
        target: TargetModel,
        wants: HiddenRequest,
        row_multiple: int,
        prefill_chunk: int,
        captured: CapturedPasses | None,
    ) -> None:
        self.target, self.wants = target, wants
        self.row_multiple, self.prefill_chunk = row_multiple, prefill_chunk
        self.captured = captured

    def run(self, drafting: Sequence[Text], reading: Sequence[Text]) -> list[Share]:
        """Verify the trees of ``drafting`` and read on in the prompts of ``reading``."""
        places = [text.own for text in drafting]
        rows = [round_up(place.tree.size, self.row_multiple) for place in places]
        pieces = self._pieces(reading, beside=bool(drafting))
        reading, chains = [text for text, _ in pieces], [chain for _, chain in pieces]
        read = [chain.tokens.numel() for chain in chains]
        if self.captured is not None and drafting:
            rows = [max(rows)] * len(rows)
            trees, prompts = self.captured.run(len(drafting), rows[0]), None
            if chains:
                prompts = self.target.forward(join(chains), hidden_of=self.wants.layers)
        else:
            batches = [tree_batch(*own) for own in zip(places, rows, strict=True)]
            trees = prompts = self.target.forward(join([*batches, *chains]), hidden_of=self.wants.layers)
        shares, first = [], 0
        for text, own in zip(drafting, rows, strict=True):
            shares.append(Share(text, True, text.own.tree.levels, trees, first, own, text.own.tree.size))
            first += own
        first = first if prompts is trees else 0
        for text, own in zip(reading, read, strict=True):
            assert prompts is not None
            shares.append(Share(text, False, 0, prompts, first, own, int(own == text.unread.numel())))
            self._commit_prompt(shares[-1])
            first += own
        return shares

    def trees(self, places: Sequence[Place], rows: int) -> Hidden:
        """Hidden states of the first ``rows`` entries of every place's tree, one text's behind the other's."""
        if self.captured is not None:
            return self.captured.run(len(places), rows)
        batch = join([tree_batch(place, rows) for place in places])
        return self.target.forward(batch, hidden_of=self.wants.layers)

    def groups(self, shares: Sequence[Share]) -> list[list[Share]]:
        """The shares whose logits are needed, in groups that are computed one after the other."""
        groups: list[list[Share]] = []
        for share in shares:
            if share.is_tree:
                if groups and sum(own.rows for own in groups[-1]) + share.rows <= LOGITS_ROWS:
                    groups[-1].append(share)
                else:
                    groups.append([share])
        ended = [share for share in shares if share.count and not share.is_tree]
        return [*groups, ended] if ended else groups

    def logits(self, group: Sequence[Share]) -> tuple[Tensor, list[slice]]:
        """Logits [n, vocabulary] of a group, and each share's rows of them."""
        first, last = group[0], group[-1]
        if not first.is_tree:
            ends = [share.hidden.final[share.first + share.rows - 1 :][:1] for share in group]
            final = ends[0] if len(ends) == 1 else torch.cat(ends)
            return self.target.logits(final), [slice(n, n + 1) for n in range(len(group))]
        final = first.hidden.final[first.first : last.first + last.rows]
        starts = [share.first - first.first for share in group]
        rows = [slice(start, start + own.count) for start, own in zip(starts, group, strict=True)]
        return self.target.logits(final)[: rows[-1].stop], rows

    def _pieces(self, reading: Sequence[Text], *, beside: bool) -> list[tuple[Text, TokenBatch]]:
        """The next tokens of the prompts, the oldest text's first."""
        room = min(self.prefill_chunk, JOINING_ROWS) if beside else self.prefill_chunk
        pieces = []
        for text in reading:
            tokens, cache = text.unread[:room], text.own.cache
            if count := tokens.numel():
                pieces.append((text, TokenBatch.chain(tokens, cache.length, cache.target_view(count))))
                room -= count
        return pieces

    def _commit_prompt(self, share: Share) -> None:
        text = share.text
        piece, text.unread = text.unread[: share.rows], text.unread[share.rows :]
        text.own.cache.extend(share.rows)
        if text.own.draft is not None:
            states = self.wants.select(share.hidden if share.rows == len(share.hidden.final) else share.own_hidden)
            text.own.draft.observe(piece, states)


def tree_batch(place: Place, rows: int) -> TokenBatch:
    """The first ``rows`` entries of a place's tree, as a pass that is launched for them alone.

    Entries past the tree's size are left over from earlier trees, and a tree that grew beside longer texts may pass the
    length limit: their results and cache rows are ignored. Positions are clamped to the model's range.
    """
    tree, cache = place.tree, place.cache
    past = cache.length
    deepest = max(0, cache.max_length - 1 - past)
    depths = tree.depths[:rows].clamp(max=deepest)
    view, levels = cache.target_view(rows), min(tree.levels, deepest)
    return TokenBatch(tree.tokens[:rows], depths, past, view, levels, tree.ancestors[:rows, :rows])
