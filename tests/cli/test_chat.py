"""The chat: a conversation from a pipe, its figures, and what is refused."""

import io
import re

import pytest

from subspec.cli.chat import main

TINY = ["target=planted_tiny", "draft=prompt_lookup", "tree=chain", "tree.depth=3", "device=cpu"]
LIMITS = ["decoding.max_new_tokens=12", "decoding.max_length=96"]


def chat(monkeypatch, capsys, text, *arguments):
    """Exit status, and the lines of standard output and of the errors."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *LIMITS, *arguments])
    out = capsys.readouterr()
    return stop.value.code, out.out.splitlines(), out.err


def answers(lines):
    """The answers, each in front of its figures."""
    figures = [place for place, line in enumerate(lines) if re.search(r"tokens/s, tau \d+\.\d\d, \d+ passes", line)]
    return [lines[place - 1] for place in figures]


def test_a_conversation_goes_on_until_it_is_cleared(monkeypatch, capsys):
    code, lines, _ = chat(monkeypatch, capsys, "one\ntwo\n\n/clear\none\n/exit\nthree\n")
    assert code == 0
    first, second, again = answers(lines)
    assert first == again
    assert first != second


def test_answers_are_plain_decodings(monkeypatch, capsys):
    drafted = chat(monkeypatch, capsys, "one\ntwo\n")[1]
    plain = chat(monkeypatch, capsys, "one\ntwo\n", "draft=none")[1]
    assert answers(drafted) == answers(plain)


def test_a_conversation_that_grows_too_long_says_so_and_goes_on(monkeypatch, capsys):
    code, lines, _ = chat(monkeypatch, capsys, f"{'word ' * 200}\none\n")
    assert code == 0
    assert any("decoding.max_length" in line and "/clear" in line for line in lines)
    assert len(answers(lines)) == 1


@pytest.mark.parametrize("wrong", ["tree.depth=0", "no_such_key=1", "offload.vram_gib=8", "-m"])
def test_a_wrong_configuration_is_one_line(monkeypatch, capsys, wrong):
    code, lines, err = chat(monkeypatch, capsys, "one\n", wrong)
    assert code == 2
    assert wrong.partition("=")[0].split(".")[-1] in err
    assert len(err.strip().splitlines()) == 1
    assert not answers(lines)
