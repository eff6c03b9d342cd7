"""The result of a generation: the emitted tokens, and the raw counts and times that metrics are computed from."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a generation ended."""

    eos = "eos"
    stop = "stop"
    length = "length"


@dataclass
class GenerationStats:
    """Raw counts and times of one generation; metrics are derived in :mod:`subspec.records.metrics`.

    Attributes:
        prompt_tokens: tokens of the prompt.
        iterations: verification passes of the target (the prefill is not one).
        verified_tokens: emitted tokens that came from verification passes (all but the first one).
        drafted_by_depth: entry d-1 counts the iterations whose tree had a level of depth d.
        accepted_by_depth: entry d-1 counts the iterations that accepted a node of depth d.
        reached_by_depth: entry d-1 counts the iterations that had a level of depth d and accepted a node of depth d-1
            (depth 0 is the root, always accepted).
        drafted_nodes: tree nodes verified, summed over iterations (roots excluded).
        draft_passes: passes of the draft's model; of most drafts one for every level.
        prefill_s: seconds until the first token, target prefill included.
        decode_s: seconds from the first token to the last.
        block_s: seconds from each emitted block to the next, one per iteration; they add up to about ``decode_s``.
        draft_s: share of ``decode_s`` spent drafting (device time on a GPU).
        verify_s: share of ``decode_s`` spent in target passes and verification.
        accept_s: share of ``verify_s`` behind the target's logits: choosing tokens, accepting a path, moving its keys
            and values.
        transfer_s: seconds in which the host-to-device link carried weights, prefill included (0 without
            offloading).
        bytes_streamed: weight bytes that crossed the link, prefill included.
    """

    prompt_tokens: int = 0
    iterations: int = 0
    verified_tokens: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    reached_by_depth: list[int] = field(default_factory=list)
    drafted_nodes: int = 0
    draft_passes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    block_s: list[float] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    accept_s: float = 0.0
    transfer_s: float = 0.0
    bytes_streamed: int = 0


@dataclass
class GenerationResult:
    """One finished generation.

    Attributes:
        token_ids: the emitted ids in order; an end-of-sequence id, when emitted, is the last one.
        text: the decoded text without special tokens, cut before a stop string; None without a tokenizer.
        finish_reason: why it ended.
        stats: counts and times.
        digests: of the logits that chose each token (:func:`subspec.decoding.digest.digest_rows`); None: not kept.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    stats: GenerationStats
    digests: list[int] | None = None


def audit_errors(mismatch: int, near_tie: int, bitwise: bool) -> int:
    """Errors of an audited text: mismatches, and near-ties where logits were compared bit for bit."""
    return mismatch + (near_tie if bitwise else 0)
