"""The common end of both training scripts: train a lesson, write the weights and a model card."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspec.targets import Target
from training.corpus import Corpus
from training.setup import WEIGHTS, card
from training.trainer import Lesson, Schedule, Trainer


def train_and_publish(
    options: argparse.Namespace,
    schedule: Schedule,
    target: Target,
    corpus: Corpus,
    lesson: Lesson,
    save: Callable[[Path], int],
    *,
    folder: str,
    checkpoint: str,
    identity: dict[str, Any],
    settings: dict[str, Any],
    title: str,
    what: str,
    meaning: str,
    parameters: int,
) -> None:
    """Train, save, write ``MODEL_CARD.md``, and print a summary.

    Args:
        options: of the command line (:mod:`training.setup`).
        save: writes the weights into a folder and returns their file's bytes.
        folder: of the result below the shipped weights, where ``--out`` names none.
        checkpoint: file name beside the text, where ``--checkpoint`` names none.
        identity: must be equal for a checkpoint to be resumed, besides the target.
        settings: for the card; ``title``, ``what``, ``meaning`` and ``parameters``: see
            :func:`~training.setup.card`.
    """
    trainer = Trainer(
        lesson,
        corpus,
        schedule,
        options.checkpoint or options.text / checkpoint,
        identity | {"target": target.source},
        note=lambda line: print(line, flush=True),
    )
    if options.resume:
        trainer.resume()
    figures = trainer.run()
    out = options.out or WEIGHTS / folder
    size = save(out)
    text = card(
        title=title,
        what=what,
        target=target,
        corpus=corpus,
        schedule=schedule,
        steps=trainer.step,
        seconds=trainer.seconds,
        settings=settings,
        figures=figures,
        size=size,
        parameters=parameters,
        meaning=meaning,
    )
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    print(f"{out}: {size / 1e6:.2f} MB after {trainer.step} steps")
