"""The engine's loop: draft a tree, verify it in one target pass, emit the accepted tokens.

An iteration synchronises with the device exactly once, to read the accepted path (:meth:`Acceptance.read`). Plain
decoding is the same loop without a draft: its tree is the root alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from subspec.decoding.arguments import prompt_list, stop_list, whole_number
from subspec.decoding.batch import TokenBatch
from subspec.decoding.captured_pass import CapturedPasses
from subspec.decoding.digest import digest_rows
from subspec.decoding.draft import Draft
from subspec.decoding.hidden import NO_HIDDEN, Hidden
from subspec.decoding.result import GenerationResult, GenerationStats
from subspec.decoding.sampling import Sampler, Sampling
from subspec.decoding.stopping import OutputBuffer, TextDecoder
from subspec.decoding.target_model import TargetModel
from subspec.decoding.timing import PhaseClock, Span
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import IterationOutcome, TreePolicy
from subspec.decoding.verify import NOT_FINITE, Acceptance, NotFiniteError, finite_choice, verify
from subspec.errors import SubspecError
from subspec.utils.rounding import round_up

TokenCallback = Callable[[list[int], str], None]
"""Called with each emitted block: its ids, and the text that became final with it ("" without a tokenizer)."""


ROW_MULTIPLE = 64
"""Rows of a target pass over a tree are rounded up to this on a GPU."""


class Engine:
    """Generates text with a target model and, optionally, a draft. Reusable; one generation at a time.

    Args:
        target: the model whose output is reproduced.
        draft, policy: the draft and the shape of its trees; both None for plain decoding.
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
        policy: TreePolicy | None = None,
        *,
        sampling: Sampling | None = None,
        max_length: int = 2048,
        prefill_chunk: int = 256,
        eos_token_ids: Sequence[int] = (),
        tokenizer: TextDecoder | None = None,
    ) -> None:
        if (draft is None) != (policy is None):
            raise ValueError("a draft and a tree policy go together")
        if policy is not None and policy.width > target.vocab_size:
            raise ValueError(
                f"a tree of width {policy.width} is wider than the vocabulary of {target.vocab_size}"
            )
        self.target = target
        self.draft = draft
        self._wants = NO_HIDDEN if draft is None else draft.wants
        self.policy = policy
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.eos_token_ids = tuple(eos_token_ids)
        self.tokenizer = tokenizer
        self.trace: list[Span] | None = None
        self.keeps_digests = False
        # Rounded rows let trees of nearly the same size use the same kernels, or the same graph; on a CPU rows cost
        # time. Batch-invariant arithmetic that is not captured has one kernel for any number of rows.
        rounds = (
            policy is not None
            and target.device.type == "cuda"
            and (target.bitwise is None or target.captured)
        )
        self._rows = ROW_MULTIPLE if rounds else 1
        self.tree = Tree(round_up(policy.capacity, self._rows) if policy else 1, target.device)
        self.sampler = Sampler(sampling or Sampling(), target.vocab_size, target.device)
        self.cache = target.new_cache(
            max_length=max_length,
            draft_rows=policy.draft_rows + draft.extra_rows if policy and draft and draft.shares_cache else 0,
            target_rows=max(
                round_up(policy.pass_nodes, self._rows) if policy else 1, min(prefill_chunk, max_length)
            ),
        )
        self._passes: CapturedPasses | None = None
        if target.captured:
            levels = policy.max_depth if policy else 0
            self._passes = CapturedPasses(target, self.tree, self.cache, levels, self._wants.layers)

    @torch.inference_mode()
    def prepare(self, prompt_ids: Sequence[int]) -> None:
        """Run every shape once before anything is timed, to compile, capture and load kernels.

        Otherwise the first deep tree, and the first pass over each number of rows, takes tens of milliseconds longer on
        a GPU. Does nothing on a CPU.
        """
        if self.target.device.type != "cuda":
            return
        self.draft_whole_tree(self._prefill(prompt_ids)[0])
        most = self.policy.pass_nodes if self.policy is not None else 1
        sizes = list(range(self._rows, round_up(most, self._rows) + 1, self._rows))
        if self._rows == 1:  # one kernel for any number of rows
            sizes = [min(most, self.tree.size)]
        for rows in sizes:
            self.target.logits(self._pass(rows).final).argmax(dim=-1)
        torch.cuda.synchronize(self.target.device)

    def draft_whole_tree(self, root: Tensor) -> None:
        """Draft to the full depth, regardless of :meth:`TreePolicy.wants_level`."""
        frontier = self.tree.plant(root)
        while self.policy is not None and self.tree.levels < self.policy.max_depth and frontier.numel():
            frontier = self._level(frontier)
        if self.policy is not None:
            self.policy.finish(self.tree)

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
            SubspecError: an argument has the wrong type or is out of range (the message names it), or the target's
                logits are not finite.
        """
        prompt_ids = prompt_list(prompt_ids)
        whole_number("seed", seed, least=0)
        output = self.output_buffer(
            prompt_ids, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos
        )
        digests: list[Tensor] = []
        stats = GenerationStats(prompt_tokens=len(prompt_ids))
        self.target.take_transfer()  # discard the counts of an earlier generation's prefetches
        clock = PhaseClock(self.target.device, self.trace)
        self.sampler.reseed(seed)

        def emit(block: list[int]) -> int:
            kept = output.add(block)
            if on_tokens is not None:
                on_tokens(kept, output.new_text())
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

        emitted_at = first_token_at
        while output.finish_reason is None:
            with clock.phase("draft"):
                drafted = self._draft(root, output.remaining - 1)
            size, levels = self.tree.size, self.tree.levels
            stats.draft_passes += self.draft.passes(self.tree) if self.draft is not None else 0
            with clock.phase("verify"):
                hidden, logits = self._score(size)
            with clock.phase("accept"):
                acceptance = self._judge(logits, levels)
                row_digests = digest_rows(logits) if self.keeps_digests else None
            del logits  # of the whole vocabulary: freed before the next pass allocates its own
            with clock.waiting("wait for the acceptance"):
                # The iteration's one synchronisation.
                accepted, emitted, depth = acceptance.read()
            with clock.phase("accept"):
                self._commit(acceptance, len(accepted), hidden)
            if row_digests is not None:
                digests.append(row_digests.index_select(0, acceptance.path(len(accepted))))
            root = acceptance.bonus
            stats.iterations += 1
            stats.verified_tokens += emit(emitted)
            now = time.perf_counter()
            seconds, emitted_at = now - emitted_at, now
            stats.block_s.append(seconds)
            self._account(stats, depth, size, len(accepted) - 1)
            self._learn(stats, clock, IterationOutcome(drafted, size, len(accepted) - 1, 0.0, seconds))
        stats.decode_s = time.perf_counter() - first_token_at
        _add_phases(stats, clock.drain())
        stats.bytes_streamed, stats.transfer_s = self.target.take_transfer()
        result = GenerationResult(output.token_ids, output.text(), output.finish_reason, stats)
        if digests:
            result.digests = torch.cat(digests)[: len(result.token_ids)].tolist()
        return result

    @torch.inference_mode()
    def time_plain(self, tokens: int) -> tuple[int, float]:
        """Time passes of one row, plain decoding's, behind the last generated text, which they do not change.

        Args:
            tokens: number of timed passes, one token each; fewer if ``max_length`` leaves no room.

        Returns:
            The number of passes and their seconds. One more goes before them: the first of its shape takes longer.
        """
        tokens = max(0, min(tokens, self.max_length - self.cache.length - 2))
        root, times = self.tree.tokens[:1].clone(), []
        for _ in range(tokens + 1 if tokens else 0):
            path = self.tree.plant(root)
            logits = self.target.logits(self._pass(1).final)  # not rounded up, as a tree's rows are
            root = self._judge(logits, 0).bonus
            self.cache.accept(path)
            root.tolist()  # a text would wait for its token
            times.append(time.perf_counter())
        return tokens, times[-1] - times[0] if times else 0.0

    def output_buffer(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | str = (),
        ignore_eos: bool = False,
    ) -> OutputBuffer:
        """The buffer that collects the tokens of a text and ends it; arguments as of :meth:`generate`."""
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens, least=1)
        room = self._room(prompt_ids)
        return OutputBuffer(
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
                "such tokens were added to its tokenizer, or the prompt was made with another one"
            )
        return self.max_length - len(prompt_ids)

    def _prefill(self, prompt_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the prompt through the target in chunks; returns the first token, int64 [1], and its logits."""
        self.cache.reset()
        if self.draft is not None:
            self.draft.begin(self.cache)
        tokens = torch.tensor(prompt_ids, dtype=torch.int64, device=self.target.device)
        for chunk in tokens.split(self.prefill_chunk):
            hidden = self.target.append(chunk, self.cache, hidden_of=self._wants.layers)
            if self.draft is not None:
                self.draft.observe(chunk, self._wants.select(hidden))
        logits = self.target.logits(hidden.final[-1:])
        return self.sampler.choose(logits, self.cache.length, torch.zeros_like(tokens[:1]), 1), logits

    def _draft(self, root: Tensor, most_levels: int) -> int:
        """Grow a tree from ``root``, not past the length limit; returns the number of levels."""
        frontier = self.tree.plant(root)
        if self.draft is None or self.policy is None:
            return 0
        self.policy.begin_tree()
        while self.tree.levels < most_levels and frontier.numel() and self.policy.wants_level(self.tree):
            frontier = self._level(frontier)
        self.policy.finish(self.tree)
        return self.tree.levels

    def _level(self, frontier: Tensor) -> Tensor:
        """Draft one level below ``frontier``; returns the new one."""
        assert self.draft is not None
        assert self.policy is not None
        if self.sampler.sampling.greedy:
            return self.draft.extend(self.tree, frontier, self.policy)
        position = self.cache.length + 1 + self.tree.levels
        return self.draft.extend(
            self.tree,
            frontier,
            self.policy,
            lambda logits, ahead=0: self.sampler.perturb(logits, position + ahead),
        )

    def _score(self, size: int) -> tuple[Hidden, Tensor]:
        """One target pass over the first ``size`` nodes: hidden states of all rows, logits [size, vocabulary]."""
        hidden = self._pass(round_up(size, self._rows))
        return hidden, self.target.logits(hidden.final)[:size]

    def _judge(self, logits: Tensor, levels: int) -> Acceptance:
        """The nodes of the tree's first ``levels`` levels that the target accepts, by its ``logits`` of the nodes."""
        depths = self.tree.depths[: logits.shape[0]]
        chosen = self.sampler.choose(logits, self.cache.length + 1, depths, levels + 1)
        return verify(self.tree, chosen, levels, finite_choice(logits, chosen))

    def _pass(self, rows: int) -> Hidden:
        """The target's hidden states of the first ``rows`` entries of the tree's tensors.

        Entries past the tree's size are left over from earlier trees: their results and cache rows are ignored. Their
        positions are clamped to the model's range.
        """
        if self._passes is not None:
            return self._passes.run(rows)
        tree, past = self.tree, self.cache.length
        depths = tree.depths[:rows].clamp(max=max(0, self.max_length - 1 - past))
        view = self.cache.target_view(rows)
        ancestors = tree.ancestors[:rows, :rows]
        batch = TokenBatch(tree.tokens[:rows], depths, past, view, tree.levels, ancestors)
        return self.target.forward(batch, hidden_of=self._wants.layers)

    def _commit(self, acceptance: Acceptance, accepted: int, hidden: Hidden) -> None:
        """Move the accepted nodes' keys and values into the prefix, and call the draft's ``commit``."""
        path = acceptance.path(accepted)
        self.cache.accept(path)
        if self.draft is not None:
            self.draft.commit(self.tree, path, self._wants.select(hidden, path))

    def _account(self, stats: GenerationStats, levels: int, size: int, accepted: int) -> None:
        """Count the drafted and accepted nodes of an iteration."""
        for counts, deepest in (
            (stats.drafted_by_depth, levels),
            (stats.reached_by_depth, min(levels, accepted + 1)),
            (stats.accepted_by_depth, accepted),
        ):
            counts += [0] * (levels - len(counts))
            for depth in range(deepest):
                counts[depth] += 1
        stats.drafted_nodes += size - 1

    def _learn(self, stats: GenerationStats, clock: PhaseClock, outcome: IterationOutcome) -> None:
        """Add the iteration's times to ``stats`` and pass them to the policy.

        Args:
            outcome: its ``verify_s`` is the time of the whole iteration.
        """
        phases = clock.take()
        _add_phases(stats, phases)
        if self.policy is None:
            return
        draft_s = phases.get("draft", 0.0)
        rest = max(outcome.verify_s - draft_s, 0.0)
        self.policy.learn(replace(outcome, draft_s=draft_s, verify_s=rest))


def _add_phases(stats: GenerationStats, phases: dict[str, float]) -> None:
    stats.draft_s += phases.get("draft", 0.0)
    accept = phases.get("accept", 0.0)
    stats.accept_s += accept
    stats.verify_s += phases.get("verify", 0.0) + accept
