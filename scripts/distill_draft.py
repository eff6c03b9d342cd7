"""Distil a tiny causal language model from a target on text the target wrote, as a transformers folder.

    python scripts/generate_text.py --out text/ --minutes 2
    python scripts/distill_draft.py --text text/ --minutes 3 --out small/

It has the target's vocabulary and no tokenizer files: a draft uses the target's own. Without --out the result replaces
the small model that ships with the project. Ctrl-C saves; --resume goes on.
"""

import argparse
import copy
from pathlib import Path

import torch
from training.course import Course
from training.setup import report, training_parser
from training.student import StudentLesson, build_student
from transformers import GenerationConfig, LlamaForCausalLM

from subspec.utils.console import quiet_libraries

WHAT = """A tiny Llama model with its target's vocabulary, distilled from the target's next-token distributions. It
drafts for `draft=small_model`; it has no tokenizer of its own."""

MEANING = """`topK`: how often the target's greedy token is among the model's first K. `chain_tau`: tokens per
verification pass of a single chain of eight."""


def parse() -> argparse.Namespace:
    parser = training_parser(__doc__, lr=3e-3, weight_decay=0.05)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=384)
    return parser.parse_args()


def save_student(student: LlamaForCausalLM, folder: Path) -> int:
    """Write ``model.safetensors`` (bf16), ``config.json`` and ``generation_config.json``; bytes of the first."""
    rounded = copy.deepcopy(student).bfloat16().cpu().eval()
    rounded.config.dtype = torch.bfloat16
    rounded.generation_config = GenerationConfig.from_model_config(rounded.config)
    rounded.generation_config.do_sample = False
    with quiet_libraries():
        rounded.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)  # safetensors makes files that only their owner may read
    return weights.stat().st_size


def main() -> None:
    course = Course(parse())
    shape = course.chosen("hidden", "layers", "heads", "kv_heads", "intermediate")
    model = course.target.model
    counts = torch.bincount(course.corpus.ids.flatten(), minlength=model.config.vocab_size)
    student = build_student(model, counts, **shape, seed=course.options.seed)
    course.publish(
        StudentLesson(model, student, course.dtype),
        lambda folder: save_student(student, folder),
        identity=shape,
        settings=shape,
        folder="small_model",
        checkpoint="student.ckpt",
        title=f"Small draft model for {course.target.name}",
        what=WHAT,
        meaning=MEANING,
    )


if __name__ == "__main__":
    report(main)
