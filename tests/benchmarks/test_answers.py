"""Finding and comparing final answers."""

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.benchmarks import TASKS, check_answer, extract_answer
from subspec.benchmarks.latex import equivalent
from subspec.errors import ConfigError

# ------------------------------------------------------------------------------------------------ integers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 42", "42"),
        ("Answer: 42", "42"),
        ("... so 6*7=42.\nAnswer: 42.", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("### Final Answer: $1,234", "1234"),
        ("Answer: $\\boxed{1{,}234}$", "1234"),
        ("The answer is \\boxed{42}.", "42"),
        ("\\[ \\boxed{ 42 } \\]", "42"),
        ("\\boxed{42 \\text{ dollars}}", "42"),
        ("Final answer: 42 dollars per day for 7 days", "42"),
        ("The final answer is: **42**", "42"),
        ("Answer: 3 + 4 = 7", "7"),
        ("Answer: x = 12 apples", "12"),
        ("Answer:\n42", "42"),
        ("Answer: 42.00", "42"),
        ("Answer: 42.5", None),
        ("Answer: -7", "-7"),
        ("Answer: -$7", "-7"),
        ("Answer: −7", "-7"),
        ("Answer: 007", "7"),
        ("Answer: 20%", "20"),
        ("Answer: €15", "15"),
        ("Answer: \\frac{1}{2}", None),
        ("Answer: 1/2", None),
        ("Answer: 2^5", None),
        ("Answer: none", None),
        ("Answer:", None),
        ("", None),
        ("First I thought Answer: 3.\nBut it is wrong.\nAnswer: 5", "5"),
        ("\\boxed{3} was wrong.\nAnswer: 5", "5"),
        ("Answer: 3? No: \\boxed{5}", "5"),
        ("She has 3 and 4.\nSo she pays $17 in all.", "17"),
        ("There are 12 rows\nand we are not done", None),
        ("Answer: 1,234,567", "1234567"),
        ("Answer: 42 (which is 84/2)", "42"),
        ("Answer: 18 (check: 9 + 9 = 20 - 2).", "18"),
        ("Answer: (3 + 4) = 7", "7"),
        ("Answer: 84/2 = 42", "42"),
        ("Answer: 3 / 4", None),
        ("Answer: \\sqrt{2}", None),
        ("Answer: \\$1\\,250", "1250"),
        ("Answer: 42\n\nLet me know if you need 3 more examples!", "42"),
    ],
)
def test_whole_numbers(text: str, expected: str | None):
    assert extract_answer("gsm8k", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 025", "25"),
        ("\\boxed{073}", "73"),
        ("Answer: 0", "0"),
        ("Answer: 1000", None),
        ("Answer: -3", None),
    ],
)
def test_aime_range(text: str, expected: str | None):
    assert extract_answer("aime", text) == expected


def test_leading_zeros_of_the_reference():
    assert check_answer("aime", "Answer: 25", "025") is True
    assert check_answer("gsm8k", "#### 1620", "1,620") is True
    assert check_answer("gsm8k", "#### 1621", "1620") is False
    assert check_answer("gsm8k", "I do not know", "1620") is False


STYLES = st.sampled_from(
    [
        "#### {}",
        "Answer: {}",
        "**Answer:** {}.",
        "Answer: ${}",
        "\\boxed{{{}}}",
        "The answer is ${}$.",
        "answer = {}",
    ]
)


@given(number=st.integers(-(10**9), 10**9), style=STYLES, commas=st.booleans(), noise=st.text(max_size=30))
def test_every_style_of_a_number_is_read_back(number: int, style: str, commas: bool, noise: str):
    shown = f"{number:,}" if commas else str(number)
    text = f"{noise}\nWe try 5 first.\n{style.format(shown)}"
    assert extract_answer("gsm8k", text) == str(number)
    assert check_answer("gsm8k", text, str(number)) is True
    assert check_answer("gsm8k", text, str(number + 1)) is False


