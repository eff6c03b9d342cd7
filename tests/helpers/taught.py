"""Engines whose drafts have random weights and may be taught a text, so that tokens are accepted."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspec.decoding.adaptive import Adaptive
from subspec.decoding.draft import Draft
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.hidden import HiddenRequest
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.drafts.block_draft import BlockDraft
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.pard import FusedModel, PardDraft, PardShape
from tests.helpers.blocks import BLOCKS
from tests.helpers.eagle import SHAPES, SHAPES3, random_head
from tests.helpers.tiny import tiny_model

PROMPT = [5, 17, 33, 99, 4, 8, 77, 120, 6]
POLICIES = {
    "chain": lambda: Beam(6, 1),
    "beam": lambda: Beam(5, 4),
    "adaptive": lambda: Adaptive(10, 3, level_cost=0.05, check_every=2, min_depth=1),
    "eagle2": lambda: Eagle2(5, 4, 20),
}


class PartialBeam(Beam):
    """A tree in which only some nodes of a level are run: every other one, the later ones first."""

    def select(self, tree: Tree, frontier: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
        return super().select(tree, frontier, tokens, log_probs).flip(0)[::2]


ALL_POLICIES = {**POLICIES, "partial": lambda: PartialBeam(5, 4)}
"""With one that drafts without captured levels only."""


def disturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A model that agrees with ``model`` often, but not always: its weights with noise on them."""
    other = tiny_model(model.config.model_type, layers=model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + noise * torch.randn(theirs.shape, generator=generator))
    return other


class Teaching:
    """Nudges a draft's guesses towards a known text, so that random weights get tokens accepted.

    Its state is what the draft computes; only the logits it hands over are changed, but for every fourth position.
    ``seen`` holds the draft's own logits of each branch of the last tree. ``waiting``: committed tokens without a row.
    """

    waiting = 1
    extend = Draft.extend  # EAGLE-3's own chooses among the head's ids

    def __init__(self, *arguments: object, future: list[int], **options: object) -> None:
        super().__init__(*arguments, **options)
        self.future = future
        self.seen: dict[tuple[int, ...], Tensor] = {}

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        logits = super().expand(tree, frontier).clone()
        for node, row in zip(frontier.tolist(), logits.clone(), strict=True):
            self.seen[tuple(tree.tokens[tree.ancestors[node].nonzero()[:, 0]].tolist())] = row
        at = self.cache.length + self.waiting + 1 + tree.levels
        if at % 4 and at < len(self.future):
            logits[:, self.future[at]] += 100.0
        return logits


class TaughtEagle(Teaching, EagleDraft):
    """An EAGLE head that is taught."""


class TaughtBlock(Teaching, BlockDraft):
    """A block head that is taught."""

    waiting = 0
    extend = BlockDraft.extend


class TaughtPard(Teaching, PardDraft):
    """A PARD model that is taught."""

    extend = PardDraft.extend

    @property
    def waiting(self) -> int:
        return len(self._tokens)


PARD_TOKEN, PARD_LEVELS = 317, 5
PARDS = {"pard": PardShape(PARD_TOKEN), "pard2": PardShape(PARD_TOKEN, HiddenRequest(True, (4, 1)), 0.5)}
"""PARD-2 reads the final hidden states, those behind layer 4 of eight, and those behind layer 1."""


def projection() -> Tensor:
    """Of PARD-2, before it is scaled."""
    return 0.3 * torch.randn(32, 192, generator=torch.Generator().manual_seed(5))


def pard_model() -> PreTrainedModel:
    """The model that drafts."""
    return tiny_model("llama", layers=2, hidden_size=32, seed=3)


def draft_engine(
    model: PreTrainedModel,
    policy: TreePolicy,
    name: str = "qwen2",
    *,
    future: list[int] | None = None,
    seed: int = 0,
    std: float | None = None,
    **options: object,
) -> Engine:
    """An engine that drafts with random weights.

    Args:
        name: a head of ``SHAPES``, ``SHAPES3`` or ``BLOCKS``, or a model of ``PARDS``.
        future: the text that the draft is taught.
        std: of a head's weights.
    """
    target, taught = TargetModel(model), {} if future is None else {"future": future}
    if name in PARDS:
        shape, kind = PARDS[name], PardDraft if future is None else TaughtPard
        small = FusedModel(pard_model(), 0.5 * projection()) if name == "pard2" else TargetModel(pard_model())
        draft = kind(small, shape, levels=PARD_LEVELS, max_length=256, vocab_size=320, **taught)
    elif name in BLOCKS:
        kind = BlockDraft if future is None else TaughtBlock
        draft = kind(random_head(BLOCKS[name], seed, std or 0.1), target, policy, **taught)
    else:
        kind = EagleDraft if future is None else TaughtEagle
        draft = kind(random_head((SHAPES | SHAPES3)[name], seed, std or 0.15), target, policy, **taught)
    return Engine(target, draft, policy, **{"max_length": 256, "prefill_chunk": 4, **options})
