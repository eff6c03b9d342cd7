"""The losslessness audit: would the target itself, decoding plainly, have emitted these tokens?

Every emitted token is teacher-forced through the target in plain causal passes (no tree, no draft, none of the
generation's KV rows) and compared with the target's own choice for that prefix. So is the end of the text.

In batch-invariant arithmetic the passes have one row, as plain decoding's have, and the logits of every position are
compared with the generation's bit for bit: anything but equal bits is an error. Elsewhere both agree except on
near-ties, where two tokens' scores differ by less than the rounding of differently shaped kernels: rare in float32,
common and legitimate in bfloat16; larger gaps are bugs. The gap is measured in logits and always reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from subspec.decoding.arguments import finite_number
from subspec.decoding.captured_pass import CapturedPasses
from subspec.decoding.digest import digest_rows
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.result import FinishReason, audit_errors
from subspec.decoding.sampling import PIECE_ROWS, Sampler, Sampling, keep_mask
from subspec.decoding.stopping import OutputBuffer
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.verify import NOT_FINITE, NotFiniteError, finite_choice
from subspec.utils.rounding import round_up

NEAR_TIE_MARGIN = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest logit gap that counts as a near-tie, by the target's dtype.

Logits of these models reach about 30. One unit in the last place there is 2e-6, 0.016 and 0.125 respectively, and
a few dozen layers of rounding add some units; a wrong token is typically off by whole logits.
"""


PROMPT_CHUNK = 96
"""Tokens of the prompt per pass of an audit bit for bit: others than a run takes, so that prefill is audited too."""

LENGTH_MULTIPLE = 512
"""Captured passes are captured again for a text that is longer than all before, rounded up to this."""


