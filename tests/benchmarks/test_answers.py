"""Finding and comparing final answers."""

import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.benchmarks import TASKS, check_answer, extract_answer
from subspec.benchmarks.latex import equivalent
from subspec.errors import ConfigError

# fmt: off
FOUND = {
    ("gsm8k", "42"): [
        "#### 42", "Answer: 42", "... so 6*7=42.\nAnswer: 42.", "**Answer:** 42", "**Answer: 42**", "Answer:\n42",
        "The answer is \\boxed{42}.", "\\[ \\boxed{ 42 } \\]", "\\boxed{42 \\text{ dollars}}", "Answer: 42.00",
        "Final answer: 42 dollars per day for 7 days", "The final answer is: **42**", "Answer: 42 (or 84/2)",
        "Answer: 84/2 = 42", "Answer: 84/2", "Answer: 42 = 6 × 7", "Answer: 6 \\times 7", "\\boxed{42^\\circ}",
        "\\boxed{42^{\\circ}}", "Answer: 42°", "Answer: 42 degrees", "Answer: 42%", "Answer: 42\\%",
        "Answer: $42/day", "Answer: 42 km/h", "Answer: 42 cm^2", "Answer: 42, which is 2 * 21",
        "Answer:\u00a042\u202fEUR",
        # Remarks after the answer.
        "Answer: 42\n\nLet me know if you need 3 more examples!", "Answer: 42\n\nI hope this answer is helpful!",
        "Answer: 42\n\nLet me know if the answer is correct.", "#### 42\n\nAnswer:",
        "Answer: 42\n\nMy answer: see above", "Answer: 42\n\nThe answer is correct because 6*7=42 and 2+2=4",
        "Answer: 42\n\nThe answer is not 41.",
        # No marker: the last number of the last line.
        "Therefore, 5 boxes hold 42 apples.", "She has 3 and 4.\nSo she pays $42 in all.",
        "5 times 8 plus 2 is **42**", "<think>\nThe answer is 5.\n</think>\nThe total is 42.",
        # The last one.
        "First I thought Answer: 3.\nBut it is wrong.\nAnswer: 42", "\\boxed{3} was wrong.\nAnswer: 42",
        "Answer: 3? No: \\boxed{42}",
    ],
    ("gsm8k", "7"): [
        "Answer: 3 + 4 = 7", "Answer: 3 + 4", "Answer: 10 - 3.", "Answer: (3 + 4) = 7", "Answer: 007",
        "Answer: x = 7 apples",
    ],
    ("gsm8k", "-7"): ["Answer: -7", "Answer: -$7", "Answer: −7", "Answer: - $7"],
    ("gsm8k", "10000"): [
        "Answer: 10,000", "Answer: 10\u202f000", "Answer: 10\u00a0000", "Answer: 10\u2009000",
        "Answer: 10 000 dollars", "Answer: 10'000", "Answer: $\\boxed{10{,}000}$", "Answer: \\$10\\,000",
        "### Final Answer: $10,000", "€10 000", "Answer: 10^4", "Answer: 5 \\times 2 \\times 10^3 = 1 \\times 10^4",
    ],
    ("gsm8k", "100000"): ["Answer: 1,00,000", "Answer: 100_000"],
    ("gsm8k", "18"): ["Answer: 18 (check: 9 + 9 = 20 - 2)."],
    ("gsm8k", None): [
        "Answer: 42.5", "Answer: \\frac{1}{2}", "Answer: 1/2", "Answer: 3 / 4", "so 3/4", "Answer: 3 1/2",
        "Answer: 3½", "Answer: \\sqrt{2}", "Answer: (9^99)^99", "Answer:", "Answer: none", "",
        "There are 12 rows\nand we are not done", "Answer: 3 and 5", "Answer: 3 or 4.", "Answer: ±5",
        "The answer is 12.\nAnswer: 12.5", "Answer: " + "9" * 5000,
    ],
    ("aime", "336"): ["\\boxed{336^\\circ}", "Answer: 336^\\circ", "Answer: 336\\degree"],
    ("aime", "25"): ["Answer: 025", "\\boxed{025}"],
    ("aime", "0"): ["Answer: 0"],
    ("aime", None): ["Answer: 1000", "Answer: -3"],
    ("gpqa", "C"): [
        "Answer: C", "Answer: (C)", "**Answer: C**", "**Answer:** **C**", "Answer: C) the photon",
        "Answer: C. The photon", "Answer: \\boxed{C}", "Answer: $\\boxed{\\text{C}}$", "The correct answer is (C).",
        "The correct option is C", "Answer: option C", "Answer: Option (C)", "Answer: c",
        "A would be wrong, and so is B.\nAnswer: C", "I first said Answer: A\nAnswer: C", "Reasoning.\n(C)",
        "Reasoning.\nC", "Answer: C, because D is wrong", "Answer: C\n\nExplanation: the other answer is wrong.",
        "Answer: C\n\nNote: the answer is not A.", "Answer: C\n\nI hope the answer is what you wanted to see.",
    ],
    ("gpqa", "A"): ["Answer: A", "Answer: A because it is charged"],
    ("gpqa", None): [
        "Answer: A proton decays", "Answer: Boron", "Answer: E", "Answer: D-glucose", "No idea", "",
        "Answer: C and D", "Answer: C or D", "Answer: C/D", "Answer: C, D", "Answer: (C) and (D)",
        "Answer: both A and B", "Answer: A or B", "Answer: \\boxed{C, D}", "Answer: **C** & **D**",
        "Answer: Options C and D", "The answer is A.\nAnswer: C and D",
    ],
    ("math_500", "\\frac{1}{2}"): ["Answer: \\boxed{\\frac{1}{2}}"],
    ("math_500", "\\left\\{1, \\sqrt{2}\\right\\}"): ["so \\boxed{\\left\\{1, \\sqrt{2}\\right\\}}."],
    ("math_500", "$x^2+1$"): ["Answer: $x^2+1$"],
    ("math_500", "2"): [
        "**Answer: 2**", "\\boxed{1} then \\boxed{2}", "\\boxed{2} and cut off \\boxed{\\frac{1}",
        "\\boxed{2}\n\nI hope this answer is helpful!",
        "\\boxed{2}\n\nLet me know if the answer is what you wanted to see.",
    ],
    ("math_500", "Evelyn"): ["Answer: Evelyn", "Answer: Evelyn\n\nI hope the answer is clear and of use."],
    ("math_500", None): ["cut off \\boxed{1", "\\boxed{}", "nothing"],
}
# fmt: on


