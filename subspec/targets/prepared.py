"""Find and check the checkpoint of a target or of a small draft, before any of its weights are read."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig, TargetConfig
from subspec.errors import ConfigError
from subspec.targets.checkpoint import (
    StoredTensor,
    check_folder_config,
    has_tokenizer,
    load_tokenizer,
    read_headers,
    rounded_type,
    tokens_beyond,
)
from subspec.targets.embedded import SMOLLM2_135M, prepare
from subspec.targets.generation_settings import not_applied, read_generation_settings
from subspec.targets.hub import Located, locate
from subspec.targets.target import template_ids
from subspec.targets.weight_files import SINGLE, SMALL_MODEL, TARGET, Wanted
from subspec.utils.console import Note

NAMED = 3
"""Most tokens that a note names."""

_READABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checkpoint on disk whose configuration, headers and tokenizer have been checked.

    Attributes:
        name: of the model, as configured.
        folder: on disk.
        source: recorded by runs.
        weights: header entries by tensor name.
        eos_token_ids: every id that ends a text, ascending.
        not_applied: generation settings of the checkpoint that a run does not apply, as the end of a sentence.
        drafts: whether the model drafts: it may lack a tokenizer, and nothing about it touches the output.
    """

    name: str
    folder: Path
    source: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    weights: Mapping[str, StoredTensor]
    eos_token_ids: tuple[int, ...] = ()
    not_applied: str | None = None
    drafts: bool = False

    def remarks(self, dtype: torch.dtype, stored_types: Set[str]) -> list[str]:
        """Notes for readers of a run's figures, a line each.

        Args:
            dtype: of the run.
            stored_types: of the weights that the model has, by their safetensors names.
        """
        if self.drafts:
            return []
        lines = []
        if stored := rounded_type(stored_types, dtype):
            lines.append(
                f"{self.name}: weights stored as {_READABLE[stored]} are rounded to "
                f"{str(dtype).removeprefix('torch.')}; the target of this run is the rounded model"
            )
        if (self.folder / SINGLE).is_file() and next(self.folder.glob("*-of-*.safetensors"), None):
            lines.append(f"{self.name}: {SINGLE} is read, as transformers does, and the shards beside it are not")
        if self.tokenizer is not None:
            if not self.tokenizer.chat_template:
                lines.append(f"{self.name} has no chat template: prompts are given as plain text, without roles")
            if beyond := tokens_beyond(self.tokenizer, self.config.vocab_size):
                lines.append(
                    f"{self.name}: no prompt may hold {', '.join(beyond[:NAMED])}: the model's vocabulary ends at "
                    f"{self.config.vocab_size - 1}, below {len(beyond)} token(s) that were added to its tokenizer"
                )
        if not self.eos_token_ids:
            lines.append(f"{self.name} names no end-of-text token: texts end at their length limit only")
        if self.not_applied:
            lines.append(f"{self.name}: generation settings of the checkpoint are not applied: {self.not_applied}")
        return lines


def prepare_checkpoint(config: TargetConfig, note: Note) -> PreparedCheckpoint:
    """Find the checkpoint of an embedded or hub target, fetching it first if need be, and check it.

    Raises:
        SubspecError: one line with the remedy.
    """
    located = locate_target(config, note)
    folder, name = located.folder, config.name
    model = check_folder_config(folder, name)
    weights = read_headers(folder)
    tokenizer = load_tokenizer(folder, name, model.vocab_size)
    if tokenizer.chat_template:
        template_ids(tokenizer, [{"role": "user", "content": "Hello"}], name)
    settings = read_generation_settings(folder, name)
    return PreparedCheckpoint(
        name=name,
        folder=folder,
        source=located.source,
        config=model,
        tokenizer=tokenizer,
        weights=weights,
        eos_token_ids=settings.eos_token_ids(model, tokenizer),
        not_applied=not_applied(settings.values),
    )


def locate_target(config: TargetConfig, note: Note, wanted: Wanted = TARGET) -> Located:
    """The checkpoint of an embedded or hub target, fetched first if need be.

    Raises:
        SubspecError: one line with the remedy.
    """
    if isinstance(config, EmbeddedTargetConfig):
        return Located(config.name, SMOLLM2_135M.source, prepare(SMOLLM2_135M, config.path, note))
    return locate(hub_config(config), note, wanted)


def prepare_draft(config: HubTargetConfig, note: Note) -> PreparedCheckpoint:
    """Find and check the checkpoint of a model that drafts, fetching it first if need be.

    Raises:
        SubspecError: one line with the remedy.
    """
    located = locate(config, note, SMALL_MODEL)
    folder, name = located.folder, config.name
    model = check_folder_config(folder, name, SMALL_MODEL)
    weights = read_headers(folder, SMALL_MODEL)
    tokenizer = load_tokenizer(folder, name, model.vocab_size) if has_tokenizer(folder) else None
    return PreparedCheckpoint(name, folder, located.source, model, tokenizer, weights, drafts=True)


def hub_config(config: TargetConfig) -> HubTargetConfig:
    """``config``, which must name a checkpoint folder or hub id.

    Raises:
        ConfigError: it does not.
    """
    if not isinstance(config, HubTargetConfig):
        raise ConfigError(f"target={config.name}: {type(config).__name__} is no kind of target")
    return config