# ------------------------------------------------------------------------------------------------- letters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: C", "C"),
        ("Answer: (C)", "C"),
        ("**Answer: C**", "C"),
        ("**Answer:** **C**", "C"),
        ("Answer: C) the photon", "C"),
        ("Answer: C. The photon", "C"),
        ("Answer: \\boxed{C}", "C"),
        ("Answer: $\\boxed{\\text{C}}$", "C"),
        ("The correct answer is (B).", "B"),
        ("The correct option is D", "D"),
        ("Answer: option B", "B"),
        ("Answer: Option (B)", "B"),
        ("Answer: c", "C"),
        ("A would be wrong, and so is B.\nAnswer: D", "D"),
        ("I first said Answer: A\nAnswer: B", "B"),
        ("Reasoning.\n(B)", "B"),
        ("Reasoning.\nB", "B"),
        ("Answer: A", "A"),
        ("Answer: A because it is charged", "A"),
        ("Answer: A proton decays", None),
        ("Answer: Boron", None),
        ("Answer: E", None),
        ("Answer: D-glucose", None),
        ("No idea", None),
        ("", None),
    ],
)
def test_letters(text: str, expected: str | None):
    assert extract_answer("gpqa", text) == expected


def test_letter_is_compared_with_the_reference():
    assert check_answer("gpqa", "Answer: B", "B") is True
    assert check_answer("gpqa", "Answer: B", "C") is False
    assert check_answer("gpqa", "no letter", "C") is False


