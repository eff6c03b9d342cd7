"""When a generation ends, and the text it has produced so far.

A verification pass emits several tokens at once; whatever ends the text (an end-of-sequence id, a stop string,
the length limit) must cut the block exactly where plain decoding would have stopped.
"""

from collections.abc import Sequence
from typing import Protocol

from subspec.decoding.result import FinishReason


class TextDecoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def eos_ids(*places: object) -> tuple[int, ...]:
    """Every id that ends a text, ascending, from the first place that names any.

    Args:
        places: whatever has an ``eos_token_id`` (a number, several, or None): configurations, a tokenizer.
    """
    for place in places:
        ids = getattr(place, "eos_token_id", None)
        if ids is not None and ids != []:
            return tuple(sorted({int(token) for token in (ids if isinstance(ids, list | tuple) else [ids])}))
    return ()


class Emission:
    """Collects emitted tokens until something ends the text.

    Args:
        eos_token_ids: any of these ends the text and is its last token.
        max_new_tokens: most tokens to emit.
        stop: strings that end the text; the tokens up to the one that completes the string are kept, the text
            is cut before it. Needs ``tokenizer``.
        tokenizer: turns ids into text; None: no text.
    """

    def __init__(
        self,
        *,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        tokenizer: TextDecoder | None = None,
    ) -> None:
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self._eos = frozenset(eos_token_ids)
        self._max = max_new_tokens
        self._stop = tuple(s for s in stop if s)
        self._tokenizer = tokenizer
        self._shown = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stopped_text: str | None = None

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self._max - len(self.token_ids)

    def add(self, block: Sequence[int]) -> list[int]:
        """Append a block of tokens up to whatever ends the text; returns the part that was kept."""
        before = len(self.token_ids)
        for token in block:
            self.token_ids.append(token)
            if token in self._eos:
                self.finish_reason = FinishReason.eos
                break
            if self.remaining <= 0:
                self.finish_reason = FinishReason.length
                break
        if self._stop:
            self._cut_at_stop_string(before)
        return self.token_ids[before:]

    def _cut_at_stop_string(self, before: int) -> None:
        if not any(stop in self._decode(len(self.token_ids)) for stop in self._stop):
            return
        # Token by token only in the block that holds a stop string: plain decoding would have looked after each.
        for count in range(before + 1, len(self.token_ids) + 1):
            text = self._decode(count)
            hits = [text.find(stop) for stop in self._stop if stop in text]
            if hits:
                self._stopped_text = text[: min(hits)]
                del self.token_ids[count:]
                self.finish_reason = FinishReason.stop
                return

    def _decode(self, count: int) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self.token_ids[:count], skip_special_tokens=True)

    def text(self) -> str | None:
        """The text so far (cut before a stop string), or None without a tokenizer."""
        if self._stopped_text is not None:
            return self._stopped_text
        return None if self._tokenizer is None else self._decode(len(self.token_ids))

    def new_text(self) -> str:
        """Text that became certain since the last call: no split characters, no beginning of a stop string."""
        text = self.text()
        if text is None:
            return ""
        end = len(text)
        if self.finish_reason is None:
            end = len(text.rstrip("\ufffd"))
            for stop in self._stop:
                for size in range(min(len(stop) - 1, end), 0, -1):
                    if text.endswith(stop[:size], 0, end):
                        end = min(end, end - size)
                        break
        fresh = text[self._shown : max(end, self._shown)]
        self._shown = max(end, self._shown)
        return fresh
