"""The loop: draft a tree, verify it in one target pass, emit what was accepted.

An iteration leaves the device exactly once, to read the accepted path (:meth:`Verdict.read`). Plain decoding is
the same loop without a draft: its tree is the root alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subspec.decoding.arguments import prompt_list, stop_list, whole_number
from subspec.decoding.batch import TokenBatch
from subspec.decoding.digest import digest_rows
from subspec.decoding.draft import Draft
from subspec.decoding.result import GenerationResult, GenerationStats
from subspec.decoding.sampling import Sampler, Sampling
from subspec.decoding.stopping import Emission, TextDecoder
from subspec.decoding.target_model import TargetModel
from subspec.decoding.timing import PhaseClock, Span
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import IterationOutcome, TreePolicy
from subspec.decoding.verify import NOT_FINITE, NotFiniteError, Verdict, finite_choice, verify
from subspec.errors import SubspecError
from subspec.utils.rounding import round_up

TokenCallback = Callable[[list[int], str], None]
"""Called with each emitted block: its ids, and the text that became certain with it ("" without a tokenizer)."""


ROW_MULTIPLE = 64
"""Rows of a target pass over a tree are rounded up to this on a GPU."""


class Engine:
    """Generates text with a target model and, optionally, a draft. Reusable; one generation at a time.

    Args:
        target: the model whose output is reproduced.
        draft, growth: what proposes tokens, and the shape of its trees; both None for plain decoding.
        sampling: greedy by default.
        max_length: most tokens of prompt and output together.
        prefill_chunk: prompt tokens per target pass.
        eos_token_ids: ids that end a text.
        tokenizer: for text and stop strings; None: ids only.

    Attributes:
        keeps_digests: whether results hold a digest of the logits behind every token, for the audit.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None = None,
        growth: TreePolicy | None = None,
        *,
        sampling: Sampling | None = None,
        max_length: int = 2048,
        prefill_chunk: int = 256,
        eos_token_ids: Sequence[int] = (),
        tokenizer: TextDecoder | None = None,
    ) -> None:
        if (draft is None) != (growth is None):
            raise ValueError("a draft and a tree growth go together")
        if growth is not None and getattr(growth, "width", 1) > target.vocab_size:
            raise ValueError(
                f"a tree of width {growth.width} is wider than the vocabulary of {target.vocab_size}"
            )
        self.target = target
        self.draft = draft
        self.growth = growth
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.eos_token_ids = tuple(eos_token_ids)
        self.tokenizer = tokenizer
        self.trace: list[Span] | None = None
        self.keeps_digests = False
        # Trees of nearly the same size take the same kernels when their rows are rounded up; on a CPU rows cost time.
        # Batch-invariant arithmetic has one kernel for any number.
        rounds = growth is not None and target.device.type == "cuda" and target.bitwise is None
        self._rows = ROW_MULTIPLE if rounds else 1
        self.tree = Tree(round_up(growth.capacity, self._rows) if growth else 1, target.device)
        self.sampler = Sampler(sampling or Sampling(), target.vocab_size, target.device)
        # A draft that can do a whole level in one launch; samples need the noise added in between.
        fused = getattr(draft, "level_step", None) if self.sampler.sampling.greedy else None
        if growth is not None and not growth.whole_levels:
            fused = None
        self._level_step: Callable[[Tree], None] | None = fused(growth) if fused else None
        self.cache = target.new_cache(
            max_length=max_length,
            draft_rows=growth.draft_rows if draft is not None and draft.shares_cache else 0,
            target_rows=max(
                round_up(growth.pass_nodes, self._rows) if growth else 1, min(prefill_chunk, max_length)
            ),
        )

    @torch.inference_mode()
    def prepare(self, prompt_ids: Sequence[int]) -> None:
        """Meet every shape once before anything is timed: compile, capture and load what the device needs.

        Without it the first deep tree, and the first pass over each number of rows, would pay for that (tens of
        milliseconds each on a GPU). Does nothing on a CPU.
        """
        if self.target.device.type != "cuda":
            return
        self.draft_whole_tree(self._prefill(prompt_ids)[0])
        most = self.growth.pass_nodes if self.growth is not None else 1
        sizes = list(range(self._rows, round_up(most, self._rows) + 1, self._rows))
        if self.target.bitwise is not None:  # one kernel for any number of rows
            sizes = [min(most, self.tree.size)]
        for rows in sizes:
            self.target.logits(self._pass(rows)).argmax(dim=-1)
        torch.cuda.synchronize(self.target.device)

    def draft_whole_tree(self, root: Tensor) -> None:
        """Draft to the full depth, whatever the growth would decide."""
        frontier = self.tree.plant(root)
        while self.growth is not None and self.tree.levels < self.growth.max_depth:
            frontier = self._level(frontier)
        if self.growth is not None:
            self.growth.finish(self.tree)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        seed: int = 0,
        on_tokens: TokenCallback | None = None,
    ) -> GenerationResult:
        """Continue a prompt.

        Args:
            prompt_ids: at least one token id, fewer than ``max_length``.
            max_new_tokens: most tokens to emit; None: until ``max_length``.
            stop: a string, or strings, that end the text.
            ignore_eos: go on to the length limit.
            seed: of the samples; the same seed gives the same text with any draft.
            on_tokens: called with every emitted block, from the first token on.

        Raises:
            SubspecError: an argument is not what it has to be (the message names it), or the target's logits are not
                finite.
        """
        prompt_ids = prompt_list(prompt_ids)
        whole_number("seed", seed, least=0)
        emission = self.emission(prompt_ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos)
        digests: list[Tensor] = []
        stats = GenerationStats(prompt_tokens=len(prompt_ids))
        self.target.take_transfer()  # what was prefetched for nobody
        clock = PhaseClock(self.target.device, self.trace)
        self.sampler.reseed(seed)

        def emit(block: list[int]) -> int:
            kept = emission.add(block)
            if on_tokens is not None:
                on_tokens(kept, emission.new_text())
            return len(kept)

        started = time.perf_counter()
        with clock.phase("prefill"):
            root, logits = self._prefill(prompt_ids)
            if self.keeps_digests:
                digests.append(digest_rows(logits))
            finite = finite_choice(logits, root)
            del logits
        first, is_finite = torch.cat([root, finite]).tolist()
        if not is_finite:
            raise NotFiniteError(NOT_FINITE)
        emit([first])
        first_token_at = time.perf_counter()
        stats.prefill_s = first_token_at - started

        while emission.finish_reason is None:
            iteration_started = time.perf_counter()
            with clock.phase("draft"):
                drafted = self._draft(root, emission.remaining - 1)
            size, levels = self.tree.size, self.tree.levels
            with clock.phase("verify"):
                hidden, logits = self._score(size)
            with clock.phase("settle"):
                verdict = self._judge(logits, levels)
                row_digests = digest_rows(logits) if self.keeps_digests else None
            del logits  # of the whole vocabulary: the next pass's must not come beside them
            with clock.waiting("wait for the verdict"):
                # The iteration's one synchronisation.
                accepted, emitted, depth = verdict.read_with_depth()
            with clock.phase("settle"):
                self._commit(verdict, len(accepted), hidden)
            if row_digests is not None:
                digests.append(row_digests.index_select(0, verdict.path(len(accepted))))
            root = verdict.bonus
            stats.iterations += 1
            stats.verified_tokens += emit(emitted)
            seconds = time.perf_counter() - iteration_started
            self._account(stats, depth, size, len(accepted) - 1)
            self._learn(stats, clock, IterationOutcome(drafted, size, len(accepted) - 1, 0.0, seconds))
        stats.decode_s = time.perf_counter() - first_token_at
        _add_phases(stats, clock.drain())
        stats.bytes_streamed, stats.transfer_s = self.target.take_transfer()
        result = GenerationResult(emission.token_ids, emission.text(), emission.finish_reason, stats)
        if digests:
            result.digests = torch.cat(digests)[: len(result.token_ids)].tolist()
        return result

    def emission(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        ignore_eos: bool = False,
    ) -> Emission:
        """What collects the tokens of a text and ends it; arguments as of :meth:`generate`."""
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens, least=1)
        room = self._room(prompt_ids)
        return Emission(
            eos_token_ids=() if ignore_eos else self.eos_token_ids,
            max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
            stop=stop_list(stop),
            tokenizer=self.tokenizer,
        )

    def _room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that may follow the prompt."""
        if len(prompt_ids) >= self.max_length:
            raise SubspecError(
                f"the prompt has {len(prompt_ids)} tokens and decoding.max_length={self.max_length} leaves no room "
                f"for an answer: raise decoding.max_length or shorten the prompt"
            )
        if max(prompt_ids) >= self.target.vocab_size or min(prompt_ids) < 0:
            raise SubspecError(
                f"the prompt holds a token id outside the target's vocabulary of {self.target.vocab_size}: "
                "it was made with another model's tokenizer"
            )
        return self.max_length - len(prompt_ids)

    def _prefill(self, prompt_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the prompt through the target in chunks; returns the first token, int64 [1], and its logits."""
        self.cache.reset()
        if self.draft is not None:
            self.draft.begin(self.cache)
        tokens = torch.tensor(prompt_ids, dtype=torch.int64, device=self.target.device)
        for chunk in tokens.split(self.prefill_chunk):
            hidden = self.target.append(chunk, self.cache)
            if self.draft is not None:
                self.draft.observe(chunk, hidden if self.draft.needs_features else None)
        logits = self.target.logits(hidden[-1:])
        return self.sampler.choose(logits, self.cache.length, torch.zeros_like(tokens[:1]), 1), logits

    def _draft(self, root: Tensor, most_levels: int) -> int:
        """Grow a tree from ``root``; levels past the length limit would be verified for nothing.

        Returns the number of levels.
        """
        frontier = self.tree.plant(root)
        if self.draft is None or self.growth is None:
            return 0
        self.growth.begin_tree()
        while self.tree.levels < most_levels and self.growth.wants_level(self.tree):
            frontier = self._level(frontier)
        self.growth.finish(self.tree)
        return self.tree.levels

    def _level(self, frontier: Tensor) -> Tensor:
        """Draft one level below ``frontier``; returns the new one."""
        assert self.draft is not None
        assert self.growth is not None
        if self._level_step is not None:
            self._level_step(self.tree)
            return self.tree.last_level
        logits = self.draft.expand(self.tree, frontier)
        logits = self.sampler.perturb(logits, self.cache.length + 1 + self.tree.levels)
        return self.growth.grow(self.tree, frontier, logits, self.draft.temperature)

    def _score(self, size: int) -> tuple[Tensor, Tensor]:
        """One target pass over the first ``size`` nodes: hidden states [rows, hidden], logits [size, vocabulary]."""
        hidden = self._pass(round_up(size, self._rows))
        return hidden, self.target.logits(hidden)[:size]

    def _judge(self, logits: Tensor, levels: int) -> Verdict:
        """What the target, with these ``logits`` of the first nodes, accepts of the tree's first ``levels`` levels."""
        depths = self.tree.depths[: logits.shape[0]]
        chosen = self.sampler.choose(logits, self.cache.length + 1, depths, levels + 1)
        return verify(self.tree, chosen, levels, finite_choice(logits, chosen))

    def _pass(self, rows: int) -> Tensor:
        """The target's hidden states [rows, hidden] of the first ``rows`` entries of the tree's tensors.

        Entries past the tree's size are leftovers: they see something, write rows nobody reads, and are ignored. Their
        positions are kept inside the model's.
        """
        tree, past = self.tree, self.cache.length
        depths = tree.depths[:rows].clamp(max=max(0, self.max_length - 1 - past))
        view = self.cache.target_view(rows)
        ancestors = tree.ancestors[:rows, :rows]
        return self.target.run(TokenBatch(tree.tokens[:rows], depths, past, view, tree.levels, ancestors))

    def _commit(self, verdict: Verdict, accepted: int, hidden: Tensor) -> None:
        """Move the accepted nodes' keys and values into the prefix, and tell the draft."""
        path = verdict.path(accepted)
        self.cache.accept(path)
        if self.draft is None:
            return
        features = hidden.index_select(0, path) if self.draft.needs_features else None
        self.draft.commit(self.tree, path, features)

    def _account(self, stats: GenerationStats, levels: int, size: int, accepted: int) -> None:
        """Count what an iteration drafted and accepted."""
        grow = levels - len(stats.drafted_by_depth)
        if grow > 0:
            stats.drafted_by_depth += [0] * grow
            stats.accepted_by_depth += [0] * grow
        for depth in range(levels):
            stats.drafted_by_depth[depth] += 1
            stats.accepted_by_depth[depth] += depth < accepted
        stats.drafted_nodes += size - 1

    def _learn(self, stats: GenerationStats, clock: PhaseClock, outcome: IterationOutcome) -> None:
        """Book the iteration's times; tell the growth. ``outcome`` comes with the whole iteration as ``verify_s``."""
        phases = clock.take()
        _add_phases(stats, phases)
        if self.growth is None:
            return
        draft_s = phases.get("draft", 0.0)
        rest = max(outcome.verify_s - draft_s, 0.0)
        self.growth.learn(replace(outcome, draft_s=draft_s, verify_s=rest))


def _add_phases(stats: GenerationStats, phases: dict[str, float]) -> None:
    stats.draft_s += phases.get("draft", 0.0)
    settle = phases.get("settle", 0.0)
    stats.settle_s += settle
    stats.verify_s += phases.get("verify", 0.0) + settle
