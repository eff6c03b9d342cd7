"""Bodies of answers: whole, and as the chunks of a stream of server-sent events."""

import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar
from uuid import uuid4

from subspec.decoding.result import FinishReason, GenerationResult
from subspec.records.metrics import turn_metrics

FINISH = {FinishReason.eos: "stop", FinishReason.stop: "stop", FinishReason.length: "length"}

FIGURES = {
    "mean_acceptance_length": "tau",
    "draft_acceptance_rate": "draft_acceptance_rate",
    "acceptance_histogram": "accepted_histogram",
    "num_spec_steps": "iterations",
    "num_draft_tokens": "drafted_nodes",
    "num_accepted_draft_tokens": "accepted_nodes",
}
"""Figures of speculative decoding by vLLM's names, and the fields of a record (docs/outputs.md)."""

DONE = "data: [DONE]\n\n"
"""The end of every stream."""


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def usage(result: GenerationResult) -> dict[str, int]:
    """Numbers of tokens."""
    prompt, new = result.stats.prompt_tokens, len(result.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def metrics(result: GenerationResult) -> dict[str, Any] | None:
    """The response's ``metrics``; None if nothing was drafted."""
    if not result.stats.drafted_nodes:
        return None
    figures = turn_metrics(result)
    return {"speculative_decoding": {name: figures[field] for name, field in FIGURES.items()}}


class Reply:
    """The bodies of one answer. Subclasses are the two endpoints' forms."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}

    def content(self, text: str) -> dict[str, Any]:
        """The part of a choice that holds the whole text."""
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        """The part of a streamed choice that holds the next piece of text; "": the last one."""
        raise NotImplementedError

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        """The answer in one body."""
        choice = self._choice(self.content(result.text or ""), FINISH[result.finish_reason])
        figures = {"usage": usage(result), "metrics": metrics(result)}
        return {**self.head, "object": self.kind, "choices": [choice], **figures}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        return []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk([self._choice(self.delta(text), None)])

    def closing(self, result: GenerationResult, with_usage: bool) -> list[dict[str, Any]]:
        """The chunks behind the text: why it ended, and the numbers of tokens."""
        last = self._chunk([self._choice(self.delta(""), FINISH[result.finish_reason])])
        last["metrics"] = metrics(result)
        return [last, self._chunk([]) | {"usage": usage(result)}] if with_usage else [last]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk_kind, "choices": choices}

    @staticmethod
    def _choice(content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


class ChatReply(Reply):
    """A conversation's next message."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])]


class CompletionReply(Reply):
    """A prompt's continuation."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    delta = content
