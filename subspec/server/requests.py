"""Bodies of requests. Types are strict; null stands for a parameter that is left out.

Parameters that would change the text and are not supported are refused unless they have a value without effect. Others
that are not known are ignored.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from subspec.decoding.arguments import is_whole, stop_list
from subspec.decoding.sampling import Sampling
from subspec.server.errors import ApiError

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "min_p", "min_tokens", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("best_of", "repetition_penalty"), (1,)),
    **dict.fromkeys(("echo", "logprobs"), (False,)),
    **dict.fromkeys(("functions", "stop_token_ids", "tools"), ([],)),
    **dict.fromkeys(("chat_template_kwargs", "logit_bias"), ({},)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    **dict.fromkeys(("audio", "chat_template", "prompt_logprobs", "structured_outputs"), ()),
    **dict.fromkeys(("guided_choice", "guided_grammar", "guided_json", "guided_regex"), ()),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
"""Parameters that are not supported, and their values without effect besides null."""


def _has_no_effect(name: str, value: Any) -> bool:
    # True == 1 and False == 0 in Python; `logprobs` 0 asks for something, false does not.
    return any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in WITHOUT_EFFECT[name])


MAX_STOPS, MAX_STOP_LENGTH = 32, 1000
"""Stop strings are looked for behind every token, by the thread that serves all texts."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no text") from error
    return text


def _stops(value: Any) -> tuple[str, ...]:
    stops = tuple(map(_encodable, stop_list(value)))
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return stops


def _text_of(content: Any) -> Any:
    """A message's text; of several parts, one behind the other on lines of their own."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts {"type": "text", "text": ...} are supported')
    return "\n".join(part["text"] for part in content)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Model):
    """Options of a stream."""

    include_usage: bool | None = None


class Message(_Model):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of), AfterValidator(_encodable)]

    def plain(self) -> dict[str, str]:
        """For a chat template. A developer's message is the system's under its new name."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class GenerationRequest(_Model):
    """The parameters that both endpoints have. ``top_k`` and ``ignore_eos`` are not OpenAI's."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    ignore_eos: bool | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        for name in WITHOUT_EFFECT if isinstance(body, dict) else ():
            if (value := body.get(name)) is not None and not _has_no_effect(name, value):
                raise ApiError(400, f"{name} is not supported: leave it out", param=name, code="unsupported_value")
        return body

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: not named."""
        return self.max_tokens

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default: Sampling) -> Sampling:
        """The distribution that is asked for; ``default`` is for parameters that are left out."""
        named = self.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
        return replace(default, **named)


class ChatRequest(GenerationRequest):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def _one_prompt(value: Any) -> str | list[int]:
    """The prompt, also where it is the only one of a list of prompts."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return _encodable(value)
    if isinstance(value, list) and value and all(map(is_whole, value)):
        return value
    raise ValueError("one prompt at a time is supported, as a text or as a list of token ids")


class CompletionRequest(GenerationRequest):
    """``/v1/completions``: text, or the ids of its tokens."""

    prompt: Annotated[Any, AfterValidator(_one_prompt)]
