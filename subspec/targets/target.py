"""A loaded target: model, tokenizer, origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspec.errors import SubspecError
from subspec.targets.source import LayerSource

PINNED_DATE = "26 Jul 2024"
"""Passed to chat templates that would otherwise write today's date into every prompt: a run must be repeatable."""


@dataclass
class Target:
    """The model whose output a run reproduces, ready for inference.

    Attributes:
        name: the config option, or the path that was configured.
        model: in eval mode, without gradients, in ``dtype``, with SDPA attention.
        tokenizer: use :meth:`chat_ids` for prompts.
        eos_token_ids: every id that ends a text, ascending; empty when the checkpoint names none.
        dtype: arithmetic and storage type of every weight.
        device: of the weights, or of the ring that they are streamed to.
        source: recorded origin: hub id @ commit, folder as given, or wheel name, version and hash.
        identity: of the weights (``LayerSource.identity``).
        planted: whether the weights are made up (such a target is never reported without that word).
        notes: for readers of a run's figures, as printed while loading.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    source: str
    identity: str
    planted: bool = False
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, source: LayerSource, model: PreTrainedModel, device: torch.device) -> Target:
        """The target of ``source``, whose ``model`` is loaded, whole or streamed."""
        return cls(
            name=source.name,
            model=model,
            tokenizer=source.tokenizer,
            eos_token_ids=source.eos_token_ids,
            dtype=source.dtype,
            device=device,
            source=source.source,
            identity=source.identity,
            planted=source.planted,
            notes=source.notes,
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are formatted by the checkpoint's own chat template."""
        return bool(self.tokenizer.chat_template)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt ids of a conversation that the model is to continue as the assistant.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, the last one usually the user's.

        Without a chat template (a base model) the contents are joined by blank lines, roles left out.

        Raises:
            SubspecError: no message, or one that the chat template refuses.
        """
        if not messages:
            raise SubspecError("a prompt needs at least one message")
        messages = [dict(message) for message in messages]
        if not self.has_chat_template:
            text = "\n\n".join(message["content"] for message in messages)
            return list(self.tokenizer(text)["input_ids"])
        extra = {}
        template = self.tokenizer.chat_template
        if "strftime_now" in str(template):
            extra["date_string"] = PINNED_DATE
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, **extra
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise SubspecError(
                f"the chat template of {self.name} refuses the roles [{roles}]: {error}"
            ) from error
        return list(encoded["input_ids"])
