r"""Find the final answer in a model's text and compare it with the reference. No generated code is run.

The prompts ask for a last line ``Answer: ...``; models also write ``#### 42``, ``\boxed{42}`` or "the answer is 42".
The last marker in the text counts, because the working often mentions earlier candidates.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from subspec.benchmarks.latex import equivalent


@dataclass(frozen=True)
class Checker:
    """``extract`` finds an answer in a text; ``matches`` compares it with the reference."""

    extract: Callable[[str], str | None]
    matches: Callable[[str, str], bool]


# "Answer: 7", "**Final answer:** 7", "The answer is 7", "the correct option is (C)"; "#### 7" is GSM8K's own.
_MARKER = re.compile(
    r"####"
    r"|\banswer\b[\s*_]*(?:is\b[\s*_]*)?[:=][\s*_]*"
    r"|\b(?:answer|result|correct (?:option|choice))\b[\s*_]*is\b[\s*_]*:?",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")


def final_answer(text: str) -> str | None:
    """Text after the last answer marker: the content of a box, or the rest of the line. None without a marker."""
    line_start = max((match.end() for match in _MARKER.finditer(text)), default=-1)
    box = next((content for at, content in reversed(_boxes(text)) if content and at >= line_start), None)
    if box is not None:
        return box
    if line_start < 0:
        return None
    rest = text[line_start:].strip().splitlines()
    return rest[0].strip() if rest else None


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


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


# ------------------------------------------------------------------------------------------------ numbers

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d])")
# A number inside a fraction, root or power is not the answer.
_PART_BEFORE = re.compile(r"\\[dtc]?frac|\\sqrt|\d\s*/\s*$")
_PART_AFTER = re.compile(r"\s*(?:/|\^)\s*[\d({\\-]")
_REMARK = re.compile(r"(?<=\d)[^\d()]*\s\([^()]*\)[\s.*]*$")


def extract_integer(text: str) -> str | None:
    """Final whole number, without separators, currency, units or leading zeros."""
    candidate = final_answer(text)
    candidate = _strip_typesetting(_last_line(text) if candidate is None else candidate)
    candidate = _REMARK.sub("", candidate)
    if "=" in candidate:
        candidate = candidate.rsplit("=", 1)[1]
    match = _NUMBER.search(candidate)
    if match is None:
        return None
    if _PART_BEFORE.search(candidate[: match.start()]) or _PART_AFTER.match(candidate[match.end() :]):
        return None
    whole, _, decimals = match.group().replace(",", "").partition(".")
    if decimals.strip("0"):
        return None
    return str(int(whole))


def _strip_typesetting(text: str) -> str:
    text = text.replace("−", "-").replace("–", "-")
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\{,\}|(?<=\d)\\[,!;: ](?=\d)", "", text)
    text = re.sub(r"\\(?:boxed|fbox)\b|\\[,!;: ()\[\]$]|[${}*`€£]", " ", text)
    # "- $5" and "-$5" mean -5; "$" is removed above.
    return re.sub(r"(^|[\s=:(])-\s+(?=\d)", r"\1-", text)


def extract_integer_to_999(text: str) -> str | None:
    """Final whole number if it is from 0 to 999, as in AIME."""
    number = extract_integer(text)
    return number if number is not None and 0 <= int(number) <= 999 else None


def _same_integer(found: str, answer: str) -> bool:
    reference = extract_integer(f"Answer: {answer}")
    return reference is not None and int(found) == int(reference)


# ------------------------------------------------------------------------------------------------ letters

# "A" is also an article: "Answer: A proton" names no option, "Answer: A because ..." does.
_LETTER = re.compile(
    r"^[\s*_$({\[\"'`]*(?:option|choice|letter)?[\s*_(\[]*([A-D])(?![\w'’+^-])"
    r"(?!(?<=A)\s+(?!because\b|since\b|as\b|is\b)[a-z])"
)
_BARE_LETTER = re.compile(r"^[\s*_$(\[]*(?:option\s+)?([A-D])[\s*_$)\].:]*$", re.IGNORECASE)


def extract_letter(text: str) -> str | None:
    """Final option letter, A to D."""
    candidate = final_answer(text)
    if candidate is None:
        match = _BARE_LETTER.match(_last_line(text))
    else:
        candidate = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\s*", "", candidate)
        candidate = re.sub(r"^\s*(?i:option|choice|letter)\b", "", candidate)
        match = _LETTER.match(candidate) or _BARE_LETTER.match(candidate)
    return match.group(1).upper() if match else None


# -------------------------------------------------------------------------------------------- mathematics


def extract_math(text: str) -> str | None:
    """Final mathematical expression, as written."""
    candidate = final_answer(text)
    if candidate is None:
        return None
    candidate = candidate.strip().strip("*_` ").strip()
    return candidate or None


INTEGER = Checker(extract_integer, _same_integer)
INTEGER_TO_999 = Checker(extract_integer_to_999, _same_integer)
CHOICE = Checker(extract_letter, lambda found, answer: found == answer.strip().upper())
MATH = Checker(extract_math, equivalent)
