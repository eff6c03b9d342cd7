"""The common end of the training scripts: train a lesson, write the weights and a model card."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from subspec.drafts.eagle3_head import D2T
from subspec.drafts.eagle_head import EagleHead
from subspec.targets import Target
from training.corpus import Corpus
from training.setup import WEIGHTS, card
from training.trainer import Lesson, Schedule, Trainer


def save_head(head: EagleHead, folder: Path, vocab_size: int) -> int:
    """Write ``model.safetensors`` (bf16) and ``config.json`` of a head; bytes of the former.

    Args:
        vocab_size: of the target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in tensors.items()}
    config = head.shape.config() | {"vocab_size": vocab_size, "dtype": "bfloat16"}
    if D2T in tensors:
        own = torch.zeros(vocab_size, dtype=torch.bool)
        own[tensors[D2T] + torch.arange(len(tensors[D2T]))] = True
        tensors["t2d"] = own
    elif "draft_vocab_size" in config:
        config["draft_vocab_size"] = vocab_size
    part = folder / "model.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(part, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size


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
