"""The end of a generation, and its text.

A verification pass emits several tokens at once. An end-of-sequence id, a stop string or the length limit must cut the
block exactly where plain decoding would have stopped. Plain decoding checks after each token, so stop strings are
searched after each token of a block: a later token may change the text that a part of the block decodes to
(:mod:`subspec.decoding.growing_text`).
"""

from collections.abc import Sequence
from typing import Any

from subspec.decoding.arguments import ArgumentError, is_whole, stop_list
from subspec.decoding.growing_text import DecodingRule, GrowingText, TextDecoder
from subspec.decoding.result import FinishReason
from subspec.errors import ConfigError


def eos_ids(*places: object) -> tuple[int, ...]:
    """Every id that ends a text, ascending, from the first place that names any.

    Args:
        places: objects with an ``eos_token_id`` (a number, several, or None): configurations, a tokenizer.

    Raises:
        ConfigError: something else stands there.
    """
    for place in places:
        ids = getattr(place, "eos_token_id", None)
        if ids is not None and ids != []:
            return eos_tuple(ids, f"the {type(place).__name__}'s eos_token_id")
    return ()


def eos_tuple(ids: Any, where: str) -> tuple[int, ...]:
    """One id or several as a tuple, ascending.

    Args:
        where: their origin, for messages.

    Raises:
        ConfigError: they are not ids.
    """
    several = ids if isinstance(ids, list | tuple) else [ids]
    for token in several:
        if not is_whole(token) or token < 0:
            raise ConfigError(f"{where} is {ids!r}: it must be a token id, a list of them, or null")
    return tuple(sorted({int(token) for token in several}))


def hidden_tokens(tokenizer: TextDecoder) -> dict[str, int]:
    """The tokens that are left out of decoded text (special tokens), and their ids."""
    named = getattr(tokenizer, "get_added_vocab", None)
    if named is None:
        return {}
    return {
        name: token
        for name, token in named().items()
        if name and name not in tokenizer.decode([token], skip_special_tokens=True)
    }


class OutputBuffer:
    """Collects emitted tokens until something ends the text.

    Args:
        eos_token_ids: any of these ends the text and is its last token.
        max_new_tokens: most tokens to emit.
        stop: strings that end the text; the tokens up to the one that completes the string are kept, the text
            is cut before it. The name of a special token, which no text shows, stands for its id. Needs
            ``tokenizer``.
        tokenizer: turns ids into text; None: no text.

    Raises:
        ArgumentError: stop strings without a tokenizer, refused by :func:`~subspec.decoding.arguments.stop_list`,
            or a stop string that contains a special token and more.
    """

    def __init__(
        self,
        *,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        tokenizer: TextDecoder | None = None,
    ) -> None:
        self._stop = stop_list(stop)
        if self._stop and tokenizer is None:
            raise ArgumentError(f"stop={list(self._stop)}: stop strings need a tokenizer")
        self._eos = frozenset(eos_token_ids)
        self._max = max_new_tokens
        self._stop_ids = frozenset() if tokenizer is None else _stop_ids(self._stop, tokenizer)
        self._tokenizer = tokenizer
        overlap = max(map(len, self._stop), default=1) - 1
        self._growing = None if tokenizer is None else GrowingText(tokenizer, overlap)
        self._grown = 0  # ids that the growing text has
        self._held = ""  # settled text that is not streamed yet: it may be the beginning of a stop string
        self._shown = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stopped_text: str | None = None

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self._max - len(self.token_ids)

    def add(self, block: Sequence[int]) -> list[int]:
        """Append a block of tokens up to the end of the text; returns the kept part."""
        before = len(self.token_ids)
        for token in block:
            self.token_ids.append(token)
            self.finish_reason = self._ending(token)
            if self.finish_reason is not None:
                break
        return self.token_ids[before:]

    def _ending(self, token: int) -> FinishReason | None:
        """Why the text ends with ``token``, which was appended last; None: it does not."""
        if self._stop and self._growing is not None:
            self._grow()
            place = self._growing.find(self._stop)
            if place is not None:
                self._stopped_text = self._growing.text()[:place]
                return FinishReason.stop
        if token in self._eos:
            return FinishReason.eos
        if token in self._stop_ids:
            return FinishReason.stop
        return FinishReason.length if self.remaining <= 0 else None

    def _grow(self) -> None:
        """Bring the growing text up to date."""
        assert self._growing is not None
        for token in self.token_ids[self._grown :]:
            self._growing.append(token)
        self._grown = len(self.token_ids)

    def text(self) -> str | None:
        """The text so far (cut before a stop string), or None without a tokenizer."""
        if self._stopped_text is not None:
            return self._stopped_text
        if self._tokenizer is None:
            return None
        return self._tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def new_text(self) -> str:
        """Text that became final since the last call: no later token changes it or cuts it off.

        The pieces add up to :meth:`text` when the text has ended. With a tokenizer whose decoding is not known
        (``DecodingRule.whole``) nothing is final before that.
        """
        if self._growing is None:
            return ""
        if self.finish_reason is not None:
            fresh = (self.text() or "")[self._shown :]
        elif self._growing.rule is DecodingRule.whole:
            return ""
        else:
            self._grow()
            self._held += self._growing.take_settled()
            keep = _begun(self._held, self._stop)
            fresh = self._held[: len(self._held) - keep]
            self._held = self._held[len(fresh) :]
        self._shown += len(fresh)
        return fresh


def _begun(text: str, strings: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is the beginning, but not the whole, of one of ``strings``."""
    longest = 0
    for string in strings:
        sizes = range(min(len(string) - 1, len(text)), longest, -1)
        longest = next((size for size in sizes if text.endswith(string[:size])), longest)
    return longest


def _stop_ids(stop: Sequence[str], tokenizer: TextDecoder) -> frozenset[int]:
    """Ids of the stop strings that are special tokens.

    Raises:
        ArgumentError: a stop string has a special token within it, so that it could never be found in a text.
    """
    hidden = hidden_tokens(tokenizer) if stop else {}
    for string in stop:
        inside = next((name for name in hidden if name in string and string not in hidden), None)
        if inside is not None:
            raise ArgumentError(
                f"stop={string!r} contains the special token {inside!r}, which is left out of the text: use "
                f"{inside!r} alone"
            )
    return frozenset(hidden[string] for string in stop if string in hidden)
