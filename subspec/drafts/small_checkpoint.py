"""The checkpoint of ``draft=small_model``: what ``draft.path`` names, its configuration, its weights.

Any checkpoint that can be a target can be a draft, read by the same code (:mod:`subspec.targets`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from subspec.config.schema import (
    CheckpointDraftConfig,
    Config,
    Dtype,
    HubTargetConfig,
    PlantedTargetConfig,
    TargetConfig,
)
from subspec.drafts import shipped
from subspec.errors import ConfigError, SubspecError
from subspec.targets.checkpoint import check_folder_config
from subspec.targets.checkpoint_source import CheckpointSource
from subspec.targets.hub import locate
from subspec.targets.load import weights_identity
from subspec.targets.model_spec import ModelSpec
from subspec.targets.planted import SHAPES, PlantedSource, planted_config
from subspec.targets.source import LayerSource
from subspec.targets.weight_files import SMALL_MODEL
from subspec.utils.console import Note

SHIPPED = shipped.SMALL_MODEL
"""The small model that ships with the project; it has no tokenizer."""

PLANTED = "planted:"


def small_model_config(config: Config) -> TargetConfig:
    """The small model as a target's configuration.

    Raises:
        ConfigError: ``draft.path`` names nothing.
    """
    draft = config.draft
    assert isinstance(draft, CheckpointDraftConfig)
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
    """The small model that ships with the project, as a target's configuration.

    Raises:
        ConfigError: this installation has none.
    """
    if not (SHIPPED / "config.json").is_file():
        raise ConfigError(
            "draft=small_model: the small model for the default target is not in this installation "
            "(subspec/drafts/weights/small_model): make one with scripts/distill_draft.py and set draft.path to its "
            "folder"
        )
    return HubTargetConfig(name="the shipped small model", dtype=dtype, path=str(SHIPPED))


def load_small_config(config: Config) -> PretrainedConfig:
    """The small model's own configuration, without its weights.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    return _read(small_model_config(config))[0]


def small_shapes(config: Config) -> ModelSpec:
    """The shapes that a plan computes sizes from."""
    return _read(small_model_config(config))[1]


def _read(named: TargetConfig) -> tuple[PretrainedConfig, ModelSpec]:
    if isinstance(named, PlantedTargetConfig):
        return _describe(named.shape, None, planted=True)
    assert isinstance(named, HubTargetConfig)
    return _describe(named.path, named.revision, planted=False)


@functools.lru_cache(maxsize=8)
def _describe(path: str, revision: str | None, *, planted: bool) -> tuple[PretrainedConfig, ModelSpec]:
    """Cached: a plan computes sizes many times."""
    if planted:
        model = planted_config(PlantedTargetConfig(name=path, shape=path))
    else:
        with _about_draft():
            named = HubTargetConfig(name=path, path=path, revision=revision)
            model = check_folder_config(
                locate(named, lambda text: None, SMALL_MODEL, weights=False).folder, path, SMALL_MODEL
            )
    return model, ModelSpec.of(model)


def open_small_model(config: Config, dtype: torch.dtype, device: torch.device, note: Note) -> LayerSource:
    """The small model's weights, fetched first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    named = small_model_config(config)
    if isinstance(named, PlantedTargetConfig):
        return PlantedSource(named, dtype, device)
    return open_checkpoint(named, dtype, note)


def open_checkpoint(named: HubTargetConfig, dtype: torch.dtype, note: Note) -> CheckpointSource:
    """A small model's weights on disk, fetched first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    with _about_draft():
        located = locate(named, note, SMALL_MODEL)
        if located.folder == SHIPPED:
            located = replace(located, source=shipped.shipped_source(SHIPPED / "model.safetensors"))
        return CheckpointSource(located, named.name, dtype, SMALL_MODEL)


def small_folder(config: Config, note: Note) -> Path | None:
    """The small model's folder, fetched first if need be; None: it is planted.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    named = small_model_config(config)
    if isinstance(named, PlantedTargetConfig):
        return None
    with _about_draft():
        return locate(named, note, SMALL_MODEL).folder


def small_identity(config: Config, note: Note) -> str:
    """Hex digest of the small model's weights, fetched first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    with _about_draft():
        return weights_identity(small_model_config(config), SMALL_MODEL, note=note)


@contextmanager
def _about_draft() -> Iterator[None]:
    """Name ``draft.path`` in the messages of the code that reads checkpoints."""
    try:
        yield
    except SubspecError as error:
        text = str(error)
        raise type(error)(text if "draft." in text else f"draft.path: {text}") from error