# --------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("so \\boxed{\\left\\{1, \\sqrt{2}\\right\\}}.", "\\left\\{1, \\sqrt{2}\\right\\}"),
        ("Answer: $x^2+1$", "$x^2+1$"),
        ("**Answer: 3**", "3"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("cut off \\boxed{1", None),
        ("\\boxed{2} and cut off \\boxed{\\frac{1}", "2"),
        ("\\boxed{}", None),
        ("nothing", None),
    ],
)
def test_mathematical_expressions_are_found(text: str, expected: str | None):
    assert extract_answer("math_500", text) == expected


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\tfrac12", "\\frac{1}{2}"),
        ("1/2", "\\frac12"),
        ("0.5", "\\frac{1}{2}"),
        (".5", "0.50"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("-3/4", "-\\frac34"),
        ("\\frac{6}{8}", "\\frac{3}{4}"),
        ("3\\frac{1}{2}", "\\frac{7}{2}"),
        ("$42$", "42"),
        ("\\(42\\)", "42"),
        ("42.", "42"),
        ("10,080", "10080"),
        ("10,\\!080", "10080"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("90°", "90"),
        ("90 degrees", "90"),
        ("25\\%", "25"),
        ("25%", "25"),
        ("\\$18", "18"),
        ("5\\text{ cm}", "5"),
        ("5\\text{ cm}^2", "5"),
        ("6\\mbox{ inches}", "6"),
        ("12 \\text{ square units}", "12"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\textbf{(C)}", "C"),
        ("(C)", "\\text{C}"),
        ("x=5", "5"),
        ("x = 5", "x=5"),
        ("y=2x+3", "2x+3"),
        ("f(x)=x^2", "x^2"),
        ("x \\in [2,5)", "[2,5)"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("(3, \\pi/2)", "\\left(3,\\frac{\\pi}{2}\\right)"),
        ("\\left[-\\frac53, \\frac{13}{3}\\right]", "[-5/3,13/3]"),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, \\infty)"),
        ("(3,\\infty)\\cup(-\\infty,2)", "(-\\infty,2)\\cup(3,\\infty)"),
        ("1, 2, 3", "3,1,2"),
        ("1 and 2", "1,2"),
        ("1 \\text{ or } 2", "2, 1"),
        ("\\{1, 2\\}", "\\{2,1\\}"),
        ("2, 1", "\\{1,2\\}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("3\\sqrt{2}", "\\sqrt{18}"),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
        ("\\sqrt[3]{8}", "2"),
        ("\\frac{\\sqrt{29}}2", "\\frac{\\sqrt{29}}{2}"),
        ("2 \\cdot 3^4", "162"),
        ("2\\times3", "6"),
        ("x^2+2x+1", "(x+1)^2"),
        ("-x+3", "3-x"),
        ("\\frac{\\pi}{2}", "\\frac12\\pi"),
        ("2\\pi", "\\pi\\cdot2"),
        ("a \\leq b", "a \\le b"),
        ("\\left\\lbrace 4\\right\\rbrace", "\\{4\\}"),
        ("2516_8", "2516_{8}"),
        ("x^{2}", "x^2"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("5!", "120"),
        ("\\boxed{7}", "7"),
        ("1\\pm\\sqrt{19}", "1 \\pm \\sqrt{19}"),
        ("11,\\! 111,\\! 111", "11111111"),
    ],
)
def test_equal_answers(found: str, answer: str):
    assert equivalent(answer, found)
    assert check_answer("math_500", f"Answer: \\boxed{{{found}}}", answer) is True


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("\\frac{1}{3}", "\\frac{1}{2}"),
        ("0.33", "\\frac13"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("[1,2)", "(1,2]"),
        ("(1,2)", "\\{1,2\\}"),
        ("1,2", "1,2,3"),
        ("1,1", "1,2"),
        ("3", "\\sqrt{3}"),
        ("x+1", "x-1"),
        ("x", "y"),
        ("\\text{odd}", "\\text{even}"),
        ("\\text{tea}", "\\text{eat}"),
        ("42", "42i"),
        ("-5", "5"),
        ("2^{9999999}", "3^{9999999}"),
        ("\\frac{1}{0}", "\\frac{2}{0}"),
        ("\\sqrt{-1}", "\\sqrt{-2}"),
        ("", "0"),
        ("(-\\infty,2)", "(-\\infty,2]"),
        ("2516_8", "2516_9"),
        ("12", "1,2"),
    ],
)
def test_different_answers(found: str, answer: str):
    assert not equivalent(found, answer)
    assert not equivalent(answer, found)


FRACTIONS = st.fractions(min_value=-1000, max_value=1000, max_denominator=500)


@given(value=FRACTIONS, factor=st.integers(1, 50))
@settings(max_examples=10, deadline=None)
def test_fractions_in_any_spelling(value: Fraction, factor: int):
    up, down = value.numerator, value.denominator
    spellings = [
        f"\\frac{{{up}}}{{{down}}}",
        f"{up}/{down}",
        f"\\dfrac{{{up * factor}}}{{{down * factor}}}",
        f"${'-' if up < 0 else ''}\\frac{{{abs(up)}}}{{{down}}}$",
    ]
    for spelling in spellings:
        assert equivalent(spelling, spellings[0])
        other = value + Fraction(1, 1000)
        assert not equivalent(spelling, f"\\frac{{{other.numerator}}}{{{other.denominator}}}")


@given(st.text(alphabet="\\{}[]()$^_,.0123456789abfrcsqtex +-*/!=", max_size=60))
@settings(max_examples=30, deadline=None)
def test_any_text_is_handled(text: str):
    assert equivalent(text, text)
    equivalent(text, "\\frac{1}{2}")
    for name in TASKS:
        assert check_answer(name, text, None) is None
        extract_answer(name, text)


@given(st.text(max_size=200))
@settings(max_examples=30, deadline=None)
def test_any_output_can_be_checked(text: str):
    for name, answer in (("gsm8k", "1"), ("aime", "1"), ("gpqa", "A"), ("math_500", "x")):
        assert check_answer(name, text, answer) in (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + ")" * 5000,
        "\\frac{" * 30,
        "9" * 5000 + "!",
        "999!",
        "9^{9^{9}}",
        "9^9^9^9",
        "\\sum_{k=1}^{9} k",
    ],
    ids=lambda text: text[:12],
)
def test_costly_expressions_are_compared_as_texts(text: str):
    begin = time.monotonic()
    assert equivalent(text, text)
    assert not equivalent(text, "1")
    assert time.monotonic() - begin < 5


def test_answers_are_compared_in_any_thread():
    """The library's time limit needs the main thread; other threads compare without it."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(equivalent("3\\sqrt{2}", "\\sqrt{18}")))
    thread.start()
    thread.join()
    assert found == [True]


# ---------------------------------------------------------------------------------------------- not checked


@pytest.mark.parametrize("name", ["mt_bench", "human_eval", "alpaca", "cnn_dm", "livecodebench"])
def test_not_checkable(name: str):
    assert check_answer(name, "Answer: 1", "1") is None
    assert extract_answer(name, "Answer: 1") is None


def test_no_reference_and_unknown_benchmark():
    assert check_answer("gsm8k", "Answer: 1", None) is None
    with pytest.raises(ConfigError, match=r"benchmark\.name=nothing is unknown"):
        check_answer("nothing", "x", "y")
