"""The frame of the training scripts: from the options to the trained weights and their model card."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from subspec.drafts import shipped
from subspec.drafts.eagle3_head import D2T
from subspec.drafts.eagle_head import EagleHead
from subspec.runs.environment import hardware, versions
from training.corpus import load_corpus
from training.eagle import HeadLesson, balance_inputs, target_states
from training.losses import SampledVocabulary
from training.setup import open_target
from training.trainer import Lesson, Schedule, Trainer

PACKAGES = ("python", "torch", "transformers", "subspec")
"""Whose versions a model card names."""


class Course:
    """A training script that has read its options (of :func:`training.setup.training_parser`).

    Attributes:
        target: teaches the draft.
        corpus: the text that the target wrote.
        dtype: of the draft's arithmetic: bf16 on a GPU, float32 on a CPU.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.schedule = Schedule(**self.chosen("steps", "minutes", "rows", "lr", "weight_decay", "seed"))
        self.target = open_target(options)
        self.corpus = load_corpus(options.text, held_out=options.held_out)
        self.dtype = torch.bfloat16 if self.target.device.type == "cuda" else torch.float32
        print(f"{self.corpus.tokens:,} tokens of text, {self.corpus.answer_tokens:,} to learn from", flush=True)

    def chosen(self, *keys: str) -> dict[str, Any]:
        """Options by name."""
        return {key: getattr(self.options, key) for key in keys}

    def occurrences(self) -> Tensor:
        """How often the target chose each id as the assistant, int64 [vocabulary]; for an order, ties by number."""
        return torch.bincount(self.corpus.ids[self.corpus.learn], minlength=self.target.model.config.vocab_size)

    def head_lesson(self, kind: type[HeadLesson], head: EagleHead, **settings: Any) -> HeadLesson:
        """The lesson of a new draft head, whose ``fc`` is scaled for the target's states."""
        model, device = self.target.model, self.target.device
        vocabulary = SampledVocabulary.of(self.occurrences().to(device), self.options.frequent, self.options.sampled)
        lesson = kind(model, head.to(device), **settings, vocabulary=vocabulary, dtype=self.dtype)
        # The first tokens' states are far larger than others.
        ids = self.corpus.held_ids[:8].long().to(device)
        states = target_states(model, ids, lesson.wants)[1][:, 4:].flatten(0, 1).split(model.config.hidden_size, dim=-1)
        beside = len(states) * model.config.hidden_size < head.fc.weight.shape[1]
        balance_inputs(head, (model.get_input_embeddings().weight, *states) if beside else states)
        return lesson

    def publish_head(self, lesson: HeadLesson, *, settings: dict[str, Any], **named: str) -> None:
        """Train the head of ``lesson`` and write it; ``named``: see :meth:`publish`."""
        head, vocab_size = lesson.module, self.target.model.config.vocab_size
        settings = settings | self.chosen("frequent", "sampled")
        identity = settings | head.shape.config()
        self.publish(lesson, lambda folder: save_head(head, folder, vocab_size), identity, settings, **named)

    def publish(
        self,
        lesson: Lesson,
        save: Callable[[Path], int],
        identity: dict[str, Any],
        settings: dict[str, Any],
        *,
        folder: str,
        checkpoint: str,
        title: str,
        what: str,
        meaning: str,
    ) -> None:
        """Train, save, write ``MODEL_CARD.md``, and print a summary.

        Args:
            save: writes the weights into a folder and returns their file's bytes.
            identity: must be equal for a checkpoint to be resumed, besides the target.
            settings: for the card.
            folder: of the result below the shipped weights, where ``--out`` names none.
            checkpoint: file name beside the text, where ``--checkpoint`` names none.
            title, what, meaning: of the card; a paragraph about the model, and one that explains the figures.
        """
        options, file = self.options, self.options.checkpoint or self.options.text / checkpoint
        facts = identity | {"target": self.target.source}
        trainer = Trainer(lesson, self.corpus, self.schedule, file, facts, note=lambda line: print(line, flush=True))
        if options.resume:
            trainer.resume()
        figures = trainer.run()
        out = options.out or shipped.FOLDER / folder
        size = save(out)
        parameters = sum(parameter.numel() for parameter in lesson.module.parameters())
        weights = f"- parameters: {parameters:,}; weights in bfloat16, {size / 1e6:.2f} MB"
        card = self._card(f"# {title}\n\n{what}\n\n{weights}", trainer, settings, figures, meaning)
        (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        print(f"{out}: {size / 1e6:.2f} MB after {trainer.step} steps")

    def _card(
        self, head: str, trainer: Trainer, settings: dict[str, Any], figures: dict[str, float], meaning: str
    ) -> str:
        """A model card in Markdown: the model (``head``), its text, its training, its agreement with the target."""
        target, corpus, schedule = self.target, self.corpus, self.schedule
        machine, software, text = hardware(), versions(), corpus.facts
        gpu = machine.get("gpu")
        where = gpu["name"] if gpu and target.device.type == "cuda" else machine["cpu"]
        batch, length = trainer.batches.rows, corpus.ids.shape[1]
        seen = trainer.step * batch * length
        rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
        options = ", ".join(f"{key} {value}" for key, value in settings.items())
        packages = ", ".join(f"{name} {software[name]}" for name in PACKAGES if name in software)
        return f"""---
license: apache-2.0
base_model: {target.source}
---
{head}
- target: {target.source}

## Text

Written by the target itself, from no data set: {text["self_asked"]:.0%} of the conversations start with a user
message that the target made up, the others with one of this project's own prompts (`scripts/training/prompts.py`:
tasks crossed with topics). Further turns are the target's on both sides. {text["greedy"]:.0%} of the conversations
have greedy answers, the others answers at temperature {text["temperature"]}. Nothing comes from a benchmark or from
the packaged sample prompts.

- {corpus.tokens:,} tokens in {len(corpus.ids):,} conversations of {length} tokens, seed {text["seed"]}
- {corpus.answer_tokens:,} of them are answers; only these are learnt from

## Training

- {trainer.step:,} steps of {batch} conversations: {seen:,} tokens, {seen / corpus.tokens:.2f} epochs
- AdamW, peak learning rate {schedule.lr}, cosine decay, weight decay {schedule.weight_decay}, seed {schedule.seed}
- {options}
- {trainer.seconds:.0f} s on one {where}; {packages}

## Agreement with the target

On {len(corpus.held_ids)} conversations of the same kind that were not trained on. {meaning}

| figure | value |
|---|---|
{rows}

## Limits and licence

Made to draft for this one target; on its own it is no useful model. Texts longer than {length} tokens were
not seen in training. The target is licensed under Apache-2.0, and so are these weights.
"""


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
