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

_COSTLY = re.compile(
    r"\d{30}|\^\s*\{?\s*[-+]?\d{3}|\^[^\^]*\^[^\^]*\^|\^\s*\{[^}]*\^|\d{3}\s*\}?\s*!|\\(?:int|sum|prod|lim|binom)"
)
"""Huge numbers, towers of powers, factorials, and what SymPy evaluates symbolically. Compared as texts."""

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
    import math_verify  # SymPy takes a second to import

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    limit = TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    form = [math_verify.LatexExtractionConfig()]
    sides = [
        math_verify.parse(f"\\boxed{{{text}}}", extraction_config=form, parsing_timeout=limit)
        for text in (answer, found)
    ]
    return math_verify.verify(*sides, timeout_seconds=limit)


def _clean(text: str) -> str:
    """``text`` without emphasis, math delimiters, final full stop, percent and degree signs."""
    text = re.sub(r"\\?%|°", "", text.strip().strip("*`")).strip().rstrip(".")
    return _FRAME.sub("", _FRAME.sub("", text)).strip().rstrip(".")


def _base(text: str) -> str | None:
    """``8`` of ``2516_8``: the library drops the subscript."""
    match = _BASE.match(text)
    return match and match[1]


def _opening(text: str) -> str:
    return text.replace("\\left", "").replace("\\lbrace", "{").replace("\\", "").strip()[:1]