@dataclass
class AuditResult:
    """Counts over the emitted tokens of one text.

    Attributes:
        exact: tokens that are the target's own choice, chosen by logits of the same bits where those are compared.
        near_tie: tokens whose score is within ``margin`` of it, or whose logits have other bits.
        mismatch: all others, and an end of the text that is not plain decoding's; any mismatch is a bug.
        max_gap: largest gap seen, in logits (0 when all are exact).
        margin: the near-tie margin used, in logits.
        first_mismatch: index of the first mismatching token among the emitted ones, or None.
        bitwise: whether bits were compared; a near-tie is an error then.
        ending: whether the text ends where and why plain decoding ends it; None: not audited.
        top_ids, top_logits: the target's two likeliest tokens at every position, and their logits.
    """

    exact: int
    near_tie: int
    mismatch: int
    max_gap: float
    margin: float
    first_mismatch: int | None = None
    bitwise: bool = False
    ending: bool | None = None
    top_ids: list[list[int]] = field(default_factory=list)
    top_logits: list[list[float]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Failures: mismatches and, where bits are compared, near-ties."""
        return audit_errors(self.mismatch, self.near_tie, self.bitwise)


class _Judged(NamedTuple):
    """The judgement of n tokens, on the device: [n] each, ``top_*`` [n, 2]."""

    gaps: Tensor
    own: Tensor
    digests: Tensor
    top_ids: Tensor
    top_logits: Tensor


class Auditor:
    """Re-scores finished texts with the plain target.

    Args:
        target: the model.
        sampling: the distribution the text was drawn from; greedy by default.
        margin: near-tie margin in logits; None: by dtype.
        chunk: tokens per pass, where bits are not compared.
    """

    def __init__(
        self, target: TargetModel, sampling: Sampling | None = None, *, margin: float | None = None, chunk: int = 256
    ) -> None:
        self.target = target
        self.sampler = Sampler(sampling or Sampling(), target.vocab_size, target.device)
        self.margin = NEAR_TIE_MARGIN[target.dtype] if margin is None else finite_number("margin", margin)
        self.chunk = chunk
        self._passes: CapturedPasses | None = None

    @torch.inference_mode()
    def audit(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        *,
        seed: int = 0,
        digests: Sequence[int] | None = None,
        ending: tuple[OutputBuffer, FinishReason] | None = None,
    ) -> AuditResult:
        """Check ``token_ids``, emitted after ``prompt_ids`` with ``seed``.

        Args:
            digests: of the logits that chose each token. Given, and with a target in batch-invariant arithmetic, bits
                are compared.
            ending: a fresh collector of the text's tokens, and why the text ended; None: the end is not audited.
        """
        self.sampler.reseed(seed)
        bitwise = digests is not None and self.target.bitwise is not None
        fed = torch.tensor([*prompt_ids, *token_ids[:-1]], dtype=torch.int64, device=self.target.device)
        emitted = torch.tensor(token_ids, dtype=torch.int64, device=self.target.device)
        first = len(prompt_ids) - 1  # this row's logits choose the first emitted token
        parts = fed.split(self.chunk)
        if bitwise:
            parts = (*(fed[:first].split(PROMPT_CHUNK) if first else ()), *fed[first:].split(1))
        cache = self._cache_for(fed.numel(), max(part.numel() for part in parts))
        judged = []
        for part in parts:
            past, count = cache.length, part.numel()
            hidden = self._pass(part, cache)
            begin = max(first - past, 0)
            if begin < count:
                position = past + begin + 1  # of the token that the piece's first row chooses
                for rows in self.target.logits(hidden[begin:]).split(PIECE_ROWS):
                    start = position - len(prompt_ids)
                    judged.append(self._judge(rows, emitted[start : start + len(rows)], position))
                    position += len(rows)
        self.sampler.noise.reseed(seed)  # drops its rows: they are large, and the next text needs others
        found = _Judged(*map(torch.cat, zip(*judged, strict=True)))
        exact = found.own == emitted
        if bitwise:
            exact &= found.digests == torch.tensor(digests, dtype=torch.int64, device=exact.device)
        ends = None if ending is None else _ends_alike(*ending, token_ids)
        return self._count(found, exact, bitwise=bitwise, ends=ends)

    def _cache_for(self, length: int, rows: int) -> KVCache:
        """An empty cache for a text; with captured passes, whose addresses are fixed, the last text's if it fits."""
        if not self.target.captured:
            return self.target.new_cache(max_length=length, draft_rows=0, target_rows=rows)
        if self._passes is None or length > self._passes.caches[0].max_length:
            tree = Tree(1, self.target.device)
            longest = round_up(length, LENGTH_MULTIPLE)
            most = max(PROMPT_CHUNK, self.chunk)
            cache = self.target.new_cache(max_length=longest, draft_rows=0, target_rows=most)
            self._passes = CapturedPasses(self.target, [tree], [cache], 0, ())
        self._passes.caches[0].reset()
        return self._passes.caches[0]

    def _pass(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Run ``tokens`` behind the cache's prefix and commit them; their hidden states [n, hidden]."""
        if self._passes is None or tokens.numel() > 1:
            return self.target.append(tokens, cache).final
        self._passes.trees[0].plant(tokens)
        hidden = self._passes.run(1, 1).final
        cache.extend(1)
        return hidden

    def _judge(self, logits: Tensor, tokens: Tensor, position: int) -> _Judged:
        """Judge ``tokens``, the first of which is at ``position``, by the target's ``logits`` of them."""
        count = len(tokens)
        own = self.sampler.choose(logits, position, torch.arange(count, device=logits.device), count)
        top = logits.float().topk(2, dim=-1)
        bits = digest_rows(logits) if self.target.bitwise is not None else torch.zeros_like(own)
        gaps = torch.where(own == tokens, 0.0, self._gaps(logits.float(), tokens, position))
        gaps = gaps.masked_fill(~finite_choice(logits, own), torch.nan)
        return _Judged(gaps, own, bits, top.indices, top.values)

    def _gaps(self, logits: Tensor, tokens: Tensor, position: int) -> Tensor:
        """How far each token's score is below the target's choice, in logits; +inf outside the filters."""
        sampling = self.sampler.sampling
        if sampling.greedy:
            return logits.amax(dim=-1) - logits.gather(1, tokens[:, None])[:, 0]
        noise = self.sampler.noise.rows(position, len(logits))
        scaled = logits / sampling.temperature
        slack = self.margin / sampling.temperature
        scores = scaled + noise
        own = scores.gather(1, tokens[:, None])[:, 0]
        # A competitor counts only if it passes the filters with room to spare, and the token itself even if it
        # passes by a hair: on the filters' edge rounding decides.
        keep = keep_mask(scaled, sampling, -slack)
        keep.scatter_(1, scaled.argmax(dim=-1, keepdim=True), True)  # the likeliest token passes any filter
        core = scores.masked_fill(~keep, -torch.inf)
        allowed = keep_mask(scaled, sampling, slack).gather(1, tokens[:, None])[:, 0]
        gap = (core.amax(dim=-1) - own).clamp_min(0) * sampling.temperature
        return gap.masked_fill(~allowed, torch.inf)

    def _count(self, found: _Judged, exact: Tensor, *, bitwise: bool, ends: bool | None) -> AuditResult:
        if bool(found.gaps.isnan().any()):
            raise NotFiniteError(NOT_FINITE)
        wrong = (~exact & (found.gaps > self.margin)).nonzero()
        count, mismatch = int(exact.sum()), wrong.shape[0]
        return AuditResult(
            exact=count,
            near_tie=exact.numel() - count - mismatch,
            mismatch=mismatch + (ends is False),
            # JSON has no infinity: a token outside the filters shows as the largest finite gap.
            max_gap=min(float(found.gaps.max()), 1e9),
            margin=self.margin,
            first_mismatch=int(wrong[0]) if mismatch else None,
            bitwise=bitwise,
            ending=ends,
            top_ids=found.top_ids.tolist(),
            top_logits=found.top_logits.tolist(),
        )


def _ends_alike(replay: OutputBuffer, reason: FinishReason, token_ids: Sequence[int]) -> bool:
    """Whether plain decoding, which looks after each token, ends these tokens where they end, and for that reason."""
    for count, token in enumerate(token_ids, start=1):
        replay.add([token])
        if replay.finish_reason is not None:
            return count == len(token_ids) == len(replay.token_ids) and replay.finish_reason is reason
    return False
