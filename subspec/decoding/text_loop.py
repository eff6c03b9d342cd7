"""The loop of running texts: draft trees, verify them in one target pass, emit the accepted tokens.

An iteration (:meth:`TextLoop.step`) serves every running text: their trees grow level by level together, and one target
pass verifies them all, beside pieces of the prompts of texts that have just joined. It synchronises with the device
exactly once, to read the accepted paths (:func:`~subspec.decoding.verify.read_all`). Plain decoding is the same loop
without a draft: its tree is the root alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.captured_pass import CapturedPasses
from subspec.decoding.digest import digest_rows
from subspec.decoding.draft import Draft, NextLevel, Perturb
from subspec.decoding.hidden import NO_HIDDEN
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.shared_pass import Share, SharedPass
from subspec.decoding.target_model import TargetModel
from subspec.decoding.text import Place, Text
from subspec.decoding.timing import PhaseClock, Span
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import IterationOutcome, TreePolicy
from subspec.decoding.verify import Acceptance, NotFiniteError, Reading, finite_choice, read_all, verify
from subspec.utils.rounding import round_up

ROW_MULTIPLE = 64
"""Rows of a target pass over a tree are rounded up to this on a GPU."""


@dataclass(frozen=True)
class _Judged:
    """A text's share of a pass, the nodes that the target accepts, and its logits' digests if they are kept."""

    share: Share
    acceptance: Acceptance
    digests: Tensor | None


class TextLoop:
    """Runs texts in places that are made once; arguments as of :class:`~subspec.decoding.engine.Engine`.

    Attributes:
        running: texts that have a place, in the order of the places.
        keeps_digests: whether results hold a digest of the logits behind every token, for the audit.
        trace: receives every phase, for a timeline; None: nothing does.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None,
        policy: TreePolicy | None,
        *,
        max_length: int,
        prefill_chunk: int,
        texts: int,
    ) -> None:
        self.target, self.policy = target, policy
        self.max_length, self.prefill_chunk = max_length, prefill_chunk
        self._wants = NO_HIDDEN if draft is None else draft.wants
        self.keeps_digests = False
        self.trace: list[Span] | None = None
        self.running: list[Text] = []
        self._transferred = (0, 0.0)
        self._reserve(texts, draft)

    def _reserve(self, texts: int, draft: Draft | None) -> None:
        """Allocate the places of ``texts`` texts."""
        target, policy = self.target, self.policy
        # Rounded rows let trees of nearly the same size use the same kernels, or the same graph; on a CPU rows cost
        # time. Batch-invariant arithmetic that is not captured has one kernel for any number of rows.
        rounds = policy is not None and target.device.type == "cuda" and (target.bitwise is None or target.captured)
        multiple = ROW_MULTIPLE if rounds else 1
        drafts = [draft, *(draft and draft.fork() for _ in range(texts - 1))]
        # Trees that lie behind each other begin at aligned addresses.
        capacity = round_up(policy.capacity if policy else 1, max(multiple, 16 if texts > 1 else 1))
        trees = Tree.several(texts, capacity, target.device)
        caches = target.new_cache(
            max_length=self.max_length,
            draft_rows=policy.draft_rows + draft.extra_rows if policy and draft and draft.shares_cache else 0,
            target_rows=round_up(policy.pass_nodes, multiple) if policy else 1,
            texts=texts,
        ).all()
        self._places = [Place(*own) for own in zip(trees, caches, drafts, strict=True)]
        captured = None
        if target.captured:
            levels = policy.max_depth if policy else 0
            captured = CapturedPasses(target, trees, caches, levels, self._wants.layers)
        self._pass = SharedPass(target, self._wants, multiple, self.prefill_chunk, captured)

    @property
    def draft(self) -> Draft | None:
        """The draft; of several texts, the first one's."""
        return self._places[0].draft

    @draft.setter
    def draft(self, draft: Draft | None) -> None:
        self._places[0].draft = draft

    @property
    def tree(self) -> Tree:
        """The first text's tree."""
        return self._places[0].tree

    @property
    def cache(self) -> KVCache:
        """The first text's KV cache."""
        return self._places[0].cache

    @property
    def texts(self) -> int:
        """Most texts that run side by side."""
        return len(self._places)

    # ------------------------------------------------------------------------------------- texts come and go

    def admit(self, text: Text) -> None:
        """Give ``text`` the next free place; the next :meth:`step` reads its prompt."""
        if not self.running:
            self._clock = PhaseClock(self.target.device, self.trace)
            self._stepped_at = time.perf_counter()
        text.place = place = self._places[len(self.running)]
        self.running.append(text)
        text.transferred = self._take_transfer()
        text.started = time.perf_counter()
        text.unread = torch.tensor(text.prompt, dtype=torch.int64, device=self.target.device)
        place.cache.reset()
        if place.draft is not None:
            place.draft.begin(place.cache)

    def leave(self, text: Text) -> None:
        """Free the place of ``text``, if it has one.

        Running texts occupy the first places, those that have read their prompts before the others: the last text of
        either kind moves.
        """
        if text.place is None:
            return
        running, hole = self.running, self.running.index(text)
        ready = sum(other.root is not None for other in running)
        for last in (ready - 1, len(running) - 1):
            if hole < last:
                self._move(last, hole)
                hole = last
        running.pop()
        text.place = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work between two passes that is in no figure of the running texts: neither its time nor its transfers."""
        began, transferred = time.perf_counter(), self._take_transfer()
        try:
            yield
        finally:
            self._take_transfer()
            self._transferred = transferred
            if self.running:
                seconds = time.perf_counter() - began
                self._stepped_at += seconds
                for text in self.running:
                    text.delay(seconds)

    def _move(self, number: int, hole: int) -> None:
        """Let a running text go on in the place of another one."""
        source, place = self._places[number], self._places[hole]
        self.running[hole] = self.running[number]
        self.running[hole].place = place
        place.cache.take_over(source.cache)
        place.draft, source.draft = source.draft, place.draft
        if place.draft is not None:
            place.draft.move(place.cache)

    def _take_transfer(self) -> tuple[int, float]:
        """(weight bytes, seconds of the link) of this engine so far."""
        copied, seconds = self.target.take_transfer()
        self._transferred = self._transferred[0] + copied, self._transferred[1] + seconds
        return self._transferred

    # ------------------------------------------------------------------------------------------ an iteration

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """One target pass for all running texts; returns those that ended, whose places are free again."""
        texts, clock = [*self.running], self._clock
        drafting = [text for text in texts if text.root is not None]
        reading = texts[len(drafting) :]
        assert all(text.root is None for text in reading)
        name = "verify" if drafting else "prefill"
        if drafting:
            with clock.phase("draft"):
                self._grow(drafting, max(text.output.remaining for text in drafting) - 1)
        with clock.phase(name):
            groups = self._pass.groups(self._pass.run(drafting, reading))
            found = self._pass.logits(groups[0]) if groups else None
        judged: list[_Judged] = []
        for number, group in enumerate(groups):
            if number:
                with clock.phase(name):
                    found = self._pass.logits(group)
            with clock.phase("accept"):
                assert found is not None
                judged += self._judge(group, *found)
            found = None  # logits of the whole vocabulary: freed before the next pass allocates its own
        for text in texts:
            text.passes, text.others = text.passes + 1, text.others + len(texts) - 1
        if not judged:
            return []
        with clock.waiting("wait for the acceptance"):
            # The iteration's one synchronisation.
            results = read_all([own.acceptance for own in judged])
        self._emit(judged, results)
        ended = [text for text in texts if text.ended]
        for text in ended:
            self._end(text, drafting)
        return ended

    def _grow(self, texts: Sequence[Text], most_levels: int, *, whole: bool = False) -> None:
        """Grow a tree from the root of every text; they grow level by level together.

        Args:
            whole: regardless of :meth:`TreePolicy.wants_level`.
        """
        if self.policy is None:
            for text in texts:
                text.own.tree.plant(text.root)
            return
        self.policy.begin_tree(len(texts))
        trees = [text.own.draft.plant(text.own.tree, text.root) for text in texts]
        growing = [(text, tree, tree.last_level) for text, tree in zip(texts, trees, strict=True)]
        for _ in range(most_levels):
            growing = [own for own in growing if own[2].numel()]
            if not growing or not (whole or self.policy.wants_level(*trees)):
                break
            growing = self._level(growing)
        for text, tree in zip(texts, trees, strict=True):
            self.policy.finish(tree)
            text.stats.draft_passes += text.own.draft.passes(tree)
            text.own.draft.place(text.own.tree)

    def _level(self, growing: Sequence[tuple[Text, Tree, Tensor]]) -> list[tuple[Text, Tree, Tensor]]:
        """Draft one level below every frontier; returns the new ones."""
        draft, policy = growing[0][0].own.draft, self.policy
        assert draft is not None
        assert policy is not None
        if len(growing) == 1:
            text, tree, frontier = growing[0]
            return [(text, tree, draft.extend(tree, frontier, policy, _perturb(text, tree)))]
        levels = [NextLevel(text.own.draft, tree, frontier, _perturb(text, tree)) for text, tree, frontier in growing]
        grown = draft.extend_together(levels, policy)
        return [(text, tree, frontier) for (text, tree, _), frontier in zip(growing, grown, strict=True)]

    def _judge(self, group: Sequence[Share], logits: Tensor, rows: Sequence[slice]) -> list[_Judged]:
        """The nodes that the target accepts, by the logits of a group of texts."""
        chosen = self._choose(group, logits, rows)
        finite = finite_choice(logits, chosen)
        digests = digest_rows(logits) if self.keeps_digests else None
        return [
            _Judged(
                share,
                verify(share.text.own.tree, chosen[own], share.levels, finite[own]),
                None if digests is None else digests[own],
            )
            for share, own in zip(group, rows, strict=True)
        ]

    def _choose(self, group: Sequence[Share], logits: Tensor, rows: Sequence[slice]) -> Tensor:
        """The target's token after each row, int64 [n]."""
        chosen = None
        if len(group) > 1:
            chosen = logits.argmax(dim=-1)
        for share, own in zip(group, rows, strict=True):
            text, levels = share.text, share.levels
            if chosen is not None and text.sampler.sampling.greedy:
                continue
            # The token behind a prompt has the position that the prompt's length names.
            start = text.own.cache.length + share.is_tree
            choice = text.sampler.choose(logits[own], start, text.own.tree.depths[: share.count], levels + 1)
            if chosen is None:
                return choice
            chosen[own] = choice
        assert chosen is not None
        return chosen

    def _emit(self, judged: Sequence[_Judged], results: Sequence[Reading]) -> None:
        """Commit the accepted nodes of every tree, and hand out the emitted tokens."""
        pairs = list(zip(judged, results, strict=True))
        verified = [(own, result) for own, result in pairs if own.share.is_tree]
        if verified:
            with self._clock.phase("accept"):
                for own, result in verified:
                    if not isinstance(result, NotFiniteError):
                        self._commit(own, len(result[0]))
        for own, result in pairs:
            text = own.share.text
            if isinstance(result, NotFiniteError):
                text.error = result
                continue
            if text.place is None:  # removed by another text's callback
                continue
            path, emitted, depth = result
            room, text.root = text.output.remaining, own.acceptance.bonus
            if own.digests is not None:
                text.digests.append(own.digests.index_select(0, own.acceptance.path(len(path))))
            if own.share.is_tree:
                text.count(min(depth, room - 1), own.share.count, min(len(path), room) - 1)
            kept = text.emit(emitted[:room])
            text.stats.verified_tokens += kept * own.share.is_tree
        self._learn(verified)

    def _commit(self, judged: _Judged, accepted: int) -> None:
        """Move the accepted nodes' keys and values into the prefix, and call the draft's ``commit``."""
        text, place = judged.share.text, judged.share.text.own
        # A tree that grew beside those of longer texts may pass the text's limit.
        path = judged.acceptance.path(min(accepted, text.output.remaining))
        place.cache.accept(path)
        if place.draft is not None:
            hidden = self._wants.select(judged.share.own_hidden, path) if self._wants != NO_HIDDEN else None
            place.draft.commit(place.tree, path, hidden)

    def _learn(self, verified: Sequence[tuple[_Judged, Reading]]) -> None:
        """Add the iteration's times to the texts' and pass its outcome to the policy."""
        phases, now = self._clock.take(), time.perf_counter()
        seconds, self._stepped_at = now - self._stepped_at, now
        if not verified:
            return
        for own, _ in verified:
            own.share.text.count_times(phases)
        if self.policy is not None:
            draft_s = phases.get("draft", 0.0)
            accepted = [0 if isinstance(result, NotFiniteError) else len(result[0]) - 1 for _, result in verified]
            shares = [own.share for own, _ in verified]
            self.policy.learn(
                IterationOutcome(
                    max(share.levels for share in shares),
                    sum(share.count for share in shares),
                    tuple(accepted),
                    draft_s,
                    max(seconds - draft_s, 0.0),
                )
            )

    def _end(self, text: Text, drafting: Sequence[Text]) -> None:
        """Complete the figures of a text that ended, and free its place."""
        text.stats.decode_s = time.perf_counter() - text.first_token_at
        phases = self._clock.drain()
        for other in drafting:
            other.count_times(phases)
        transferred = self._take_transfer()
        text.stats.bytes_streamed = transferred[0] - text.transferred[0]
        text.stats.transfer_s = transferred[1] - text.transferred[1]
        if text.error is None:
            text.finish()
        self.leave(text)

    def _read_prompts(self) -> None:
        """Read all prompts to their ends, without a look at the first tokens."""
        while reading := [text for text in self.running if text.root is None]:
            for group in self._pass.groups(self._pass.run([], reading)):
                for own in self._judge(group, *self._pass.logits(group)):
                    own.share.text.root = own.acceptance.bonus


def _perturb(text: Text, tree: Tree) -> Perturb | None:
    """Adds the noise of the next level of a text's tree to the draft's logits; None: greedy."""
    sampler = text.sampler
    if sampler.sampling.greedy:
        return None
    position = text.own.cache.length + 1 + tree.levels
    return lambda logits, ahead=0: sampler.perturb(logits, position + ahead)
