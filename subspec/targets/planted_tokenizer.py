"""A tokenizer for planted targets, built in code: any text to ids, any id to text.

Ids 0 to 255 are bytes, three more are the special tokens of the chat template. Every further id ``n`` is the text
``<n>``, both ways: an answer that is given back as an assistant message becomes the same ids (except for bytes that are
no UTF-8). One token a byte makes prompts longer than with a real tokenizer.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
"""Ids 256, 257 and 258. None of them ends a text: see :mod:`subspec.targets.planted`."""

MIN_VOCAB = 256 + len(SPECIALS)
"""Smallest vocabulary of :func:`planted_tokenizer`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def planted_tokenizer(vocab_size: int, max_positions: int) -> PreTrainedTokenizerBase:
    """A tokenizer of ``vocab_size`` ids (at least :data:`MIN_VOCAB`) and a ChatML template; no token ends a text."""
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"a byte-level vocabulary has at least {MIN_VOCAB} ids, not {vocab_size}")
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary |= {token: number for number, token in enumerate(SPECIALS, 256)}
    vocabulary |= {f"<{number}>": number for number in range(MIN_VOCAB, vocab_size)}
    # Without merges every byte stays a token of its own; `ignore_merges` still finds `<n>` as a whole.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<\d+>"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[2],
        additional_special_tokens=list(SPECIALS[:2]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
