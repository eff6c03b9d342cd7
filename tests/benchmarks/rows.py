"""Rows in the schema of each data set, written for these tests."""

import json

# fmt: off
ROWS = {
    "mt_bench": [
        {"question_id": 901, "category": "writing", "turns": ["Describe a quiet harbour.", "Make it rain."]},
        {"question_id": 902, "category": "math", "turns": ["6 times 7?", "Halve it."], "reference": ["42", "21"]},
    ],
    "spec_bench": [
        {"question_id": 1, "category": "translation", "turns": ["Translate: Guten Tag"], "reference": ["Good day"]},
        {"question_id": 2, "category": "writing", "turns": ["Write a line.", "Shorter."]},
        {"question_id": 3, "category": "stem", "turns": ["Why is ice slippery?", "Are you sure?"]},
    ],
    "speed_bench": [
        {"question_id": "a1", "category": "coding", "sub_category": "x", "turns": ["Sort a list."], "multiturn": False},
        {"question_id": "b2", "category": "math", "sub_category": "y", "turns": ["1 + 1?", "+ 1?"], "multiturn": True},
    ],
    "human_eval": [{
        "task_id": "HumanEval/900", "entry_point": "double", "canonical_solution": "    return 2 * x\n",
        "prompt": 'def double(x: int) -> int:\n    """Return twice x."""\n',
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }],
    "gsm8k": [
        {"question": "Rhea has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"question": "A debt of 5 doubles. What is the balance?", "answer": "It is -10.\n#### -10"},
        {"question": "How many metres are 2 km?", "answer": "2 * 1000 = <<2*1000=2000>>2000\n#### 2,000"},
    ],
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Blue.", "text": "..."},
        {"instruction": "Translate into French.", "input": "good evening", "output": "bonsoir", "text": "..."},
    ],
    "cnn_dm": [{"article": "A mayor opened a bridge on Friday.", "highlights": "Bridge opened .", "id": "ab12"}],
    "aime": [
        {"id": 900, "problem": "Compute $5^2$.", "solution": "\\boxed{25}", "answer": "025", "url": "", "year": "2024"},
        {"id": "901", "problem": "Compute $10^2+4$.", "answer": 104},
    ],
    "gpqa": [{
        "Record ID": "recA", "Question": "Which particle mediates electromagnetism?", "High-level domain": "Physics",
        "Correct Answer": "the photon\n", "Incorrect Answer 1": "the gluon", "Incorrect Answer 2": "the W boson",
        "Incorrect Answer 3": "the graviton",
    }],
    "math_500": [{
        "problem": "Simplify $\\frac{2}{4}$.", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}",
        "subject": "Prealgebra", "level": 1, "unique_id": "test/prealgebra/900.json",
    }],
    "livecodebench": [
        {
            "question_id": "900_a", "question_title": "Echo", "question_content": "Print the input.",
            "platform": "atcoder", "starter_code": "", "private_test_cases": "x" * 5000,
        },
        {
            "question_id": "901", "question_title": "Sum", "question_content": "Return the sum.", "difficulty": "hard",
            "starter_code": "class Solution:\n    def total(self, a: List[int]) -> int:\n        ",
        },
    ],
}
# fmt: on


def jsonl(rows: list) -> str:
    """The rows as the text of a JSON-lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows)
