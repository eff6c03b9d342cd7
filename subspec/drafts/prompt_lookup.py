"""``draft=prompt_lookup``: continuations found in the prompt and in the text so far; no weights, no GPU.

The drafts are n-grams of the text itself (Saxena 2023, "Prompt lookup decoding"); every node of a tree has the tokens
that followed the end of its path before, and with ``draft.earlier_texts`` also those of the run's earlier texts
(as SuffixDecoding does, arXiv 2411.04975). A level without any such token ends the tree.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from subspec.config.schema import Config
from subspec.decoding.draft import Draft, Perturb
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.ngram_index import NgramIndex
from subspec.drafts.spec import BuiltDraft, DraftSpec
from subspec.errors import ConfigError
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.memory.trace import draft_level_bytes

Candidates = Sequence[Mapping[int, float]]
"""For every node of a frontier, the tokens that may follow and their probabilities."""


class PromptLookupDraft(Draft):
    """Drafts from n-grams on the host.

    Args:
        index: of the text; cleared for every prompt unless ``earlier_texts``.
        vocab_size: of the target.
        earlier_texts: whether the tokens of earlier prompts and outputs count.
        temperature: of the draft's distribution.
    """

    def __init__(
        self, index: NgramIndex, vocab_size: int, *, earlier_texts: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature)
        self.index = index
        self.vocab_size = vocab_size
        self.earlier_texts = earlier_texts
        self._paths: dict[int, tuple[int, ...]] = {}  # the last tokens of the path to each node of the tree
        self._knows_root = False  # whether the tree's root is in the index

    def begin(self, cache: KVCache) -> None:
        self._knows_root = False
        if self.earlier_texts:
            self.index.end_text()
        else:
            self.index.clear()

    def fork(self) -> "PromptLookupDraft":
        index = NgramIndex(self.index.longest, self.index.shortest)
        return PromptLookupDraft(index, self.vocab_size, earlier_texts=self.earlier_texts, temperature=self.temperature)

    def observe(self, tokens: Tensor, hidden: Tensor | None) -> None:
        self.index.add(tokens.tolist())

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        self.index.add(tree.tokens.index_select(0, path).tolist()[self._knows_root :])
        self._knows_root = False

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        """Log-probabilities [f, vocabulary], float32; tokens that never followed share the rest."""
        return self._logits(self._candidates(tree, frontier, self.vocab_size), frontier.device)

    def extend(self, tree: Tree, frontier: Tensor, policy: TreePolicy, perturb: Perturb | None = None) -> Tensor:
        """One level of tokens that followed before; an empty frontier when there are none."""
        found = self._candidates(tree, frontier, policy.width if perturb is None else self.vocab_size)
        count = sum(map(len, found))
        if count == 0:
            return frontier[:0]
        if perturb is None and policy.whole_levels and count <= policy.width:
            return self._append_all(tree, frontier, found)  # without filling the level with improbable tokens
        logits = self._logits(found, frontier.device)
        return policy.grow(tree, frontier, logits if perturb is None else perturb(logits), self.temperature)

    def _candidates(self, tree: Tree, frontier: Tensor, most: int) -> Candidates:
        known, longest = self.index, self.index.longest
        found = []
        # Every frontier node's parent was a frontier node before, so its path is known.
        tokens, parents = tree.tokens.index_select(0, frontier), tree.parents.index_select(0, frontier)
        for node, token, parent in torch.stack([frontier, tokens, parents]).t().tolist():
            if node == 0:  # a new tree
                known.add([token])
                self._knows_root, self._paths = True, {0: known.tail}
            else:
                self._paths[node] = (*self._paths[parent], token)[-longest:]
            found.append(known.candidates(self._paths[node], most))
        return found

    def _append_all(self, tree: Tree, frontier: Tensor, found: Candidates) -> Tensor:
        rows = [row for row, tokens in enumerate(found) for _ in tokens]
        tokens = [token for candidates in found for token in candidates]
        log_probs = [math.log(p) / self.temperature for candidates in found for p in candidates.values()]
        parents = frontier[torch.tensor(rows, device=frontier.device)]
        scores = tree.scores.index_select(0, parents) + torch.tensor(log_probs, device=frontier.device)
        return tree.append(torch.tensor(tokens, device=frontier.device), parents, scores)

    def _logits(self, found: Candidates, device: torch.device) -> Tensor:
        rest = [max(1.0 - sum(candidates.values()), 1e-6) / self.vocab_size for candidates in found]
        logits = torch.tensor(rest, device=device).log_()[:, None].repeat(1, self.vocab_size)
        for row, candidates in enumerate(found):
            if candidates:
                tokens = torch.tensor(list(candidates), device=device)
                logits[row, tokens] = torch.tensor(list(candidates.values()), device=device).log_()
        return logits


class TracedLookup(PromptLookupDraft):
    """Its tensors on the meta device, where no token can be read."""

    def _candidates(self, tree: Tree, frontier: Tensor, most: int) -> Candidates:
        return [dict.fromkeys(range(most), 1.0 / most)] * frontier.numel()


class PromptLookupMemory(DraftMemory):
    """The logits of a level; no weights, no graphs."""

    captured = False
    library = False

    def __init__(self, inputs: SizingInputs) -> None:
        vocab = inputs.target.model.vocab_size
        draft = TracedLookup(NgramIndex(1), vocab)
        self.level = inputs.target.cached(
            ("prompt lookup", inputs.policy.width, inputs.sampling),
            lambda: draft_level_bytes(draft, inputs.policy, inputs.sampling, vocab),
        )


class PromptLookupSpec(DraftSpec):
    """``draft=prompt_lookup``: the same for a whole and a streamed target."""

    memory = PromptLookupMemory

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
        if not 1 <= draft.shortest <= draft.longest:
            raise ConfigError(
                f"draft.shortest={draft.shortest} and draft.longest={draft.longest}: contexts have at least 1 token, "
                "and the longest are no shorter than the shortest"
            )

    def build(self, target: TargetModel) -> BuiltDraft:
        draft = self.context.config.draft
        index = NgramIndex(draft.longest, draft.shortest)
        lookup = PromptLookupDraft(
            index, target.vocab_size, earlier_texts=draft.earlier_texts, temperature=draft.temperature
        )
        where = "this text and the run's earlier ones" if draft.earlier_texts else "this text"
        return BuiltDraft(
            lookup,
            facts={"longest": draft.longest, "shortest": draft.shortest, "earlier_texts": draft.earlier_texts},
            summary=f"contexts of {draft.shortest} to {draft.longest} tokens in {where}",
        )