@pytest.mark.parametrize(
    ("name", "expected", "text"),
    [(name, expected, text) for (name, expected), texts in FOUND.items() for text in texts],
    ids=lambda value: str(value)[:40],
)
def test_found_answers(name: str, expected: str | None, text: str):
    assert extract_answer(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        # The next token may be another digit, or another sentence.
        ("gsm8k", "... so 5 boxes hold 60", "60", None),
        ("gsm8k", "... so the answer is 6", "60", None),
        ("gsm8k", "Answer: 60", "60", None),
        ("gsm8k", "\\boxed{60}", "60", True),
        ("gsm8k", "Answer: 61\nTo check", "60", False),
        ("gsm8k", "Answer: 60\n\nIs the answer", "60", True),
        ("gpqa", "Step 1:\nA", "A", None),
        ("math_500", "Answer: \\boxed{\\frac{1}", "1", None),
        ("mt_bench", "\\boxed{60}", None, None),
    ],
)
def test_texts_cut_at_the_length_limit(name: str, text: str, answer: str | None, expected: bool | None):
    assert check_answer(name, text, answer, cut=True) is expected
    if expected is None:
        assert extract_answer(name, text, cut=True) is None
        assert check_answer(name, text, answer) is (None if answer is None else text.endswith(("60", "A")))


