"""One door for every kind of target: from its configuration to a :class:`Target`, whole, on one device."""

import torch
from transformers import PretrainedConfig

from subspec.config.schema import EmbeddedTargetConfig, PlantedTargetConfig, TargetConfig
from subspec.targets.checkpoint import check_folder_config, checkpoint_identity, load_model
from subspec.targets.device import check_memory, resolve_dtype
from subspec.targets.embedded import smollm2_config
from subspec.targets.hub import locate
from subspec.targets.meta_model import build_model, count_parameters
from subspec.targets.planted import PlantedSource, planted_config
from subspec.targets.prepared import hub_config, prepare_checkpoint
from subspec.targets.target import Target
from subspec.utils.console import Note, print_note


def load_target_config(config: TargetConfig, *, note: Note = print_note) -> PretrainedConfig:
    """The target's model configuration without its weights, for checks before anything large is fetched.

    Raises:
        SubspecError: as :func:`load_target`, as far as the configuration alone can tell.
    """
    if isinstance(config, EmbeddedTargetConfig):
        return smollm2_config()
    if isinstance(config, PlantedTargetConfig):
        return planted_config(config)
    located = locate(hub_config(config), note, weights=False)
    return check_folder_config(located.folder, config.name)


def load_target(config: TargetConfig, device: torch.device, *, note: Note = print_note) -> Target:
    """Load a target, fetching it first if need be.

    Args:
        config: one of the target options; ``dtype=auto`` is resolved for ``device``.
        device: where the weights go, see :func:`subspec.targets.resolve_device`.
        note: told one line about everything worth knowing (downloads, a missing chat template, rounding).

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    dtype = resolve_dtype(config.dtype, device)
    if isinstance(config, PlantedTargetConfig):
        return _planted(config, dtype, device, note)
    checkpoint = prepare_checkpoint(config, note)
    check_memory(checkpoint.weights.count * dtype.itemsize, device, checkpoint.name)
    model = load_model(checkpoint.folder, checkpoint.name, dtype, device)
    remarks = checkpoint.remarks(dtype)
    for line in remarks:
        note(line)
    return Target(
        name=checkpoint.name,
        model=model,
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=checkpoint.eos_token_ids,
        dtype=dtype,
        device=device,
        source=checkpoint.source,
        identity=checkpoint_identity(checkpoint.folder, checkpoint.source),
        notes=tuple(remarks),
    )


def _planted(config: PlantedTargetConfig, dtype: torch.dtype, device: torch.device, note: Note) -> Target:
    check_memory(count_parameters(planted_config(config)) * dtype.itemsize, device, config.name)
    source = PlantedSource(config, dtype, device)
    for line in source.notes:
        note(line)
    return Target(
        name=source.name,
        model=build_model(source, device),
        tokenizer=source.tokenizer,
        eos_token_ids=source.eos_token_ids,
        dtype=dtype,
        device=device,
        source=source.source,
        identity=source.identity,
        planted=True,
        notes=source.notes,
    )
