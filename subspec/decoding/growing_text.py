"""The text of ids that arrive one at a time, decoded in a short window where that equals decoding all of them.

The text of a prefix of the ids need not be a prefix of their text: a character may be split over several tokens, and a
byte-fallback decoder turns a whole run of byte tokens into replacement characters when a later byte makes it invalid.
So the text is kept in two parts: *settled* text, which no later token changes, and the *tail*.

Settled text needs a decoder whose rule is known (read from the ``tokenizers`` backend, :func:`decoding_rule`):

* ``stream``: the bytes of all tokens form one UTF-8 stream (byte-level BPE). A UTF-8 decoder is in its initial state
  behind every complete character, so text that does not end in U+FFFD is settled, and the tokens behind it can be
  decoded alone.
* ``tokens``: each token has a text of its own, except that a run of byte tokens (``<0xE2>``) is decoded together and
  that the first token may lose leading space (SentencePiece). Text up to a token that is no byte token is settled.
  The tokens behind it are decoded together with that token, the *anchor*, so that none of them is the first.
* ``whole``: nothing is known; every text is decoded from the first token on, and nothing is settled.
"""

import json
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""The replacement of an invalid or incomplete UTF-8 sequence."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_SPACE_MARK = "▁"


class TextDecoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class DecodingRule(Enum):
    """How the texts of tokens make up the text of a sequence; see the module's docstring."""

    stream = "stream"
    tokens = "tokens"
    whole = "whole"


def decoding_rule(tokenizer: TextDecoder) -> DecodingRule:
    """The rule that ``tokenizer`` decodes by, ``whole`` where it is not one of the known ones."""
    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or "decode" in vars(tokenizer):
        return DecodingRule.whole
    if kind.decode is not PreTrainedTokenizerBase.decode or kind._decode is not PreTrainedTokenizerFast._decode:
        return DecodingRule.whole
    if _cleans_up(tokenizer):
        return DecodingRule.whole
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:  # tokens joined by spaces
        return DecodingRule.tokens
    try:
        state = json.loads(decoder.__getstate__())
    except (TypeError, ValueError):
        return DecodingRule.whole
    steps = state["decoders"] if state.get("type") == "Sequence" else [state]
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return DecodingRule.stream
    return DecodingRule.tokens if _decodes_tokens(steps) else DecodingRule.whole


def _cleans_up(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether transformers removes spaces from the decoded text; it never does with BPE, unless told twice."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    insists = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return insists or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _decodes_tokens(steps: list[dict[str, Any]]) -> bool:
    """Whether a chain of decoders follows the rule ``tokens``."""
    kinds = [step.get("type") for step in steps]
    if kinds in (["Metaspace"], ["WordPiece"]):
        return True
    if (
        not kinds
        or kinds[0] != "Replace"
        or kinds[1:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"], ["Fuse"], ["Fuse", "Strip"])
    ):
        return False
    marks = steps[0].get("pattern") == {"String": _SPACE_MARK} and steps[0].get("content") == " "
    return marks and all(
        step.get("content") == " " and step.get("stop") == 0 for step in steps if step.get("type") == "Strip"
    )


class GrowingText:
    """The text of ids that are appended one at a time. Special tokens are not part of it.

    Args:
        tokenizer: decodes the ids.
        overlap: characters before the tail that :meth:`find` may need, one less than the longest string looked for.

    Attributes:
        rule: of the tokenizer.
        tail: text behind the settled text.
    """

    def __init__(self, tokenizer: TextDecoder, overlap: int = 0) -> None:
        self._tokenizer = tokenizer
        self.rule = decoding_rule(tokenizer)
        self.tail = ""
        self._settled: list[str] = []
        self._taken = 0
        self._overlap = overlap
        self._before = ""  # the end of the settled text, for find()
        self._window: list[int] = []  # ids of the tail
        self._anchor: list[int] = []
        self._anchor_text = ""

    def append(self, token: int) -> None:
        """Add one id."""
        self._settle()
        self._window.append(token)
        text = self._decode(self._anchor + self._window)
        self.tail = text[len(self._anchor_text) :]

    def text(self) -> str:
        """The whole text."""
        return "".join(self._settled) + self.tail

    def take_settled(self) -> str:
        """Settled text that no earlier call has returned."""
        self._settle()
        fresh = "".join(self._settled[self._taken :])
        self._taken = len(self._settled)
        return fresh

    def find(self, strings: Sequence[str]) -> int | None:
        """Where in :meth:`text` the first occurrence of any of ``strings`` begins.

        Only occurrences that end in the tail are looked for: earlier ones were there when their end was the tail.
        """
        recent = self._before + self.tail
        places = [place for place in map(recent.find, strings) if place >= 0]
        if not places:
            return None
        return sum(map(len, self._settled)) - len(self._before) + min(places)

    def _settle(self) -> None:
        """Settle the tail if nothing that follows can change it."""
        if not self._window:
            return
        if self.rule is DecodingRule.stream:
            if not self.tail or self.tail.endswith(REPLACEMENT):
                return
        elif self.rule is DecodingRule.tokens:
            alone = self._text_of_anchor(self._window[-1])
            if not alone:
                return
            self._anchor, self._anchor_text = self._window[-1:], alone
        else:
            return
        self._settled.append(self.tail)
        self._before = (self._before + self.tail)[-self._overlap :] if self._overlap else ""
        self._window, self.tail = [], ""

    def _text_of_anchor(self, token: int) -> str:
        """The text of ``token`` alone, "" if it cannot be an anchor: a byte token, or one without any text."""
        assert isinstance(self._tokenizer, PreTrainedTokenizerFast)
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None or _BYTE_TOKEN.fullmatch(name):
            return ""
        return self._decode([token])

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
