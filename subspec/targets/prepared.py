"""A checkpoint folder that passed every check that needs no weights: what every way of loading it starts from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig, TargetConfig
from subspec.errors import ConfigError
from subspec.targets.checkpoint import (
    TOKENIZER_FILES,
    Weights,
    check_folder_config,
    load_tokenizer,
    read_headers,
)
from subspec.targets.embedded import SMOLLM2_135M, prepare
from subspec.targets.generation_settings import not_applied, read_generation_settings
from subspec.targets.hub import Located, locate
from subspec.utils.console import Note

_READABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checkpoint on disk, checked and described, with none of its weights read.

    Attributes:
        name: what the user called it.
        folder, source: where it is, and what a record says it is.
        config, tokenizer: the model's configuration and its tokenizer.
        weights: what the safetensors headers say.
        eos_token_ids: every id that ends a text, ascending.
        not_applied: generation settings of the checkpoint that a run does not apply, in words.
    """

    name: str
    folder: Path
    source: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    weights: Weights
    eos_token_ids: tuple[int, ...]
    not_applied: str | None = None

    def remarks(self, dtype: torch.dtype) -> list[str]:
        """What a reader of a run's figures should know about it in ``dtype``, a line each."""
        lines = []
        if stored := self.weights.rounding(dtype):
            lines.append(
                f"{self.name}: weights stored as {_READABLE[stored]} are rounded to "
                f"{str(dtype).removeprefix('torch.')}; the target of this run is the rounded model"
            )
        if not self.tokenizer.chat_template:
            lines.append(f"{self.name} has no chat template: prompts are given as plain text, without roles")
        if not self.eos_token_ids:
            lines.append(f"{self.name} names no end-of-text token: texts end at their length limit only")
        if self.not_applied:
            lines.append(
                f"{self.name}: generation settings of the checkpoint are not applied: {self.not_applied}"
            )
        return lines


def prepare_checkpoint(config: TargetConfig, note: Note) -> PreparedCheckpoint:
    """Find the checkpoint of an embedded or hub target, fetching it first if need be, and check it.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    if isinstance(config, EmbeddedTargetConfig):
        located = Located(prepare(SMOLLM2_135M, config.path, note), SMOLLM2_135M.source)
    else:
        located = locate(hub_config(config), note)
    folder, name = located.folder, config.name
    model_config = check_folder_config(folder, name)
    weights = read_headers(folder, name)
    tokenizer = load_tokenizer(folder, name, model_config.vocab_size)
    settings = read_generation_settings(folder, name)
    return PreparedCheckpoint(
        name=name,
        folder=folder,
        source=located.source,
        config=model_config,
        tokenizer=tokenizer,
        weights=weights,
        eos_token_ids=settings.eos_token_ids(model_config, tokenizer),
        not_applied=not_applied(settings.values),
    )


@dataclass(frozen=True)
class DraftCheckpoint(PreparedCheckpoint):
    """A checkpoint that drafts: it may come without a tokenizer, and nobody reads its prompts or its endings."""

    tokenizer: PreTrainedTokenizerBase | None  # type: ignore[assignment]

    def remarks(self, dtype: torch.dtype) -> list[str]:
        """Nothing about it touches the output."""
        return []


def prepare_draft(config: HubTargetConfig, note: Note) -> DraftCheckpoint:
    """Find and check the checkpoint of a model that drafts, fetching it first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    located = locate(config, note)
    folder, name = located.folder, config.name
    model_config = check_folder_config(folder, name)
    weights = read_headers(folder, name)
    has_one = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = load_tokenizer(folder, name, model_config.vocab_size) if has_one else None
    return DraftCheckpoint(name, folder, located.source, model_config, tokenizer, weights, ())


def hub_config(config: TargetConfig) -> HubTargetConfig:
    """``config`` if it names a checkpoint folder or hub id.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(config, HubTargetConfig):
        raise ConfigError(f"target={config.name}: {type(config).__name__} is no kind of target")
    return config
