"""Draft heads on disk and on the hub: ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``.

Published checkpoints of EAGLE-1 and EAGLE-2 look alike: the tensors of :mod:`subspec.drafts.eagle_head`, and a copy
of the target's embedding table, which is dropped here because the target's own is used. Those of EAGLE-3 differ in
names, in the layout of ``config.json`` and in optional tensors (:mod:`subspec.drafts.eagle3_head`), and so do block
heads (:mod:`subspec.drafts.block_head`). Other missing or surplus tensors are named, so that a head of another kind
(Medusa) is refused with a reason.

Functions raise a ConfigError about files that are no such head or belong to another target, and a SubspecError about
files that cannot be fetched or read.
"""

import functools
import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspec.config.schema import (
    BlockHeadDraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    EmbeddedTargetConfig,
    HubTargetConfig,
    TargetConfig,
)
from subspec.drafts import shipped
from subspec.drafts.block_head import BlockHead
from subspec.drafts.eagle3_head import D2T, Eagle3Head
from subspec.drafts.eagle_head import EagleHead, EagleShape
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
    what=f"the folder or hub id of a draft head ({CONFIG} and weights)",
    remedy="{key} must be the folder or hub id of a draft head",
    pickle=True,
    tokenizer=False,
    family=False,
    texts=(CONFIG,),
)

UNUSED = ("embed_tokens.weight", "lm_head.weight", "t2d")
"""Dropped unless the head's kind uses them: copies of the target's tables, and the inverse of ``d2t``."""

WRAPPERS = ("model", "transformer_layer_config", "speculators_config")
"""Keys of a ``config.json`` under which vLLM and the speculators library nest the head's own configuration."""

NAMED = 6
"""Most tensors of a kind that a message names."""


@dataclass
class LoadedHead:
    """A head in memory; ``dropped``: names of the file's tensors that are not used."""

    head: EagleHead
    source: str
    dropped: list[str] = field(default_factory=list)
    planted: bool = False


KINDS: dict[type[Eagle2DraftConfig], type[EagleHead]] = {
    Eagle2DraftConfig: EagleHead,
    Eagle3DraftConfig: Eagle3Head,
    BlockHeadDraftConfig: BlockHead,
}
"""Kinds of head, by the class of the configuration."""


def kind_of(draft: Eagle2DraftConfig) -> type[EagleHead]:
    """The kind of head that a draft reads."""
    return KINDS[type(draft)]


# ---------------------------------------------------------------------------------------------- finding


def locate_for(draft: Eagle2DraftConfig, target: TargetConfig, note: Note) -> Located | PlantedHead:
    """The head that a run asks for: ``draft.path``, one that is made up, or the shipped one."""
    if draft.path == PLANTED:
        return PlantedHead.of(target, kind_of(draft))
    if draft.path is not None:
        return locate_head(draft.path, note)
    check_default(draft, target)
    shape = kind_of(draft).shape_class
    folder = shipped.HEADS[shape.draft]
    if not folder.is_dir():
        script = "train_block_head" if shape.draft == "block_head" else "train_eagle"
        raise ConfigError(
            f"draft={shape.draft}: the head for the default target is not in this installation "
            f"(subspec/drafts/weights/{folder.name}): train one with scripts/{script}.py and set draft.path to its "
            "folder"
        )
    source = shipped.shipped_source(folder / weight_files(folder, HEAD)[0])
    return Located(f"the shipped {shape.kind}", source, folder)


def check_default(draft: Eagle2DraftConfig, target: TargetConfig) -> None:
    """Refuse to draft with a shipped head for any target but the embedded default."""
    if not isinstance(target, EmbeddedTargetConfig):
        shape = kind_of(draft).shape_class
        raise ConfigError(
            f"draft={shape.draft} ships a head for the embedded default target only: for target={target.name} set "
            f"draft.path to the folder or hub id of {with_article(shape.kind)} that was trained for it"
        )


