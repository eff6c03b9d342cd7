"""Where texts end: a block of tokens is cut where plain decoding, which looks after each token, would have stopped."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from subspec.decoding.growing_text import DecodingRule, GrowingText, decoding_rule
from subspec.decoding.result import FinishReason
from subspec.decoding.stopping import OutputBuffer, eos_ids, hidden_tokens
from subspec.errors import ConfigError
from tests.helpers import tokenizers
from tests.helpers.tiny import END_ID, tiny_tokenizer
from tests.helpers.tokenizers import FIRST_BYTE, KNOWN, UNKNOWN, byte_fallback, with_decoder

ALL = KNOWN | UNKNOWN

CHECK = [FIRST_BYTE + byte for byte in "✅".encode()]
"""The three byte tokens of one character."""


@functools.lru_cache
def made(name):
    return ALL[name]()


def token_lists(size):
    """Ids: any, and runs of byte tokens, which form valid and invalid characters; a few are of no token."""
    byte = st.sampled_from([*CHECK, *(FIRST_BYTE + b for b in "\nAé漢".encode())])
    return st.lists(st.one_of(byte, st.integers(0, size + 1)), min_size=1, max_size=40)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def plainly(tokenizer, ids, stop, eos, most):
    """What plain decoding emits, by the definition: after each token, look at the whole text."""
    special = getattr(tokenizer, "all_special_tokens", ())  # which no text shows
    ends = {tokenizer.convert_tokens_to_ids(string) for string in stop if string in special}
    for count in range(1, len(ids) + 1):
        text = decode(tokenizer, ids[:count])
        places = [text.index(string) for string in stop if string in text]
        if places:
            return ids[:count], FinishReason.stop, text[: min(places)]
        if ids[count - 1] in eos:
            return ids[:count], FinishReason.eos, text
        if ids[count - 1] in ends:
            return ids[:count], FinishReason.stop, text
        if count == most:
            return ids[:count], FinishReason.length, text
    return ids, None, decode(tokenizer, ids)


def emitted(tokenizer, ids, sizes, stop=(), eos=(), most=10**6, streamed=True):
    """The output of ``ids`` in blocks of ``sizes``, and the pieces of text that were streamed."""
    output = OutputBuffer(eos_token_ids=eos, max_new_tokens=most, stop=stop, tokenizer=tokenizer)
    pieces, start, sizes = [], 0, iter(sizes)
    while start < len(ids) and output.finish_reason is None:
        block = ids[start : start + next(sizes, 1)]
        kept = output.add(block)
        assert kept == block[: len(kept)]
        start += len(block)
        if streamed:
            pieces.append(output.new_text())
    return output, pieces


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_blocks_end_where_single_tokens_do(name, data):
    tokenizer = made(name)
    ids = data.draw(token_lists(len(tokenizer)))
    sizes = data.draw(st.lists(st.integers(1, 12), max_size=20))
    text = decode(tokenizer, ids)
    cuts = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 3))
    inside = st.lists(cuts.map(lambda cut: text[cut[0] : sum(cut)]).filter(bool), max_size=2)
    stop = data.draw(inside if text else st.just([])) + data.draw(
        st.lists(st.sampled_from(["✅", "\ufffd", " ", "a", "é漢", "zz"]), max_size=2)
    )
    eos = data.draw(st.sampled_from([(), (2,), (ids[-1],)]))
    most = data.draw(st.integers(1, 45))
    expected = plainly(tokenizer, ids, stop, eos, most)
    for streamed in (True, False):
        output, pieces = emitted(tokenizer, ids, sizes, stop, eos, most, streamed)
        assert (output.token_ids, output.finish_reason, output.text()) == expected
        if streamed and output.finish_reason is not None:
            assert "".join(pieces) == output.text()
        assert output.text().startswith("".join(pieces))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_settled_text_is_never_taken_back(name, data):
    tokenizer = made(name)
    ids = data.draw(token_lists(len(tokenizer)))
    growing, settled = GrowingText(tokenizer), ""
    for count, token in enumerate(ids, start=1):
        growing.append(token)
        assert growing.text() == decode(tokenizer, ids[:count])
        settled += growing.take_settled()
    whole = decode(tokenizer, ids)
    assert whole.startswith(settled)
    assert growing.text() == whole


@pytest.mark.parametrize("blocks", [[1] * 30, [3] * 10, [2] * 15, [5, 8, 17], [30]])
def test_a_stop_string_of_byte_tokens_inside_a_run_of_them(blocks):
    """A later byte turns the whole run into replacement characters: the text of the block does not hold the string."""
    ids = CHECK * 8 + CHECK[:1]
    assert "✅" not in decode(byte_fallback(), ids)
    output, pieces = emitted(byte_fallback(), ids, blocks, stop=["✅"])
    assert (output.token_ids, output.finish_reason, output.text()) == (CHECK, FinishReason.stop, "")
    assert "".join(pieces) == ""


def test_a_run_of_byte_tokens_is_streamed_when_it_cannot_change():
    tokenizer = byte_fallback()
    (letter,) = [tokenizer.convert_tokens_to_ids("x")]
    output = OutputBuffer(eos_token_ids=(), max_new_tokens=99, tokenizer=tokenizer)
    pieces = [output.add([token]) and output.new_text() for token in [letter, *CHECK, *CHECK, letter]]
    assert pieces == ["x", "", "", "", "", "", "", "✅✅x"]
    broken, pieces = emitted(tokenizer, [letter, *CHECK, *CHECK[:1], letter], [1] * 9, most=6)
    assert "".join(pieces) == broken.text() == "x" + "\ufffd" * 4 + "x"


def test_a_split_character_is_streamed_when_it_is_complete():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a漢b").input_ids
    assert len(ids) == 5
    output = OutputBuffer(eos_token_ids=(), max_new_tokens=99, tokenizer=tokenizer)
    pieces = [output.add([token]) and output.new_text() for token in ids]
    assert pieces == ["a", "", "", "漢", "b"]


def test_the_beginning_of_a_stop_string_is_held_back():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "xababc"]
    output, pieces = emitted(tokenizer, ids, [1] * 6, stop=["abc", "bb"])
    assert pieces == ["x", "", "", "ab", "", ""]
    assert output.text() == "xab"
    output, pieces = emitted(tokenizer, ids[:3], [1] * 3, stop=["abc"], most=3)
    assert (pieces, output.finish_reason) == (["x", "", "ab"], FinishReason.length)


@pytest.mark.parametrize("name", UNKNOWN)
def test_without_a_rule_text_is_streamed_at_the_end(name):
    output, pieces = emitted(made(name), list(range(40, 80)), [4] * 10, most=40)
    assert pieces[:-1] == [""] * 9
    assert pieces[-1] == output.text() != ""


# ---------------------------------------------------------------------------------- how a tokenizer decodes


@pytest.mark.parametrize("name", ALL)
def test_which_tokenizers_are_decoded_in_a_window(name):
    rule = decoding_rule(made(name))
    assert (rule is DecodingRule.whole) == (name in UNKNOWN)
    assert (rule is DecodingRule.stream) == (name == "byte-level")


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
        tokenizers.sentencepiece(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 1)),
        decoders.Sequence([decoders.Replace("e", ""), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.CTC(),
    ],
)
def test_other_decoders_are_not_taken_for_known_ones(decoder):
    assert decoding_rule(with_decoder(decoder)) is DecodingRule.whole


def test_a_tokenizer_with_a_decode_of_its_own_is_not_taken_for_a_known_one():
    tokenizer = byte_fallback()
    tokenizer.decode = lambda ids, **options: "text"
    assert decoding_rule(tokenizer) is DecodingRule.whole

    class Own(type(tokenizer)):
        def _decode(self, *arguments, **options):
            return super()._decode(*arguments, **options).upper()

    own = Own(tokenizer_object=byte_fallback().backend_tokenizer, unk_token="<unk>")
    assert decoding_rule(own) is DecodingRule.whole


@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
def test_a_long_text_is_not_decoded_again_and_again(name, monkeypatch):
    decoded = []
    decode = GrowingText._decode
    watched = lambda self, ids: decoded.append(len(ids)) or decode(self, ids)  # noqa: E731
    monkeypatch.setattr(GrowingText, "_decode", watched)
    ids = list(range(270, 300)) * 60
    output, pieces = emitted(made(name), ids, [7] * 999, stop=["never \0"], most=len(ids))
    assert "".join(pieces) == output.text() == made(name).decode(ids, skip_special_tokens=True)
    assert sum(decoded) < 5 * len(ids)


# ---------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("blocks", [[1] * 9, [5], [2, 3]])
@pytest.mark.parametrize("eos", [(), (END_ID,)])
def test_a_special_token_as_stop_string_ends_the_text_like_an_eos_and_an_eos_is_one_first(blocks, eos):
    tokenizer = tiny_tokenizer()
    output, pieces = emitted(tokenizer, [70, 71, END_ID, 72, 73], blocks, stop=["<|im_end|>"], eos=eos)
    assert output.token_ids == [70, 71, END_ID]
    assert output.finish_reason == (FinishReason.eos if eos else FinishReason.stop)
    assert output.text() == tokenizer.decode([70, 71]) == "".join(pieces)


def test_a_special_token_that_is_spelled_out_is_a_stop_string_like_any_other():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "a<|im_end|>b"]
    output, pieces = emitted(tokenizer, ids, [4] * 9, stop=["<|im_end|>"])
    assert output.token_ids == ids[:-1]
    assert output.text() == "a" == "".join(pieces)


@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
def test_an_added_token_that_is_shown_is_found_in_the_text(name):
    tokenizer = made(name)
    token = tokenizer.convert_tokens_to_ids("<shown✅>")
    assert "<shown✅>" not in hidden_tokens(tokenizer)
    for stop in ("<shown✅>", "wn✅"):
        output, _ = emitted(tokenizer, [300, token, 301], [3], stop=[stop])
        assert (output.token_ids, output.finish_reason) == ([300, token], FinishReason.stop)


def test_which_tokens_are_hidden():
    last = len(byte_fallback()) - 1
    assert hidden_tokens(byte_fallback()) == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|end|>": last}
    assert hidden_tokens(tokenizers.FickleTokenizer()) == {}


def test_a_stop_string_around_a_special_token_is_refused():
    with pytest.raises(ConfigError, match=r"stop='<\|im_end\|>\\n' .*'<\|im_end\|>'"):
        OutputBuffer(eos_token_ids=(), max_new_tokens=9, stop=["<|im_end|>\n"], tokenizer=tiny_tokenizer())


# --------------------------------------------------------------------------------------------- arguments


def test_without_a_tokenizer_there_is_no_text():
    output = OutputBuffer(eos_token_ids=(5,), max_new_tokens=3)
    assert output.add([1, 2]) == [1, 2]
    assert output.finish_reason is None
    assert output.add([3, 4, 5]) == [3]
    assert output.finish_reason is FinishReason.length
    assert (output.text(), output.new_text()) == (None, "")


class Named:
    def __init__(self, ids):
        self.eos_token_id = ids


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([Named([7, 2, 7]), Named(3)], (2, 7)),
        ([Named(None), Named([]), Named(3)], (3,)),
        ([None, object()], ()),
        ([Named(0)], (0,)),
    ],
)
def test_the_first_place_that_names_an_eos_counts(places, expected):
    assert eos_ids(*places) == expected


@pytest.mark.parametrize("ids", ["2", -1, True, 2.0, [1, "2"], [[1]], {"a": 1}, [None], float("nan")])
def test_what_is_no_eos_id_is_refused(ids):
    with pytest.raises(ConfigError, match="eos_token_id"):
        eos_ids(Named(ids))