STYLES = ["#### {}", "Answer: {}", "**Answer:** {}.", "Answer: ${}", "\\boxed{{{}}}", "The answer is ${}$."]


@given(number=st.integers(-(10**9), 10**9), style=st.sampled_from(STYLES), noise=st.text(max_size=30))
def test_every_style_of_a_number_is_read_back(number: int, style: str, noise: str):
    for shown in (str(number), f"{number:,}"):
        text = f"{noise}\nWe try 5 first.\n{style.format(shown)}"
        assert extract_answer("gsm8k", text) == str(number)
        assert check_answer("gsm8k", text, str(number)) is True
        assert check_answer("gsm8k", text, str(number + 1)) is False


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("aime", "Answer: 25", "025", True),
        ("gsm8k", "#### 1620", "1,620", True),
        ("gsm8k", "I do not know", "1620", False),
        ("gpqa", "Answer: B", " b", True),
        ("gpqa", "Answer: B", "C", False),
        ("gpqa", "no letter", "C", False),
        ("gsm8k", "Answer: 1", None, None),
        ("mt_bench", "Answer: 1", "1", None),
        ("spec_bench", "Answer: 1", "1", None),
        ("livecodebench", "Answer: 1", "1", None),
    ],
)
def test_comparison_with_the_reference(name: str, text: str, answer: str | None, expected: bool | None):
    assert check_answer(name, text, answer) is expected


def test_unknown_benchmark():
    with pytest.raises(ConfigError, match=r"benchmark\.name=nothing is unknown"):
        check_answer("nothing", "x", "y")


# --------------------------------------------------------------------------------------------- mathematics

# fmt: off
EQUAL = {
    "\\frac{1}{2}": ["\\dfrac{1}{2}", "\\tfrac12", "1/2", "0.5", "\\frac{2}{4}", ".50"],
    "-\\frac{3}{4}": ["\\frac{-3}{4}", "-3/4", "-\\frac34", "−3/4"],
    "\\frac{7}{2}": ["3\\frac{1}{2}"],
    "42": ["$42$", "\\(42\\)", "42.", "x=42", "\\boxed{42}", "42\\ \\text{cm}"],
    "10080": ["10,080", "10,\\!080", "10\u202f080", "10 080"],
    "11111111": ["11,\\! 111,\\! 111"],
    "90": ["90^\\circ", "90^{\\circ}", "90 ^ \\circ", "90°", "90 degrees", "90\\degree"],
    "25": ["25\\%", "25%", "25 \\%"],
    "18": ["\\$18", "\\$18.00", "18\\,\\text{m/s}"],
    "5": ["5\\text{ cm}", "5\\text{ cm}^2", "5\\mbox{ inches}", "5 \\text{ square units}", "x = 5"],
    "\\text{Evelyn}": ["Evelyn"],
    "\\text{No solution}": ["\\text{no solution}", "no solution"],
    "C": ["\\textbf{(C)}", "\\text{C}", "(C)"],
    "2x+3": ["y=2x+3"],
    "f(x)=x^2": ["x^2", "x^{2}"],
    "[2,5)": ["x \\in [2,5)"],
    "\\left( 3, \\frac{\\pi}{2} \\right)": ["(3,\\frac{\\pi}{2})", "(3, \\pi/2)"],
    "\\left[-\\frac53, \\frac{13}{3}\\right]": ["[-5/3,13/3]"],
    "(-\\infty,2)\\cup(3,\\infty)": ["(-\\infty, 2) \\cup (3, \\infty)", "(3,\\infty)\\cup(-\\infty,2)"],
    "3,1,2": ["1, 2, 3"],
    "1,-2": ["x=1 \\text{ or } x=-2", "1 and -2", "\\{-2, 1\\}", "-2 \\text{ or } 1"],
    "\\{1,2\\}": ["\\{2,1\\}", "2, 1", "\\left\\lbrace 1, 2\\right\\rbrace"],
    "\\sqrt{3}": ["\\sqrt3"],
    "\\sqrt{18}": ["3\\sqrt{2}"],
    "\\frac{\\sqrt{2}}{2}": ["\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}2"],
    "2": ["\\sqrt[3]{8}"],
    "162": ["2 \\cdot 3^4", "81\\times2"],
    "(x+1)^2": ["x^2+2x+1"],
    "3-x": ["-x+3"],
    "\\frac{\\pi}{2}": ["\\frac12\\pi"],
    "\\cot x": ["\\cot(x)"],
    "a \\leq b": ["a \\le b"],
    "2516_8": ["2516_{8}"],
    "\\begin{pmatrix}1\\\\2\\end{pmatrix}": [
        "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"],
    "5!": ["120"],
    "1 \\pm \\sqrt{19}": ["1\\pm\\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"],
    "34x+45y-20z+100=0": ["-34x-45y+20z-100=0"],
}

