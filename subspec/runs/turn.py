"""The record of one turn, for the run folder, the logger and the console.

A record is a dict that strict JSON preserves, so that records read back equal those written. It holds a digest of the
prompt instead of the prompt, because data sets have licences.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from subspec.decoding.result import GenerationResult
from subspec.records.metrics import LinkInfo, turn_metrics

PROMPT_TOO_LONG = "prompt_too_long"
"""Reason of a skipped prompt: longer than ``benchmark.max_prompt_tokens`` or ``decoding.max_length`` allows."""


@dataclass(frozen=True)
class RunContext:
    """Fields of a run that every record repeats.

    Attributes:
        benchmark: name of the benchmark.
        source: source of its prompts: ``hub``, ``file`` or ``sample``, never ``auto``.
        target: name of the target.
        draft: name of the draft method.
        device: ``cpu`` or ``cuda``, never ``auto``.
        planted: whether the target's weights are planted.
        seed: seed of the run.
        bitwise: whether the target's passes were batch-invariant (``decoding.bitwise``).
        texts: most texts at a time (``decoding.texts``), never ``auto``.
    """

    benchmark: str
    source: str
    target: str
    draft: str
    device: str
    planted: bool = False
    seed: int = 0
    bitwise: bool = False
    texts: int = 1


def turn_record(
    context: RunContext,
    result: GenerationResult,
    *,
    sample_id: str,
    sample_index: int,
    turn: int = 0,
    category: str | None = None,
    messages: Sequence[Mapping[str, str]] | str | None = None,
    beside: float = 0.0,
    loop_s: float | None = None,
    link: LinkInfo | None = None,
    plain: tuple[int, float] | None = None,
    peak_vram_gib: float | None = None,
    device_vram_gib: float | None = None,
    peak_ram_gib: float | None = None,
    correct: bool | None = None,
    extracted: str | None = None,
    reference: str | None = None,
    audit: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a finished turn.

    Args:
        sample_id: the benchmark's own, stable name of the sample; with ``turn`` it is the record's key.
        sample_index: position of the sample in the run's selection, from 0.
        turn: 0, or the number of the turn in a conversation.
        category: the sample's category; None if its data set has none.
        messages: the prompt, of which only a digest is kept.
        beside, loop_s, link, plain, peak_vram_gib, device_vram_gib, peak_ram_gib: see
            :func:`~subspec.records.metrics.turn_metrics`.
        correct: whether the answer was right; None when it was not checked.
        extracted, reference: the answer found in the text, and the benchmark's.
        audit: fields of :class:`subspec.decoding.audit.AuditResult`; None: not audited.
    """
    metrics = turn_metrics(
        result,
        beside=beside,
        loop_s=loop_s,
        link=link,
        plain=plain,
        peak_vram_gib=peak_vram_gib,
        device_vram_gib=device_vram_gib,
        peak_ram_gib=peak_ram_gib,
    )
    return {
        **_head(context, sample_id, sample_index, turn, category),
        "prompt_sha256": prompt_digest(messages),
        **metrics,
        "token_ids": list(result.token_ids),
        "text": result.text,
        "correct": correct,
        "extracted": extracted,
        "reference": reference,
        "audit": dict(audit) if audit is not None else None,
    }


def skipped_record(
    context: RunContext,
    *,
    sample_id: str,
    sample_index: int,
    reason: str,
    turn: int = 0,
    category: str | None = None,
    messages: Sequence[Mapping[str, str]] | str | None = None,
    **details: Any,
) -> dict[str, Any]:
    """The record of a skipped prompt, which is counted and not tried again after a resume.

    Args:
        reason: a short constant, such as :data:`PROMPT_TOO_LONG`: summaries count by it.
        details: details of the reason, such as ``prompt_tokens=2100``; the others are as in :func:`turn_record`.
    """
    return {
        **_head(context, sample_id, sample_index, turn, category),
        "prompt_sha256": prompt_digest(messages),
        "skipped": {"reason": reason, **details},
    }


def chat_messages(said: Sequence[str]) -> list[dict[str, str]]:
    """Texts of the user and the assistant, alternating, as messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def prompt_digest(messages: Sequence[Mapping[str, str]] | str | None) -> str | None:
    """SHA-256 of a prompt: of the text itself, or of the messages as JSON with sorted keys."""
    if messages is None:
        return None
    text = messages if isinstance(messages, str) else json.dumps([dict(m) for m in messages], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _head(context: RunContext, sample_id: str, sample_index: int, turn: int, category: str | None) -> dict[str, Any]:
    return {
        "sample_id": str(sample_id),
        "sample_index": sample_index,
        "turn": turn,
        "category": category,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **asdict(context),
    }
