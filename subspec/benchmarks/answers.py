r"""Find the final answer in a model's text and compare it with the reference. No generated code is run.

The prompts ask for a last line ``Answer: ...``; models also write ``#### 42``, ``\boxed{42}`` or "the answer is 42".
The last marker that is followed by an answer counts: the working often mentions earlier candidates, and remarks such as
"I hope this answer is helpful" come after the answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from subspec.benchmarks.latex import DEGREES, MAX_DIGITS, equivalent, evaluate_integer, plain


@dataclass(frozen=True)
class Checker:
    """Reading and comparing of answers.

    Attributes:
        parse: a candidate -> its answer in canonical form, "" if it states one of the wrong kind, None if none.
        unmarked: (last line, candidates) -> the answer of a text in which no candidate states one.
        matches: (found, reference) -> whether they are equal.
    """

    parse: Callable[[str], str | None]
    unmarked: Callable[[str, list[str]], str | None]
    matches: Callable[[str, str], bool]

    def extract(self, text: str, cut: bool = False) -> str | None:
        """The final answer of a text, or None. ``cut``: at the length limit, so that its last line is not complete."""
        found = candidates(text, cut)
        answer = next((answer for one in found if (answer := self.parse(one)) is not None), None)
        if answer is None and not cut:
            answer = self.unmarked("".join(text.strip().splitlines()[-1:]), found)
        return answer or None


# "Answer: 7", "**Final answer:** 7", "The answer is 7", "the correct option is (C)"; "#### 7" is GSM8K's own.
_MARKER = re.compile(
    r"####"
    r"|\banswer\b[\s*_]*(?:is\b[\s*_]*)?[:=][\s*_]*"
    r"|(?P<sentence>\b(?:answer|result|correct (?:option|choice))\b[\s*_]*is\b[\s*_]*:?)",
    re.IGNORECASE,
)
_REMARK_ON_ANSWER = re.compile(r"\W*(?:(?:in)?correct|right|wrong|not|(?:help|use)ful|clear)\b", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def candidates(text: str, cut: bool) -> list[str]:
    """Contents of boxes and lines after answer markers, the last one first.

    Args:
        text: a model's text; only the part after a closed ``<think>`` block is read.
        cut: whether the text was cut, so that an answer at its very end counts only in a closed box.
    """
    text = text.rsplit("</think>", 1)[-1]
    found = [(at, True, content) for at, content in _boxes(text) if content]
    for match in _MARKER.finditer(text):
        line, end, _ = text[match.end() :].lstrip().partition("\n")
        remark = match["sentence"] and _REMARK_ON_ANSWER.match(line)
        if line.strip() and not remark and (end or not cut):
            found.append((match.end(), False, line.strip()))
    return [content for _, _, content in sorted(found, reverse=True)]


def _boxes(text: str) -> list[tuple[int, str]]:
    r"""Position and content of every complete ``\boxed{...}``, braces balanced."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in re.finditer(r"(?<!\\)[{}]", text):
        if match.group() == "{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    starts = ((match.start(), match.end()) for match in _BOXED.finditer(text))
    return [(at, text[brace + 1 : closing[brace]].strip()) for at, brace in starts if brace in closing]


# ------------------------------------------------------------------------------------------------ numbers

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?(?!\d)")
# A number inside a fraction, root, power, product or sum is not the answer.
_PART_BEFORE = re.compile(r"\\[dtc]?frac|\\sqrt|(?:\d\s*/|\^|±|\\pm)\s*$")
_PART_AFTER = re.compile(r"\s*(?:/|\^|×|·|\\times|\\cdot)\s*[\d({\\-]|\s*[-+]\s*[\d(\\]|\s*[½¼¾⅓⅔]|\s+\d+\s*/\s*\d")
_ANOTHER_NUMBER = re.compile(r"\s*(?:,|;|&|and\b|or\b)\s*-?\d[\d,./]*\W*$")
_REMARK = re.compile(r"(?<=\d)[^\d()]*\s\([^()]*\)[\s.*]*$")


