"""The record of one turn, for the run folder, the logger and the console.

A record is a dict that strict JSON preserves, so that records read back equal those written; docs/outputs.md defines
its fields. It holds a digest of the prompt instead of the prompt, because data sets have licences.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from subspec.decoding.result import GenerationResult
from subspec.records.metrics import turn_metrics

PROMPT_TOO_LONG = "prompt_too_long"
"""Reason of a skipped prompt: longer than ``benchmark.max_prompt_tokens`` or ``decoding.max_length`` allows."""


@dataclass(frozen=True)
class RunContext:
    """Fields of a run that every record repeats: resolved values, never ``auto``."""

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
    messages: Sequence[Mapping[str, str]] = (),
    correct: bool | None = None,
    extracted: str | None = None,
    reference: str | None = None,
    audit: Mapping[str, Any] | None = None,
    **measured: Any,
) -> dict[str, Any]:
    """The record of a finished turn.

    Args:
        sample_id: the benchmark's own, stable name of the sample; with ``turn`` it is the record's key.
        sample_index: position of the sample in the run's selection, from 0.
        messages: the prompt, of which only a digest is kept.
        correct: whether the answer was right; None when it was not checked.
        audit: fields of :class:`subspec.decoding.audit.AuditResult`; None: not audited.
        measured: keywords of :func:`~subspec.records.metrics.turn_metrics`.
    """
    return {
        **_head(context, sample_id, sample_index, turn, category, messages),
        **turn_metrics(result, **measured),
        "token_ids": list(result.token_ids),
        "text": result.text,
        "correct": correct,
        "extracted": extracted,
        "reference": reference,
        "audit": audit,
    }


def skipped_record(context: RunContext, *, prompt_tokens: int, limit: int, **place: Any) -> dict[str, Any]:
    """The record of a prompt that is too long, which is counted and not tried again after a resume.

    Args:
        place: keywords of :func:`turn_record` from ``sample_id`` to ``messages``.
    """
    skipped = {"reason": PROMPT_TOO_LONG, "prompt_tokens": prompt_tokens, "limit": limit}
    return {**_head(context, **place), "skipped": skipped}


def chat_messages(said: Sequence[str]) -> list[dict[str, str]]:
    """Texts of the user and the assistant, alternating, as messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def prompt_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of the messages as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def _head(
    context: RunContext,
    sample_id: str,
    sample_index: int,
    turn: int = 0,
    category: str | None = None,
    messages: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "sample_index": sample_index,
        "turn": turn,
        "category": category,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **asdict(context),
        "prompt_sha256": prompt_digest(messages),
    }
