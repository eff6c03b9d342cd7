"""The checkpoint of ``draft=small_model``: what ``draft.path`` names, its configuration, its weights.

Any checkpoint that can be a target can be a draft, read by the same code (:mod:`subspec.targets`). Functions raise a
SubspecError about anything that the user can repair, in one line with the remedy.
"""

import functools
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from subspec.config.schema import Config, Dtype, HubTargetConfig, PlantedTargetConfig, TargetConfig
from subspec.drafts import shipped
from subspec.errors import ConfigError, reworded
from subspec.targets.checkpoint import check_folder_config
from subspec.targets.checkpoint_source import CheckpointSource
from subspec.targets.hub import locate
from subspec.targets.load import weights_identity
from subspec.targets.planted import SHAPES, PlantedSource, planted_config
from subspec.targets.source import LayerSource
from subspec.targets.weight_files import SMALL_MODEL
from subspec.utils.console import Note

SHIPPED = shipped.SMALL_MODEL
"""The small model that ships with the project; it has no tokenizer."""

PLANTED = "planted:"


def _about_draft(text: str) -> str:
    """Name ``draft.path`` in a message of the code that reads checkpoints."""
    return text if "draft." in text else f"draft.path: {text}"


def small_model_config(config: Config) -> TargetConfig:
    """The small model as a target's configuration."""
    draft = config.draft
    if draft.path is None:
        return shipped_small_model(draft.dtype)
    if draft.path.startswith(PLANTED):
        shape = draft.path.removeprefix(PLANTED)
        if shape not in SHAPES:
            raise ConfigError(f"draft.path={draft.path}: no such planted shape; use {', '.join(SHAPES)}")
        # With the target's seed it follows the target's own next-token map.
        seed = getattr(config.target, "seed", 0)
        return PlantedTargetConfig(name=draft.path, dtype=draft.dtype, shape=shape, seed=seed)
    return HubTargetConfig(name=draft.path, dtype=draft.dtype, path=draft.path, revision=draft.revision)


def shipped_small_model(dtype: Dtype = Dtype.auto) -> HubTargetConfig:
    """The small model that ships with the project, as a target's configuration."""
    if not (SHIPPED / "config.json").is_file():
        raise ConfigError(
            "draft=small_model: the small model for the default target is not in this installation "
            "(subspec/drafts/weights/small_model): make one with scripts/distill_draft.py and set draft.path to its "
            "folder"
        )
    return HubTargetConfig(name="the shipped small model", dtype=dtype, path=str(SHIPPED))


def load_small_config(config: Config) -> PretrainedConfig:
    """The small model's own configuration, without its weights."""
    named = small_model_config(config)
    return planted_config(named) if isinstance(named, PlantedTargetConfig) else _read(named.path, named.revision)


@functools.lru_cache(maxsize=8)
@reworded(_about_draft)
def _read(path: str, revision: str | None) -> PretrainedConfig:
    named = HubTargetConfig(name=path, path=path, revision=revision)
    folder = locate(named, lambda text: None, SMALL_MODEL, weights=False).folder
    return check_folder_config(folder, path, SMALL_MODEL)


def open_small_model(config: Config, dtype: torch.dtype, device: torch.device, note: Note) -> LayerSource:
    """The small model's weights, fetched first if need be."""
    named = small_model_config(config)
    if isinstance(named, PlantedTargetConfig):
        return PlantedSource(named, dtype, device)
    return open_checkpoint(named, dtype, note)


@reworded(_about_draft)
def open_checkpoint(named: HubTargetConfig, dtype: torch.dtype, note: Note) -> CheckpointSource:
    """A small model's weights on disk, fetched first if need be."""
    located = locate(named, note, SMALL_MODEL)
    if located.folder == SHIPPED:
        located = replace(located, source=shipped.shipped_source(SHIPPED / "model.safetensors"))
    return CheckpointSource(located, named.name, dtype, SMALL_MODEL)


@reworded(_about_draft)
def small_folder(config: Config, note: Note) -> Path | None:
    """The small model's folder, fetched first if need be; None: it is planted."""
    named = small_model_config(config)
    return None if isinstance(named, PlantedTargetConfig) else locate(named, note, SMALL_MODEL).folder


@reworded(_about_draft)
def small_identity(config: Config, note: Note) -> str:
    """Hex digest of the small model's weights, fetched first if need be."""
    return weights_identity(small_model_config(config), SMALL_MODEL, note=note)
