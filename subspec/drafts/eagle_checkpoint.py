"""EAGLE heads on disk and on the hub: ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``.

Published checkpoints of EAGLE-1 and EAGLE-2 look alike: the tensors of :mod:`subspec.drafts.eagle_head`, and a copy
of the target's embedding table, which is dropped here because the target's own is used. Other missing or surplus
tensors are named, so that a head of another kind (EAGLE-3, Medusa) is refused with a reason.
"""

import functools
import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspec.config.schema import Eagle2DraftConfig, EmbeddedTargetConfig, HubTargetConfig, TargetConfig
from subspec.drafts import shipped
from subspec.drafts.eagle_head import OPTIONAL, REQUIRED, EagleHead, EagleShape
from subspec.drafts.planted_head import PLANTED, PlantedHead
from subspec.errors import ConfigError, SubspecError
from subspec.targets.hub import Located, cached, locate
from subspec.targets.identity import identity
from subspec.targets.weight_files import (
    CONFIG,
    PICKLE,
    Wanted,
    check_pointer,
    one_line,
    open_weights,
    read_json,
    weight_files,
)
from subspec.utils.console import Note

HEAD = Wanted(
    key="draft.path",
    what=f"the folder or hub id of an EAGLE head ({CONFIG} and weights)",
    remedy="{key} must be the folder or hub id of an EAGLE head",
    pickle=True,
    tokenizer=False,
    family=False,
    texts=(CONFIG,),
)

TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tables, which are used in their place."""

SHIPPED = shipped.EAGLE
"""The head that ships with the project, for the embedded default target."""

NAMED = 6
"""Most tensors of a kind that a message names."""


@dataclass
class LoadedHead:
    """A head in memory.

    Attributes:
        source: of ``Located``.
        dropped: names of the file's tensors that are not used.
        planted: whether the weights are made up.
    """

    head: EagleHead
    source: str
    dropped: list[str] = field(default_factory=list)
    planted: bool = False


# ---------------------------------------------------------------------------------------------- finding


def locate_for(draft: Eagle2DraftConfig, target: TargetConfig, note: Note) -> Located | PlantedHead:
    """The head that a run asks for: ``draft.path``, one that is made up, or the shipped one.

    Raises:
        SubspecError: as :func:`locate_head` or :meth:`PlantedHead.of`; or no head ships for the target, or the shipped
            one is not there.
    """
    if draft.path == PLANTED:
        return PlantedHead.of(target)
    if draft.path is not None:
        return locate_head(draft.path, note)
    check_default(target)
    if not SHIPPED.is_dir():
        raise ConfigError(
            "draft=eagle2: the head for the default target is not in this installation (subspec/drafts/weights/eagle): "
            "train one with scripts/train_eagle.py and set draft.path to its folder"
        )
    source = shipped.shipped_source(SHIPPED / weight_files(SHIPPED, HEAD)[0])
    return Located("the shipped EAGLE head", source, SHIPPED)


def check_default(target: TargetConfig) -> None:
    """Refuse to draft with the shipped head for any target but the embedded default.

    Raises:
        ConfigError: names ``draft.path``.
    """
    if not isinstance(target, EmbeddedTargetConfig):
        raise ConfigError(
            f"draft=eagle2 ships a head for the embedded default target only: for target={target.name} set "
            "draft.path to the folder or hub id of an EAGLE head that was trained for it"
        )


def is_at_hand(path: str) -> bool:
    """Whether ``draft.path`` is a folder, or a hub id whose head is in the hub's cache."""
    return Path(path).expanduser().is_dir() or cached(_as_target(path), HEAD) is not None


def locate_head(path: str, note: Note, key: str = HEAD.key) -> Located:
    """The head at ``path``, a folder or a hub id, fetched first if need be.

    Args:
        key: of the configuration that gave ``path``, for messages.

    Raises:
        ConfigError: no such folder, or nothing that can be an EAGLE head.
        SubspecError: the hub cannot be reached, refuses, or has no such repository.
    """
    wanted = replace(HEAD, key=key)
    located = locate(_as_target(path), note, wanted)
    if not (located.folder / CONFIG).is_file():
        raise ConfigError(f"{path} has no {CONFIG}: pass {wanted.what}")
    weight_files(located.folder, wanted)
    return located


def _as_target(path: str) -> HubTargetConfig:
    return HubTargetConfig(name=path, path=path)


# ---------------------------------------------------------------------------------------------- reading


def read_config(files: Located) -> dict[str, Any]:
    """The head's ``config.json``; of vLLM's layout, which nests it, the inner part.

    Raises:
        ConfigError: it cannot be read.
    """
    config = read_json(files.folder / CONFIG)
    inner = config.get("model")
    return inner if isinstance(inner, dict) and "num_attention_heads" not in config else config


