"""Training of a block head of the DSpark kind against its target.

In every text some tokens are drawn as *anchors*, each the last emitted token of a draft. The slots of all anchors run
in one forward: a slot sees the target's features of the tokens before its anchor, and the slots of its own block. Slot
j predicts the token j + 1 behind the anchor; the Markov head is fed the token before that one. The confidence head
learns the share of samples that the target would accept, on states that it does not change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from subspec.drafts.block_head import BlockHead
from training.corpus import move
from training.eagle import HeadLesson, target_states
from training.losses import soft_cross_entropy
from training.measures import greedy_ranks


class TrainingView:
    """Keys and values of a layer's earlier rows in front of those of its later ones; gradients pass through."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append [texts, kv_heads, n, dim]; all of the layer's so far."""
        if layer in self.rows:
            before = self.rows[layer]
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        self.rows[layer] = key, value
        return key, value


def block_mask(anchors: Tensor, block: int, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, slots, length + slots]: features before the own anchor, and the own block.

    Args:
        anchors: int64 [n], positions of the anchors; the slots are n * ``block``.
    """
    device, own = anchors.device, torch.arange(len(anchors), device=anchors.device).repeat_interleave(block)
    before = torch.arange(length, device=device)[None] < anchors[own, None]
    seen = torch.cat([before, own[:, None] == own[None]], dim=1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)[None, None]


@dataclass
class BlockLesson(HeadLesson):
    """A block head learns its target's distributions of the next few tokens.

    Attributes:
        module: of the DSpark kind with a Markov head.
        anchors: drafts per text and step.
        decay: weight of each further slot against the one before.
    """

    module: BlockHead
    anchors: int = 64
    decay: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.module.shape
        assert shape.shifted
        assert shape.markov
        assert not shape.causal

    def _judged(self, learn: Tensor, anchors: Tensor) -> Tensor:
        """Slots whose token the target chose, and all those before it: bool [texts, anchors, block]; on the CPU."""
        at = anchors[:, None] + 1 + torch.arange(self.module.shape.block)
        inside = learn[:, at.clamp(max=learn.shape[1] - 1)] & (at < learn.shape[1])
        return inside.long().cumprod(dim=-1).bool()

    def _states(self, ids: Tensor, states: Tensor, anchors: Tensor) -> Tensor:
        """Normed states of every slot, [texts, anchors, block, hidden]."""
        head, block, length, device = self.module, self.module.shape.block, ids.shape[1], ids.device
        with self.arithmetic():
            tokens = torch.full((len(ids), len(anchors), block), head.shape.mask_id, device=device)
            tokens[:, :, 0] = ids[:, anchors]
            positions = (anchors[:, None] + torch.arange(block, device=device)).flatten()
            view = TrainingView()
            head.write(head.fuse(states.to(self.dtype)), torch.arange(length, device=device), view)
            embeddings = self.table(tokens.flatten(1)).to(self.dtype)
            mask = block_mask(anchors, block, length, self.dtype)
            return head.run(embeddings, positions, mask, view).unflatten(1, (-1, block))

    def _inputs(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Inputs of the LM head and the Markov head side by side; arguments: [n, hidden], ids int64 [n]."""
        markov = self.module.markov_head["markov_w1"](before)
        return torch.cat([hidden.to(self.dtype), markov.to(self.dtype)], dim=-1)

    def _weight(self, ids: Tensor | None) -> Tensor:
        """The LM head's and the Markov head's outputs side by side, of ``ids`` or of all: [n, hidden + rank]."""
        parts = [self.head_weight, self.module.markov_head["markov_w2"].weight[: len(self.head_weight)]]
        return torch.cat([(part if ids is None else part[ids]).to(self.dtype) for part in parts], dim=-1)

    def loss(self, ids: Tensor, learn: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`training.trainer.Lesson`."""
        device, head = self.head_weight.device, self.module
        # Drawn on the CPU, so that the host does not wait for the device.
        drawn = torch.Generator().manual_seed(generator.initial_seed())
        anchors = (torch.randperm(ids.shape[1] - 2, generator=drawn)[: self.anchors] + 1).sort().values
        text, anchor, slot = self._judged(learn, anchors).nonzero(as_tuple=True)
        weights = move((self.decay**slot)[None], device)
        text, anchor, slot, ids, anchors = (move(one, device) for one in (text, anchor, slot, ids, anchors))
        final, states = target_states(self.target, ids, self.wants)
        hidden = self._states(ids, states, anchors)[text, anchor, slot]
        at = anchors[anchor] + slot
        before, true = ids[text, at], final[text, at]
        some, shift = self.vocabulary.draw(generator) if self.vocabulary else (None, None)
        inputs, weight = self._inputs(hidden, before), self._weight(some)
        true_weight = self.head_weight if some is None else self.head_weight[some]
        cross = soft_cross_entropy(inputs[None], weight, true, true_weight, self.dtype, weights, shift)
        loss, figures = cross.loss, {"overlap": cross.overlap.mean()}
        for depth in (0, head.shape.block // 2):
            here = slot == depth
            figures[f"top1@{depth + 1}"] = (cross.right[0] & here).sum() / here.sum()
        if head.shape.confidence:
            said = head.confidence_head["proj"](inputs.detach().float()[:, : head.shape.confidence])[:, 0]
            doubt = nn.functional.binary_cross_entropy_with_logits(said, cross.overlap[0].clamp(0, 1))
            loss, figures["confidence"] = loss + doubt, doubt.detach()
        return loss, figures

    @torch.inference_mode()
    def evaluate(self, ids: Tensor, learn: Tensor, rows: int = 32) -> dict[str, float]:
        """Share of positions where the target's greedy token is among the first 1, 3 and 10 of the first and the third
        slot; tokens per pass of a single chain of a block."""
        block, weight, parts = self.module.shape.block, self._weight(None), []
        anchors = torch.arange(1, ids.shape[1] - 1, max(1, ids.shape[1] // 64))
        at = (anchors[:, None] + torch.arange(block)).clamp(max=ids.shape[1] - 1).to(self.head_weight.device)
        for start in range(0, len(ids), rows):
            part = move(ids[start : start + rows], self.head_weight.device)
            final, states = target_states(self.target, part, self.wants)
            hidden = self._states(part, states, anchors.to(part.device))
            inputs = self._inputs(hidden, part[:, at])
            parts.append(greedy_ranks(inputs, weight, final[:, at], self.head_weight).cpu())
        rank, judged, figures = torch.cat(parts), self._judged(learn, anchors), {}
        for level in {1, min(3, block)}:
            mine = rank[..., level - 1][judged[..., level - 1]]
            figures |= {f"top{k}@{level}": float((mine < k).float().mean()) for k in (1, 3, 10)}
        right = ((rank == 0) & judged).long().cumprod(dim=-1).sum(dim=-1)
        return figures | {"chain_tau": 1 + float(right[judged[..., 0]].float().mean())}