def is_at_hand(path: str) -> bool:
    """Whether ``draft.path`` is a folder, or a hub id whose head is in the hub's cache."""
    return Path(path).expanduser().is_dir() or cached(_as_target(path), HEAD) is not None


def locate_head(path: str, note: Note, key: str = HEAD.key) -> Located:
    """The head at ``path``, a folder or a hub id, fetched first if need be.

    Args:
        key: of the configuration that gave ``path``, for messages.
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
    """The head's ``config.json``; nested parts (:data:`WRAPPERS`) on top of what surrounds them."""
    return _unwrapped(read_json(files.folder / CONFIG))


def _unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    inner = [config[key] for key in WRAPPERS if isinstance(config.get(key), dict)]
    if "num_attention_heads" in config:
        return config
    return functools.reduce(lambda outer, part: {**outer, **_unwrapped(part)}, inner, config)


def read_tensors(files: Located) -> dict[str, Tensor]:
    """Every tensor of the head, on the CPU, mapped: bytes are read when they are used."""
    names, tensors = weight_files(files.folder, HEAD), {}
    if names == [PICKLE]:
        return read_pickle(files.folder / PICKLE)
    for file in names:
        with open_weights(files.folder / file) as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, on the CPU; refused if it holds more than tensors."""
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
        raise SubspecError(f"{file} holds no state dict: pass the weights of a draft head")
    return dict(loaded)


def head_identity(files: Located | PlantedHead) -> str:
    """Hex digest of a head's weights and configuration (:func:`subspec.targets.identity.identity`)."""
    if isinstance(files, PlantedHead):
        return hashlib.sha256(files.source.encode()).hexdigest()
    return identity(read_tensors(files).items(), [files.folder / CONFIG])


def sort_tensors(
    tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any], kind: type[EagleHead] = EagleHead
) -> tuple[dict[str, Tensor], list[str]]:
    """A head's own tensors under the names of its kind, and the names of those that are dropped.

    A prefix that all names share (``model.``, ``module.``) is taken off, and EAGLE-3's ``midlayer`` is ``layers.0``.
    Dropped are :data:`UNUSED`, rotary frequencies that old checkpoints store, and the speculators library's parts of
    the target.

    Args:
        name: of the checkpoint as the user gave it.
        config: its ``config.json``.

    Raises:
        ConfigError: tensors are missing or left over; each is named, or the kind of head if it is known.
    """
    anchor = next((key for key in tensors if key.endswith("fc.weight")), "fc.weight")
    prefix = anchor.removesuffix("fc.weight")
    shape = kind.shape_class
    names = {key: key.removeprefix(prefix) for key in tensors}
    if kind is Eagle3Head:
        names = {key: re.sub("^midlayer", "layers.0", own) for key, own in names.items()}
    plain = {own: tensors[key] for key, own in names.items()}
    required, optional = shape.names(config)
    used = {*required, *optional}
    dropped = [key for key, own in names.items() if own not in used and _is_unused(own)]
    missing = [own for own in required if own not in plain]
    surplus = sorted(plain.keys() - used - {names[key] for key in dropped})
    if missing or surplus:
        if other := _other_kind(plain, config, kind):
            raise ConfigError(f"{name} is {other}")
        parts = [
            f"{what} {', '.join(keys[:NAMED])}" + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
            for what, keys in (("missing", missing), ("surplus", surplus))
            if keys
        ]
        raise ConfigError(
            f"{name} is no {shape.kind}: {'; '.join(parts)}: set draft.path to {with_article(shape.kind)} as published"
        )
    kept = {own: plain[own] for own in (*required, *optional) if own in plain}
    for key, tensor in kept.items():
        if key != D2T and (not tensor.is_floating_point() or tensor.itemsize < 2):
            raise ConfigError(f"{name} holds {key} as {tensor.dtype}: quantized heads are not read; take the original")
    return kept, sorted(dropped)


def _is_unused(name: str) -> bool:
    return name in UNUSED or name.endswith("rotary_emb.inv_freq") or name.startswith("verifier_")