def _integer(text: str, last: bool = False) -> str | None:
    """The first (or ``last``) number of a line as a whole number, without separators, currency, units, zeros."""
    stripped = _REMARK.sub("", _strip_typesetting(text)).rsplit("=", 1)[-1]
    matches = list(_NUMBER.finditer(stripped))
    if not matches:
        return None
    match = matches[-1 if last else 0]
    before, after = stripped[: match.start()], stripped[match.end() :]
    if _PART_BEFORE.search(before) or _PART_AFTER.match(after):
        value = evaluate_integer(text.rsplit("=", 1)[-1])
        return "" if value is None else str(value)
    whole, _, decimals = match.group().replace(",", "").partition(".")
    refused = decimals.strip("0") or len(whole) > MAX_DIGITS or _ANOTHER_NUMBER.match(after)
    return "" if refused else str(int(whole))


def _strip_typesetting(text: str) -> str:
    text = DEGREES.sub("", plain(text))
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\{,\}|(?<=\d)\\[,!;: ](?=\d)", "", text)
    text = re.sub(r"\\(?:boxed|fbox)\b|\\[,!;: ()\[\]$]|[${}*`€£]", " ", text)
    # "- $5" and "-$5" mean -5; "$" is removed above.
    return re.sub(r"(^|[\s=:(])-\s+(?=\d)", r"\1-", text)


def _integer_to_999(text: str, last: bool = False) -> str | None:
    number = _integer(text, last)
    return number if not number or 0 <= int(number) <= 999 else ""


def _same_integer(found: str, answer: str) -> bool:
    reference = _integer(answer)
    return bool(reference) and int(found) == int(reference)


# ------------------------------------------------------------------------------------------------ letters

# "A" is also an article: "Answer: A proton" names no option, "Answer: A because ..." does.
_LETTER = re.compile(
    r"[\s*_$({\[\"'`]*(?:option|choice|letter)?[\s*_(\[]*([A-D])(?![\w'’+^-])"
    r"(?!(?<=A)\s+(?!because\b|since\b|as\b|is\b|and\b|or\b)[a-z])"
)
_BARE_LETTER = re.compile(r"[\s*_$(\[]*(?:option\s+)?([A-Z])[\s*_$)\].:]*$", re.IGNORECASE)
_ANOTHER_LETTER = re.compile(r"[\s*_$)\]}.]*(?:,|;|/|&|\band\b|\bor\b)[\s*_$(\[{]*(?:option\s+)?[A-D](?![\w'’])")


def _letter(text: str) -> str | None:
    """Option letter, A to D, at the beginning of a line that names no second one."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\s*", "", plain(text))
    text = re.sub(r"^\s*(?:both\s+)?(?i:options?|choices?|letters?)\b", "", text)
    match = _LETTER.match(text) or _BARE_LETTER.match(text)
    if match is None:
        return None
    letter = match.group(1).upper()
    return letter if letter in "ABCD" and not _ANOTHER_LETTER.match(text[match.end(1) :]) else ""


def _bare_letter(line: str, _: list[str]) -> str | None:
    match = _BARE_LETTER.match(line)
    return _letter(line) if match else None


# -------------------------------------------------------------------------------------------- mathematics


def _expression(text: str) -> str | None:
    """Mathematical expression as written, or one or two words (names, "no solution"); None for prose."""
    text = text.strip().strip("*_` ").strip()
    prose = len(text.split()) > 2 and not re.search(r"[\d\\$=]", text)
    return None if prose or not text else text


INTEGER = Checker(_integer, lambda line, _: _integer(line, last=True), _same_integer)
INTEGER_TO_999 = Checker(_integer_to_999, lambda line, _: _integer_to_999(line, last=True), _same_integer)
CHOICE = Checker(_letter, _bare_letter, lambda found, answer: found == answer.strip().upper())
MATH = Checker(_expression, lambda _, found: next(iter(found), None), equivalent)