def read_tensors(files: Located) -> dict[str, Tensor]:
    """Every tensor of the head, on the CPU, mapped: bytes are read when they are used.

    Raises:
        SubspecError: a file is damaged, or is a pickle that holds more than tensors.
    """
    names, tensors = weight_files(files.folder, HEAD), {}
    if names == [PICKLE]:
        return _unpickled(files.folder / PICKLE)
    for file in names:
        with open_weights(files.folder / file) as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    check_pointer(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle may fail in any way
        raise SubspecError(
            f"{file} is not read: it is damaged or holds more than tensors ({one_line(error)}); fetch it again from a "
            "source you trust, or convert it to safetensors"
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise SubspecError(f"{file} holds no state dict: pass the weights of an EAGLE head")
    return dict(loaded)


def head_identity(files: Located | PlantedHead) -> str:
    """Hex digest of a head's weights and configuration (:func:`subspec.targets.identity.identity`).

    Raises:
        SubspecError: as :func:`read_tensors`.
    """
    if isinstance(files, PlantedHead):
        return hashlib.sha256(files.source.encode()).hexdigest()
    return identity(read_tensors(files).items(), [files.folder / CONFIG])


def sort_tensors(
    tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """A head's own tensors under their published names, and the names of those that are dropped.

    A prefix that all names share (``model.``, ``module.``) is taken off. Copies of the target's tables and the rotary
    frequencies that old checkpoints store are dropped.

    Args:
        name: of the checkpoint as the user gave it.
        config: its ``config.json``.

    Raises:
        ConfigError: tensors are missing or left over; each is named, or the kind of head if it is known.
    """
    anchor = next((key for key in tensors if key.endswith("fc.weight")), "fc.weight")
    prefix = anchor.removesuffix("fc.weight")
    plain = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    dropped = [key for key in plain if key in TARGETS_OWN or key.endswith("rotary_emb.inv_freq")]
    missing = [key for key in REQUIRED if key not in plain]
    surplus = sorted(plain.keys() - {*REQUIRED, *OPTIONAL, *dropped})
    if missing or surplus:
        if kind := _other_kind(plain, config):
            raise ConfigError(
                f"{name} is {kind}, and draft=eagle2 reads EAGLE-1 and EAGLE-2 heads as their authors publish them: "
                "set draft.path to one"
            )
        parts = [
            f"{what} {', '.join(names[:NAMED])}"
            + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            for what, names in (("missing", missing), ("surplus", surplus))
            if names
        ]
        raise ConfigError(
            f"{name} is no EAGLE-1 or EAGLE-2 head: {'; '.join(parts)}: set draft.path to a head with one layer and fc"
        )
    kept = {key: plain[key] for key in (*REQUIRED, *OPTIONAL) if key in plain}
    for key, tensor in kept.items():
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ConfigError(
                f"{name} holds {key} as {tensor.dtype}: quantized heads are not read; take the original"
            )
    return kept, sorted(prefix + key for key in dropped)


def _other_kind(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The kind of a head that is no EAGLE-1 or EAGLE-2 head, if its tensors or its configuration tell."""
    names = list(names)
    written = [
        config.get("speculators_model_type"),
        config.get("model_type"),
        *(config.get("architectures") or ()),
    ]
    said = " ".join(map(str, written)).lower()
    if "eagle3" in said or any(name in ("d2t", "t2d") or "midlayer." in name for name in names):
        return "an EAGLE-3 head"
    if "medusa" in said or any("medusa_head" in name or name.endswith(".0.linear.weight") for name in names):
        return "a set of Medusa heads"
    if any(key.startswith("speculators_") for key in config):
        return f"a head ({written[0]}) in the layout of the speculators library"
    if "lm_head.weight" in names and any(name.startswith("model.layers.") for name in names):
        return "a whole language model (draft=small_model drafts with it)"
    return None


def load_head(
    files: Located | PlantedHead, *, hidden: int, target: str, dtype: torch.dtype, device: torch.device
) -> LoadedHead:
    """Load a head for a target, or make it up.

    Args:
        hidden: the target's hidden size. target: its name, for messages.
        dtype, device: of the head: the target's.

    Raises:
        ConfigError: not an EAGLE head, or one for another target.
        SubspecError: the files cannot be read.
    """
    if isinstance(files, PlantedHead):
        drawn = files.tensors(dtype, device)
        return LoadedHead(EagleHead.from_tensors(drawn, files.shape().config()), files.source, planted=True)
    tensors, dropped, shape = _read(files, hidden, target)
    moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    return LoadedHead(EagleHead.from_tensors(moved, shape.config()), files.source, dropped)


def check_hidden(fc: torch.Size, path: str, hidden: int, target: str) -> None:
    """Refuse a head whose ``fc`` was made for another hidden size than the target's.

    Raises:
        ConfigError: names both sizes.
    """
    if len(fc) != 2 or fc[1] != 2 * fc[0]:
        three = ", but EAGLE-3's" if len(fc) == 2 and fc[1] == 3 * fc[0] else ""
        raise ConfigError(
            f"{path} holds fc.weight as {list(fc)}, not as [H, 2 H]: it is no EAGLE-1 or EAGLE-2 head{three}"
        )
    if fc[0] != hidden:
        raise ConfigError(
            f"{path} is a head for targets of hidden size {fc[0]}, and {target} has {hidden}: set draft.path to a head "
            "that was trained for this target"
        )


@functools.lru_cache(maxsize=8)
def head_shape(files: Located | PlantedHead, hidden: int, target: str) -> EagleShape:
    """Sizes of a head without its weights, for planning; ``hidden`` and ``target`` as in :func:`load_head`.

    Raises:
        SubspecError: as :func:`load_head`.
    """
    if isinstance(files, PlantedHead):
        return files.shape()
    return _read(files, hidden, target)[2]


def _read(files: Located, hidden: int, target: str) -> tuple[dict[str, Tensor], list[str], EagleShape]:
    """A head's own tensors, the names of dropped ones, and its sizes; checked against the target's hidden size."""
    config = read_config(files)
    tensors, dropped = sort_tensors(read_tensors(files), files.path, config)
    check_hidden(tensors["fc.weight"].shape, files.path, hidden, target)
    return tensors, dropped, shape_of(tensors, config)


def shape_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> EagleShape:
    """Sizes of a head, read off its tensors and its ``config.json``.

    Raises:
        ConfigError: they contradict each other, or a value of the configuration is invalid.
    """
    try:
        shape = EagleShape.of({name: tensor.shape for name, tensor in tensors.items()}, config)
        shape.layer_config()  # the library checks rotary settings
    except SubspecError:
        raise
    except Exception as error:
        raise ConfigError(f"the EAGLE head's config.json is not valid ({one_line(error)})") from error
    return shape
