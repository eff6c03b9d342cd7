"""From a target's configuration to its weights: layer by layer, or whole on one device."""

import hashlib

import torch
from transformers import PretrainedConfig

from subspec.config.schema import EmbeddedTargetConfig, HubTargetConfig, PlantedTargetConfig, TargetConfig
from subspec.errors import ConfigError, SubspecError
from subspec.targets.checkpoint import check_folder_config
from subspec.targets.checkpoint_source import CheckpointSource
from subspec.targets.device import check_memory, resolve_dtype
from subspec.targets.embedded import SMOLLM2_135M, prepare, smollm2_config
from subspec.targets.hub import Located, locate
from subspec.targets.identity import folder_identity
from subspec.targets.meta_model import count_parameters
from subspec.targets.planted import PlantedSource, planted_config
from subspec.targets.source import LayerSource, build_model
from subspec.targets.target import Target
from subspec.targets.weight_files import TARGET, Wanted
from subspec.utils.console import Note, print_note


def load_target_config(config: TargetConfig, *, note: Note = print_note) -> PretrainedConfig:
    """The target's model configuration without its weights, for checks before anything large is fetched.

    Errors as of :func:`load_target`, as far as the configuration alone can tell.
    """
    if isinstance(config, EmbeddedTargetConfig):
        return smollm2_config()
    if isinstance(config, PlantedTargetConfig):
        return planted_config(config)
    return check_folder_config(_locate(config, note, weights=False).folder, config.name)


def _locate(config: TargetConfig, note: Note, wanted: Wanted = TARGET, *, weights: bool = True) -> Located:
    """The checkpoint of an embedded or hub target, fetched first if need be."""
    if isinstance(config, EmbeddedTargetConfig):
        return Located(config.name, SMOLLM2_135M.source, prepare(SMOLLM2_135M, config.path, note))
    if not isinstance(config, HubTargetConfig):
        raise ConfigError(f"target={config.name}: {type(config).__name__} is no kind of target")
    return locate(config, note, wanted, weights=weights)


def weights_identity(config: TargetConfig, wanted: Wanted = TARGET, *, note: Note = print_note) -> str:
    """Hex digest of what ``config`` refers to: a checkpoint's contents, or the seed and shape of planted weights.

    The checkpoint is fetched first if need be. Weights are sampled, see :mod:`subspec.targets.identity`. Errors as of
    :func:`load_target`.
    """
    if isinstance(config, PlantedTargetConfig):
        facts = f"planted {config.shape}, seed {config.seed}, hard {config.hard_share}"
        return hashlib.sha256(facts.encode()).hexdigest()
    return folder_identity(_locate(config, note, wanted).folder)


def open_source(
    config: TargetConfig, dtype: torch.dtype, device: torch.device, *, note: Note = print_note
) -> LayerSource:
    """The layers of any target, fetched first if need be.

    Args:
        dtype: of every tensor handed out.
        device: of the run; planted weights are drawn there. Nothing is allocated there yet.
        note: receives one line about everything worth knowing (downloads, a missing chat template, rounding).

    Raises:
        SubspecError: one line with the remedy, before any weight is read.
    """
    source: LayerSource
    if isinstance(config, PlantedTargetConfig):
        source = PlantedSource(config, dtype, device)
    else:
        source = CheckpointSource(_locate(config, note), config.name, dtype)
    for line in source.notes:
        note(line)
    return source


def load_target(config: TargetConfig, device: torch.device, *, note: Note = print_note) -> Target:
    """Load a target whole onto ``device``, fetching it first if need be; ``dtype=auto`` is resolved for the device.

    Errors and ``note`` as of :func:`open_source`.
    """
    source = open_source(config, resolve_dtype(config.dtype, device), device, note=note)
    check_memory(count_parameters(source.config) * source.dtype.itemsize, device, source.name)
    try:
        model = build_model(source, device)
    except torch.OutOfMemoryError as error:
        raise SubspecError(
            f"{source.name} does not fit into the memory of {device}; choose a smaller target"
        ) from error
    return Target.of(source, model, device)