DIFFERENT = [
    ("\\frac{1}{3}", "\\frac{1}{2}"), ("0.33", "\\frac13"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"),
    ("(1,2)", "\\{1,2\\}"), ("1,2", "1,2,3"), ("1,1", "1,2"), ("3", "\\sqrt{3}"), ("x+1", "x-1"), ("x", "y"),
    ("\\text{odd}", "\\text{even}"), ("\\text{tea}", "\\text{eat}"), ("42", "42i"), ("-5", "5"), ("", "0"),
    ("2^{9999999}", "3^{9999999}"), ("\\frac{1}{0}", "\\frac{2}{0}"), ("\\sqrt{-1}", "\\sqrt{-2}"), ("12", "1,2"),
    ("(-\\infty,2)", "(-\\infty,2]"), ("2516_8", "2516_9"),
]
# fmt: on


@pytest.mark.parametrize(("answer", "found"), [(a, found) for a, several in EQUAL.items() for found in several])
def test_equal_answers(answer: str, found: str):
    assert equivalent(answer, found)
    assert check_answer("math_500", f"Answer: \\boxed{{{found}}}", answer) is True


@pytest.mark.parametrize(("found", "answer"), DIFFERENT)
def test_different_answers(found: str, answer: str):
    assert not equivalent(found, answer)
    assert not equivalent(answer, found)


@given(value=st.fractions(min_value=-1000, max_value=1000, max_denominator=500), factor=st.integers(1, 50))
@settings(max_examples=10)
def test_fractions_in_any_spelling(value: Fraction, factor: int):
    up, down = value.numerator, value.denominator
    for spelling in (f"{up}/{down}", f"\\dfrac{{{up * factor}}}{{{down * factor}}}"):
        assert equivalent(spelling, f"\\frac{{{up}}}{{{down}}}")
        other = value + Fraction(1, 1000)
        assert not equivalent(spelling, f"\\frac{{{other.numerator}}}{{{other.denominator}}}")


@given(st.text(max_size=60) | st.text(alphabet="\\{}[]()$^_,.0123456789abfrcsqtex +-*/!=", max_size=60))
def test_any_text_is_handled(text: str):
    assert equivalent(text, text)
    for name, task in TASKS.items():
        for cut in (False, True):
            correct = check_answer(name, text, "1", cut)
            assert correct is None if task.checker is None else cut or correct is not None


@pytest.mark.parametrize(
    "text",
    ["(" * 5000 + ")" * 5000, "\\frac{" * 30, "9" * 5000 + "!", "999!", "9^{9^{9}}", "9^9^9^9", "\\sum_{k=1}^{9} k"],
    ids=lambda text: text[:12],
)
def test_costly_expressions_are_compared_as_texts(text: str):
    begin = time.monotonic()
    assert equivalent(text, text)
    assert not equivalent(text, "1")
    extract_answer("gsm8k", f"Answer: {text}")
    assert time.monotonic() - begin < 5


def test_answers_are_compared_in_any_thread():
    """The library's time limit needs the main thread; other threads compare without it."""
    with ThreadPoolExecutor() as pool:
        assert pool.submit(equivalent, "3\\sqrt{2}", "\\sqrt{18}").result()
