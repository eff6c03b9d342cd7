"""The state of one text while it is generated, and the place that it occupies meanwhile."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from subspec.decoding.draft import Draft
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.result import GenerationResult, GenerationStats
from subspec.decoding.sampling import Sampler
from subspec.decoding.stopping import OutputBuffer
from subspec.decoding.tree import Tree

TokenCallback = Callable[[list[int], str], None]
"""Called with each emitted block: its ids, and the text that became final with it ("" without a tokenizer)."""


@dataclass
class Place:
    """Memory of one running text: its tree, its KV cache, and its draft (None for plain decoding)."""

    tree: Tree
    cache: KVCache
    draft: Draft | None


@dataclass(eq=False)
class Text:
    """One text.

    Attributes:
        prompt: at least one token id.
        output: collects the emitted tokens and ends the text.
        sampler: chooses the target's tokens.
        on_tokens: called with every emitted block, from the first token on.
        stats: counts and times. A pass counts for every text in it.
        place: while the text runs.
        unread: int64, tokens of the prompt that the target has not read.
        root: int64 [1], the last emitted token; None: the prompt has not been read to its end.
        digests: of the logits that chose the tokens.
        result: of a text that has ended; error: of one that cannot go on.
    """

    prompt: Sequence[int]
    output: OutputBuffer
    sampler: Sampler
    on_tokens: TokenCallback | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    place: Place | None = None
    unread: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    root: Tensor | None = None
    digests: list[Tensor] = field(default_factory=list)
    result: GenerationResult | None = None
    error: Exception | None = None
    started: float = 0.0
    first_token_at: float = 0.0
    emitted_at: float = 0.0
    transferred: tuple[int, float] = (0, 0.0)
    passes: int = 0
    others: int = 0

    @property
    def beside(self) -> float:
        """Mean number of other texts in the passes of this one."""
        return self.others / max(1, self.passes)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to generate."""
        return self.output.finish_reason is not None or self.error is not None

    @property
    def own(self) -> Place:
        """The place, while the text runs."""
        assert self.place is not None
        return self.place

    def delay(self, seconds: float) -> None:
        """Leave a pause of the engine out of the times."""
        self.started += seconds
        self.emitted_at += seconds
        if self.first_token_at:
            self.first_token_at += seconds

    def emit(self, block: list[int]) -> int:
        """Append emitted tokens up to the end of the text, and call ``on_tokens``; returns the number kept.

        An exception of ``on_tokens`` ends this text alone.
        """
        kept = self.output.add(block)
        if self.on_tokens is not None:
            try:
                self.on_tokens(kept, self.output.new_text())
            except Exception as error:  # the caller's own
                self.error = error
        now = time.perf_counter()
        if self.first_token_at:
            self.stats.block_s.append(now - self.emitted_at)
        else:
            self.first_token_at = now
            self.stats.prefill_s = now - self.started
        self.emitted_at = now
        return len(kept)

    def count(self, levels: int, nodes: int, accepted: int) -> None:
        """Count an iteration.

        Args:
            levels: depth of the deepest verified node.
            nodes: nodes of the tree.
            accepted: depth of the deepest accepted node.
        """
        stats = self.stats
        stats.iterations += 1
        stats.drafted_nodes += nodes - 1
        for counts, deepest in (
            (stats.drafted_by_depth, levels),
            (stats.reached_by_depth, min(levels, accepted + 1)),
            (stats.accepted_by_depth, accepted),
        ):
            counts += [0] * (levels - len(counts))
            for depth in range(deepest):
                counts[depth] += 1

    def count_times(self, phases: dict[str, float]) -> None:
        """Add seconds by phase."""
        stats, accept = self.stats, phases.get("accept", 0.0)
        stats.draft_s += phases.get("draft", 0.0)
        stats.accept_s += accept
        stats.verify_s += phases.get("verify", 0.0) + accept

    def finish(self) -> None:
        """Build the result."""
        output = self.output
        assert output.finish_reason is not None
        self.result = GenerationResult(output.token_ids, output.text(), output.finish_reason, self.stats)
        if self.digests:
            self.result.digests = torch.cat(self.digests)[: len(output.token_ids)].tolist()