def with_article(kind: str) -> str:
    """A kind of head with its indefinite article."""
    return f"{'an' if kind.startswith('E') else 'a'} {kind}"


def kind_of_files(names: Iterable[str], config: Mapping[str, Any]) -> type[EagleHead]:
    """The kind of a head, by the names of its tensors and its ``config.json``."""
    marks = ("d2t", "t2d", "midlayer.", "hidden_norm.")
    if {"block_size", "dflash_config"} & config.keys():
        return BlockHead
    three = "eagle3" in _said(config) or any(mark in name for name in names for mark in marks)
    return Eagle3Head if three else EagleHead


def _said(config: Mapping[str, Any]) -> str:
    written = (config.get("speculators_model_type"), config.get("model_type"), config.get("architectures"))
    return " ".join(map(str, written)).lower()


def _other_kind(names: Iterable[str], config: Mapping[str, Any], kind: type[EagleHead]) -> str | None:
    """Another kind than ``kind``, if tensors or configuration tell, with the remedy."""
    names, shape, own = list(names), kind_of_files(names, config).shape_class, kind.shape_class
    other = ""
    if "medusa" in _said(config) or any("medusa_head" in n or n.endswith(".0.linear.weight") for n in names):
        other = "a set of Medusa heads"
    elif shape is not own and "fc.weight" in names:
        return f"{with_article(shape.kind)}: set draft={shape.draft} with the same draft.path"
    elif shape is EagleShape and any(key.startswith("speculators_") for key in config):
        other = f"a head ({config.get('speculators_model_type')}) in the layout of the speculators library"
    elif "lm_head.weight" in names and any(name.startswith("model.layers.") for name in names):
        other = "a whole language model (draft=small_model drafts with it)"
    reads = f"draft={own.draft} reads {with_article(own.kind)} as published"
    return other and f"{other}, and {reads}: set draft.path to one"


def load_head(
    files: Located | PlantedHead,
    *,
    hidden: int,
    target: str,
    dtype: torch.dtype,
    device: torch.device,
    kind: type[EagleHead] = EagleHead,
) -> LoadedHead:
    """Load a head for a target, or make it up.

    Args:
        hidden: the target's hidden size. target: its name, for messages.
        dtype, device: of the head: the target's.
        kind: what the files must hold.
    """
    if isinstance(files, PlantedHead):
        drawn, config = files.tensors(dtype, device), files.shape().config()
        return LoadedHead(files.kind.from_tensors(drawn, config), files.source, planted=True)
    tensors, dropped, shape = _read(files, hidden, target, kind)
    moved = {name: tensor.to(device, torch.int64 if name == D2T else dtype) for name, tensor in tensors.items()}
    return LoadedHead(kind.from_tensors(moved, shape.config()), files.source, dropped)


@functools.lru_cache(maxsize=8)
def head_shape(files: Located | PlantedHead, hidden: int, target: str, kind: type[EagleHead] = EagleHead) -> EagleShape:
    """Sizes of a head without its weights, for planning; arguments and errors as of :func:`load_head`."""
    if isinstance(files, PlantedHead):
        return files.shape()
    return _read(files, hidden, target, kind)[2]


def _read(
    files: Located, hidden: int, target: str, kind: type[EagleHead]
) -> tuple[dict[str, Tensor], list[str], EagleShape]:
    """A head's own tensors, the names of dropped ones, and its sizes; checked against the target's hidden size."""
    config = read_config(files)
    tensors, dropped = sort_tensors(read_tensors(files), files.path, config, kind)
    kind.shape_class.check_inputs(tensors, files.path, hidden, target)
    return tensors, dropped, shape_of(tensors, config, kind)


def shape_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: type[EagleHead]) -> EagleShape:
    """Sizes of a head, read off its tensors and its ``config.json``."""
    try:
        return kind.shape_class.of(tensors, config)
    except SubspecError:
        raise
    except Exception as error:  # also of the library, which checks rotary settings
        raise ConfigError(f"the {kind.shape_class.kind}'s config.json is not valid ({one_line(error)})") from error
