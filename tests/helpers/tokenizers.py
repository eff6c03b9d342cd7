"""Tokenizers of every way to decode that a checkpoint may come with, and one that no rule covers.

A vocabulary of a few hundred tokens each: all bytes, ASCII, characters of several bytes, words with leading space,
special and plain added tokens. No training, no network::

    tokenizer, size = byte_fallback(), ...   # SentencePiece with <0x..> tokens, as Llama 2 and Mistral have it
"""

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny import tiny_tokenizer

FIRST_BYTE = 3
"""Id of ``<0x00>``; the byte b has the id ``FIRST_BYTE + b``."""

WORDS = ["▁", "▁▁", "▁the", "é", "漢", "✅", "##ab", "a▁b", "▁,", "n't", "\ufffd", "▁.", "\u0301"]


def with_decoder(decoder: decoders.Decoder | None, *, words: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that decodes with ``decoder``.

    Args:
        words: a word-level model instead of BPE.
    """
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), *WORDS]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    if words:
        model = models.WordLevel(vocabulary, unk_token="<unk>")
    else:
        model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<shown✅>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


def sentencepiece(*more: decoders.Decoder) -> decoders.Decoder:
    """The decoder that SentencePiece models are converted to, with ``more`` steps."""
    return decoders.Sequence([decoders.Replace("▁", " "), *more])


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it."""
    return with_decoder(sentencepiece(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)))


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen and Llama 3 have it, with plain added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<shown✅>", special=False)])
    return tokenizer


class FickleTokenizer:
    """Text that changes at its beginning with every token, and loses the space at its end."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        letters = "".join(chr(97 + token % 26) if token % 5 else " " for token in token_ids)
        return f"{len(token_ids) % 3}{letters}".rstrip()

    def __len__(self) -> int:
        return 300


def cleaning() -> PreTrainedTokenizerFast:
    """Whose text transformers tidies up: " ." becomes "."."""
    tokenizer = with_decoder(sentencepiece(decoders.Fuse()), words=True)
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


KNOWN: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, space kept": lambda: with_decoder(sentencepiece(decoders.ByteFallback(), decoders.Fuse())),
    "no byte fallback": lambda: with_decoder(sentencepiece(decoders.Fuse(), decoders.Strip(" ", 1, 0))),
    "metaspace": lambda: with_decoder(decoders.Metaspace()),
    "metaspace, space kept": lambda: with_decoder(decoders.Metaspace(prepend_scheme="never")),
    "word pieces": lambda: with_decoder(decoders.WordPiece(), words=True),
    "words": lambda: with_decoder(None, words=True),
}
"""Decoded in a window, see ``subspec.decoding.growing_text``."""

UNKNOWN: dict[str, Callable[[], PreTrainedTokenizerFast | FickleTokenizer]] = {
    "suffixes": lambda: with_decoder(decoders.BPEDecoder()),
    "cleaned up": cleaning,
    "fickle": FickleTokenizer,
}
"""Decoded whole."""
