"""Benchmarks by name: fields of a row, wording of the prompt, and answer check.

To add a benchmark: write a converter from a row to a :class:`Prompt`, enter it in :data:`TASKS`, add
``conf/benchmark/<name>.yaml`` with its hub coordinates and ``samples/<name>.jsonl`` with a few rows of your own.

The wording of the prompts is this project's. Tasks with a checked answer ask for the working first and for a final
line ``Answer: ...``, which :mod:`subspec.benchmarks.answers` reads back.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from subspec.benchmarks.answers import CHOICE, INTEGER, INTEGER_TO_999, MATH, Checker
from subspec.benchmarks.rows import DataUnavailableError, Row
from subspec.errors import ConfigError

LETTERS = "ABCD"

PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""Begins the text of those rows of SPEED-Bench that the hub holds without their text."""

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Categories of MT-Bench."""

CONVERSATION = ("question_id", "prompt_id", "turns", "prompt", "messages")


@dataclass(frozen=True)
class Prompt:
    """User messages of a row, and its reference answer, if any."""

    turns: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Task:
    """One benchmark: how a row becomes a prompt and how its answer is checked.

    Attributes:
        convert: ``(row, sample id, seed) -> Prompt``; raises :meth:`Row.error` for an unusable row.
        columns: columns that ``convert`` reads; others are dropped while reading very large files.
        id_columns: columns that may hold the data set's own id, first match wins; else the row number is the id.
        own_ids: whether the data set's ids already name the benchmark and are used unchanged.
        checker: None where a check would need to run code or judge prose.
        category: the column of the rows' categories, which data sets may lack.
        groups: category -> name under which reports merge several categories; others are reported as they are.
        published: address of the data, if they are not on the hub.
    """

    convert: Callable[[Row, str, int], Prompt]
    columns: tuple[str, ...]
    id_columns: tuple[str, ...] = ("id",)
    own_ids: bool = False
    checker: Checker | None = None
    category: str = "category"
    groups: dict[str, str] = field(default_factory=dict)
    published: str | None = None


def _question(text: str, answer: str | None = None) -> Prompt:
    return Prompt((text,), answer)


def _conversation(row: Row, sample_id: str, seed: int) -> Prompt:
    return Prompt(row.user_messages("messages") or row.texts("turns", "prompt"))


def _speed_bench(row: Row, sample_id: str, seed: int) -> Prompt:
    prompt = _conversation(row, sample_id, seed)
    if any(PLACEHOLDER in turn for turn in prompt.turns):
        raise DataUnavailableError(
            f"{row.where} holds a placeholder instead of its text, which its publisher may not distribute",
            "fetch the texts with SPEED-Bench's own preparation script (examples/specdec_bench of "
            "github.com/NVIDIA/Model-Optimizer), then use benchmark.source=file benchmark.path=FILE",
        )
    return prompt


def _human_eval(row: Row, sample_id: str, seed: int) -> Prompt:
    return _question(
        "Complete the Python function below so that it does what its docstring says. Reply with the whole function, "
        "including its signature and any imports it needs, in one Python code block and nothing else.\n\n"
        f"```python\n{row.text('prompt').rstrip()}\n```"
    )


def _gsm8k(row: Row, sample_id: str, seed: int) -> Prompt:
    # The reference solution ends with a line "#### 42".
    solution = row.scalar("answer")
    answer = INTEGER.extract(solution)
    if answer is None or "####" not in solution:
        raise row.error("field 'answer' must end with a line '#### <integer>'")
    return _question(
        f"{row.text('question').strip()}\n\n"
        "Work through the problem step by step. Then give the result on a last line of the form "
        '"Answer: N", where N is a whole number without units.',
        answer,
    )


def _alpaca(row: Row, sample_id: str, seed: int) -> Prompt:
    instruction, context = row.text("instruction").strip(), row.optional("input")
    return _question(f"{instruction}\n\nInput:\n{context.strip()}" if context else instruction)


def _cnn_dm(row: Row, sample_id: str, seed: int) -> Prompt:
    return _question(
        "Summarise the following news article in three or four sentences. Keep to the facts that it reports.\n\n"
        f"Article:\n{row.text('article').strip()}"
    )


def _aime(row: Row, sample_id: str, seed: int) -> Prompt:
    answer = INTEGER_TO_999.extract(f"Answer: {row.scalar('answer')}")
    if answer is None:
        raise row.error("field 'answer' must be a whole number from 0 to 999")
    return _question(
        f"{row.text('problem').strip()}\n\n"
        "Reason step by step. The result is a whole number from 0 to 999; give it on a last line of the "
        'form "Answer: N".',
        answer,
    )


def _gpqa(row: Row, sample_id: str, seed: int) -> Prompt:
    correct = row.text("Correct Answer").strip()
    options = [correct, *(row.text(f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    # The order depends on seed and sample alone, so that every run and method sees the same question.
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"{seed}/{sample_id}/{i}".encode()).digest())
    listed = "\n".join(f"{letter}) {options[i]}" for letter, i in zip(LETTERS, order, strict=True))
    return _question(
        f"{row.text('Question').strip()}\n\n{listed}\n\n"
        "Exactly one option is right. Reason step by step, then give its letter on a last line of the "
        'form "Answer: X", where X is A, B, C or D.',
        LETTERS[order.index(0)],
    )


def _math_500(row: Row, sample_id: str, seed: int) -> Prompt:
    return _question(
        f"{row.text('problem').strip()}\n\n"
        "Reason step by step. Then give the result in its simplest form on a last line of the form "
        '"Answer: \\boxed{...}".',
        row.scalar("answer"),
    )


def _livecodebench(row: Row, sample_id: str, seed: int) -> Prompt:
    statement = row.text("question_content").strip()
    starter = row.optional("starter_code")
    if starter is None:
        task = (
            "Write a Python 3 program that solves the problem above. It reads the input from standard input "
            "and writes only the requested output to standard output."
        )
    else:
        # Problems of one platform are stated as a method to fill in and define no input format.
        task = (
            "Write Python 3 code that solves the problem above, starting from this class:\n\n"
            f"```python\n{starter.rstrip()}\n```\n"
        )
    return _question(f"{statement}\n\n{task} Reply with the complete code in one Python code block.")


TASKS: dict[str, Task] = {
    "mt_bench": Task(_conversation, CONVERSATION, id_columns=("question_id", "prompt_id", "id")),
    "spec_bench": Task(
        _conversation,
        CONVERSATION,
        id_columns=("question_id", "id"),
        groups=dict.fromkeys(MT_BENCH, "multi-turn"),
        published="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
    ),
    "speed_bench": Task(_speed_bench, CONVERSATION, id_columns=("question_id", "id")),
    "human_eval": Task(_human_eval, ("task_id", "prompt"), id_columns=("task_id",), own_ids=True),
    "gsm8k": Task(_gsm8k, ("id", "question", "answer"), checker=INTEGER),
    "alpaca": Task(_alpaca, ("id", "instruction", "input")),
    "cnn_dm": Task(_cnn_dm, ("id", "article")),
    "aime": Task(_aime, ("id", "problem", "answer"), checker=INTEGER_TO_999),
    "gpqa": Task(
        _gpqa,
        ("Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))),
        id_columns=("Record ID", "id"),
        checker=CHOICE,
        category="High-level domain",
    ),
    "math_500": Task(
        _math_500, ("unique_id", "problem", "answer"), id_columns=("unique_id", "id"), checker=MATH, category="subject"
    ),
    "livecodebench": Task(
        _livecodebench,
        ("question_id", "question_content", "starter_code"),
        id_columns=("question_id", "id"),
        category="difficulty",
    ),
}
"""By name in ``conf/benchmark/``."""


def get_task(name: str) -> Task:
    """The task of that name; a ConfigError that lists the names if there is none."""
    if name not in TASKS:
        raise ConfigError(f"benchmark.name={name} is unknown; choose one of: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def extract_answer(benchmark: str, text: str, cut: bool = False) -> str | None:
    """Final answer of a model's text in canonical form; None if none is found or the benchmark has no check.

    ``cut``: the text was cut at the length limit. Its last line then holds an answer only in a closed box.
    """
    checker = get_task(benchmark).checker
    return checker and checker.extract(text, cut)


def check_answer(benchmark: str, text: str, answer: str | None, cut: bool = False) -> bool | None:
    """Whether a model's text ends in the reference answer.

    None if the benchmark has no check, or if the text was ``cut`` before an answer.
    """
    checker, found = get_task(benchmark).checker, extract_answer(benchmark, text, cut)
    if checker is None or answer is None or (cut and found is None):
        return None
    return found is not None and checker.matches(found, answer)
