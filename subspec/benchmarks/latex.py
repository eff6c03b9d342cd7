r"""Compare two LaTeX answers for mathematical equality, with the library math-verify (SymPy).

The library reads fractions, roots, tuples, intervals, sets, matrices, units and words. This module covers the cases
that it gets wrong (a final full stop, ``%`` and ``°``, number bases, a tuple against a set) and keeps expressions
away from it that SymPy would evaluate for hours.
"""

import logging
import re
import threading

TIMEOUT_S = 5
"""Seconds per parse and per comparison. The library uses SIGALRM, so that only the main thread has the limit."""

MAX_LENGTH = 200
"""Characters. Longer texts are compared as texts."""

MAX_DIGITS = 100
"""Longer whole numbers are runaway output; Python converts at most 4,300 digits."""

_COSTLY = re.compile(
    r"\d{30}|\^\s*\{?\s*[-+]?\d{3}|\^[^\^]*\^[^\^]*\^|\^\s*\{[^}]*\^|\d{3}\s*\}?\s*!|\\(?:int|sum|prod|lim|binom)"
)
"""Huge numbers, towers of powers, factorials, and what SymPy evaluates symbolically. Compared as texts."""

DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|[°º]")

_SPACES = re.compile(r"[\u00a0\u2000-\u200b\u202f\u205f\u2060\u3000]")
_GROUPED = re.compile(r"(?<![\w.,])\d{1,3}(?:[ '’_]\d{3})+(?!\w)")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}|\d\s+\d")

_FRAME = re.compile(r"^(?:\$+|\\\(|\\\[)|(?:\$+|\\\)|\\\])$")
_BASE = re.compile(r"^\d+_\{?(\d+)\}?$")


def equivalent(found: str, answer: str) -> bool:
    """Whether two LaTeX answers are mathematically equal."""
    found, answer = _clean(found), _clean(answer)
    if found == answer:
        return True
    if max(len(found), len(answer)) > MAX_LENGTH or _COSTLY.search(found) or _COSTLY.search(answer):
        return False
    if _base(found) != _base(answer) or {_opening(found), _opening(answer)} == {"(", "{"}:
        return False
    sides = _parse(answer), _parse(found)
    import math_verify

    return math_verify.verify(*sides, timeout_seconds=_limit())


def evaluate_integer(text: str) -> int | None:
    """Value of an expression such as ``84/2`` or ``3 \\times 10^3``; None for prose, mixed numbers and fractions."""
    text = _clean(re.sub(r"\\(?:text|mbox)\s*\{[^{}]*\}", "", text))
    if len(text) > MAX_LENGTH or _COSTLY.search(text) or _PROSE.search(text):
        return None
    parsed = _parse(text)
    value = parsed[0].doit() if parsed and hasattr(parsed[0], "doit") else None
    return int(value) if getattr(value, "is_Integer", False) and abs(value) < 10**MAX_DIGITS else None


def plain(text: str) -> str:
    """``text`` with ASCII spaces and minus signs, and without separators of thousands other than commas."""
    text = _SPACES.sub(" ", text.replace("−", "-").replace("–", "-"))
    return _GROUPED.sub(lambda match: re.sub(r"\D", "", match.group()), text)


def _parse(text: str) -> list:
    import math_verify  # SymPy takes a second to import

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    form = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(f"\\boxed{{{text}}}", extraction_config=form, parsing_timeout=_limit())


def _limit() -> int | None:
    return TIMEOUT_S if threading.current_thread() is threading.main_thread() else None


def _clean(text: str) -> str:
    """``text`` without emphasis, math delimiters, final full stop, percent and degree signs."""
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = DEGREES.sub("", re.sub(r"\\?%", "", plain(text).strip().strip("*`"))).strip().rstrip(".")
    return _FRAME.sub("", _FRAME.sub("", text)).strip().rstrip(".")


def _base(text: str) -> str | None:
    """``8`` of ``2516_8``: the library drops the subscript."""
    match = _BASE.match(text)
    return match and match[1]


def _opening(text: str) -> str:
    return text.replace("\\left", "").replace("\\", "").strip()[:1]
