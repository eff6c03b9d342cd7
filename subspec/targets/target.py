"""A loaded target: model, tokenizer, origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspec.errors import ConfigError, SubspecError
from subspec.targets.source import LayerSource
from subspec.targets.weight_files import one_line

PINNED_DATE = datetime(2024, 7, 26)
"""The clock of chat templates, which would otherwise write today's date into every prompt: a run must be repeatable."""

CLOCK = "strftime_now"
"""The function of a template that formats the time."""


@dataclass
class Target:
    """The model whose output a run reproduces, ready for inference. Other attributes: see :class:`LayerSource`.

    Attributes:
        model: in eval mode, without gradients, in ``dtype``, with SDPA attention.
        tokenizer: use :meth:`chat_ids` for prompts.
        device: of the weights, or of the ring that they are streamed to.
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
        known = {field.name for field in fields(cls)} - {"model", "device"}
        return cls(model=model, device=device, **{name: getattr(source, name) for name in known})

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt ids of a conversation (``{"role": ..., "content": ...}`` each), for the assistant to continue.

        Without a chat template (a base model) the contents are joined by blank lines, roles left out.

        Raises:
            SubspecError: no message, or one that the chat template refuses.
        """
        if not messages:
            raise SubspecError("a prompt needs at least one message")
        if not self.tokenizer.chat_template:
            text = "\n\n".join(message["content"] for message in messages)
            return list(self.tokenizer(text)["input_ids"])
        return template_ids(self.tokenizer, messages, self.name)


def template_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], name: str) -> list[int]:
    """Ids of ``messages`` in the chat template of the model ``name``, ready for the assistant's answer.

    Raises:
        ConfigError: the template raises anything, or gives nothing.
    """
    try:
        template = tokenizer.get_chat_template()
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=_pinned_clock() + template if CLOCK in template else template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
    except Exception as error:  # templates are programs
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template of {name} fails for the roles [{roles}] ({one_line(error)}): give a copy of the "
            "checkpoint another chat_template.jinja"
        ) from error
    if not encoded["input_ids"]:
        raise ConfigError(f"the chat template of {name} gives an empty prompt: give a copy another one")
    return list(encoded["input_ids"])


@cache
def _pinned_clock() -> str:
    """A macro in place of a template's clock (transformers passes no functions to templates)."""
    codes = {f"%{code}": PINNED_DATE.strftime(f"%{code}") for code in "aAbBcdeDFHIjmMpRSTuUVwWxXyYzZ"}
    codes |= {f"%-{code[1]}": text.lstrip("0 ") or "0" for code, text in codes.items() if text.isdigit()}
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in codes.items())
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
