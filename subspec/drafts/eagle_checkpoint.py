"""EAGLE heads on disk and on the hub: ``config.json`` with ``model.safetensors`` or ``pytorch_model.bin``.

Published checkpoints of EAGLE-1 and EAGLE-2 look alike: the tensors of :mod:`subspec.drafts.eagle_head`, and a copy
of the target's embedding table, which is dropped here because the target's own is used. Other missing or surplus
tensors are named, so that a head of another kind (EAGLE-3, Medusa) is refused with a reason.
"""

import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subspec.config.schema import Eagle2DraftConfig, EmbeddedTargetConfig, TargetConfig
from subspec.drafts import shipped
from subspec.drafts.eagle_head import OPTIONAL, REQUIRED, EagleHead, EagleShape
from subspec.drafts.planted_head import PLANTED, PlantedHead
from subspec.errors import ConfigError, SubspecError
from subspec.targets.hub import HTTP_S, HUB_ID, explain_hub_error, remember_branch, require_space
from subspec.targets.identity import identity
from subspec.utils.console import Note, quiet_libraries
from subspec.utils.network import hub_problem

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names of a head's weights, the preferred one first."""

EMBEDDING = "embed_tokens.weight"
"""The target's own embedding table is used in its place."""

SHIPPED = shipped.EAGLE
"""The head that ships with the project, for the embedded default target."""

NAMED = 6
"""Most tensors of a kind that a message names."""


@dataclass(frozen=True)
class HeadFiles:
    """A head found on disk.

    Attributes:
        path: as the user gave it.
        source: for records: the folder, or hub id @ commit.
    """

    path: str
    source: str
    folder: Path

    @property
    def weights(self) -> Path:
        """The file of weights.

        Raises:
            ConfigError: there is none.
        """
        found = next((self.folder / name for name in WEIGHTS if (self.folder / name).is_file()), None)
        if found is None:
            raise ConfigError(
                f"{self.path} holds no {' or '.join(WEIGHTS)}: pass the folder or hub id of an EAGLE head"
            )
        return found


@dataclass
class LoadedHead:
    """A head in memory.

    Attributes:
        source: see :class:`HeadFiles`.
        dropped: names of the file's tensors that are not used.
        planted: whether the weights are made up.
    """

    head: EagleHead
    source: str
    dropped: list[str] = field(default_factory=list)
    planted: bool = False


# ---------------------------------------------------------------------------------------------- finding


def locate_for(draft: Eagle2DraftConfig, target: TargetConfig, note: Note) -> HeadFiles | PlantedHead:
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
    files = _checked(HeadFiles("the shipped EAGLE head", "", SHIPPED))
    return replace(files, source=shipped.shipped_source(files.weights))


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


def is_local(path: str) -> bool:
    """Whether ``draft.path`` is a folder on this machine."""
    return Path(path).expanduser().is_dir()


def locate_head(path: str, note: Note, key: str = "draft.path") -> HeadFiles:
    """The head at ``path``, a folder or a hub id, fetched first if need be.

    Args:
        key: of the configuration that gave ``path``, for messages.

    Raises:
        ConfigError: no such folder, or nothing that can be an EAGLE head.
        SubspecError: the hub cannot be reached, refuses, or has no such repository.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        files = HeadFiles(path, path, folder)
        return _checked(files)
    if folder.is_file():
        raise ConfigError(f"{key}={path} is a file; pass the folder of the EAGLE head ({CONFIG} and weights)")
    if not HUB_ID.fullmatch(path):
        raise ConfigError(f"{key}={path}: no such folder, and not a hub id (ORG/NAME)")
    with quiet_libraries(bars=True):
        return _from_hub(path, note, key)


def _checked(files: HeadFiles) -> HeadFiles:
    if not (files.folder / CONFIG).is_file():
        raise ConfigError(
            f"{files.path} has no {CONFIG}: pass the folder or hub id of an EAGLE head, with its configuration"
        )
    assert files.weights
    return files


def _from_hub(path: str, note: Note, key: str) -> HeadFiles:
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_problem(constants.ENDPOINT)
    cached = cached_head(path)
    trouble = SubspecError(f"the model hub is not used: {problem}")
    if problem is None:
        try:
            return _fetch(path, note)
        except SubspecError:
            raise
        except Exception as error:
            trouble = explain_hub_error(error, path, key=key)
            if cached is None or isinstance(trouble, ConfigError):
                raise trouble from error
    if cached is None:
        raise SubspecError(
            f"{key}={path}: no such folder, no complete copy in the hub cache, and {trouble}; check the network, or "
            "pass a local folder"
        )
    if not constants.HF_HUB_OFFLINE:
        note(f"{trouble}: using the cached {cached.source}")
    return cached


def cached_head(path: str) -> HeadFiles | None:
    """The head of a hub id if the hub's cache holds all of it."""
    for name in WEIGHTS:
        file = huggingface_hub.try_to_load_from_cache(path, name)
        if isinstance(file, str) and (Path(file).parent / CONFIG).is_file():
            folder = Path(file).parent
            return HeadFiles(path, f"{path}@{folder.name}", folder)
    return None


def _fetch(path: str, note: Note) -> HeadFiles:
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    info = api.model_info(path, files_metadata=True, timeout=HTTP_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = next((name for name in WEIGHTS if name in sizes), None)
    if weights is None or CONFIG not in sizes:
        raise ConfigError(
            f"{path} holds no {CONFIG} with {' or '.join(WEIGHTS)}: it is not the repository of an EAGLE head"
        )
    known = cached_head(path)
    if known is None or known.folder.name != info.sha:
        require_space(path, sizes[weights])
        note(f"fetching {path}@{info.sha[:12]} ({sizes[weights] / 1e9:.2f} GB) into the hub cache")
    folder = Path(
        huggingface_hub.snapshot_download(
            path, revision=info.sha, endpoint=constants.ENDPOINT, allow_patterns=[CONFIG, weights]
        )
    )
    remember_branch(folder, None)
    return HeadFiles(path, f"{path}@{info.sha}", folder)


# ---------------------------------------------------------------------------------------------- reading


def read_config(files: HeadFiles) -> dict[str, Any]:
    """The head's ``config.json``.

    Raises:
        ConfigError: it cannot be read.
    """
    file = files.folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({_line(error)}); fetch or copy it again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is no configuration; fetch or copy it again")
    return config


def read_tensors(files: HeadFiles, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU; with ``shapes_only`` on the meta device, reading no weights.

    Raises:
        SubspecError: the file is damaged, or is a pickle that holds more than tensors.
    """
    file = files.weights
    try:
        if file.suffix == ".safetensors":
            return _safetensors(file, shapes_only)
        device = "meta" if shapes_only else "cpu"
        loaded = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, SafetensorError) as error:
        raise SubspecError(f"{file} cannot be read ({_line(error)}); fetch or copy it again") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise SubspecError(
            f"{file} is not read: it is damaged or holds more than tensors ({_line(error)}); fetch it again from a "
            "source you trust, or convert it to safetensors"
        ) from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise SubspecError(f"{file} holds no state dict: pass the weights of an EAGLE head")
    return dict(loaded)


def _safetensors(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    with safe_open(file, framework="pt", device="cpu") as handle:
        names = list(handle.keys())
        if shapes_only:
            return {name: torch.empty(handle.get_slice(name).get_shape(), device="meta") for name in names}
        return {name: handle.get_tensor(name) for name in names}


def head_identity(files: HeadFiles | PlantedHead) -> str:
    """Hex digest of a head's weights and configuration (:func:`subspec.targets.identity.identity`).

    Raises:
        SubspecError: as :func:`read_tensors`.
    """
    if isinstance(files, PlantedHead):
        return hashlib.sha256(files.source.encode()).hexdigest()
    return identity(read_tensors(files).items(), [files.folder / CONFIG])


def sort_tensors(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """A head's own tensors under their published names, and the names of those that are dropped.

    A prefix that all names share (``model.``, ``module.``) is taken off. The embedding table and the rotary
    frequencies that old checkpoints store are dropped.

    Args:
        name: of the checkpoint as the user gave it.

    Raises:
        ConfigError: tensors are missing or left over; each is named.
    """
    anchor = next((key for key in tensors if key.endswith("fc.weight")), "fc.weight")
    prefix = anchor.removesuffix("fc.weight")
    plain = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    dropped = [key for key in plain if key == EMBEDDING or key.endswith("rotary_emb.inv_freq")]
    missing = [key for key in REQUIRED if key not in plain]
    surplus = sorted(plain.keys() - {*REQUIRED, *OPTIONAL, *dropped})
    if missing or surplus:
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
    wrong = next((key for key, tensor in kept.items() if not tensor.is_floating_point()), None)
    if wrong is not None:
        raise ConfigError(
            f"{name} holds {wrong} as {kept[wrong].dtype}: quantized heads are not read; take the original"
        )
    return kept, sorted(prefix + key for key in dropped)


def load_head(
    files: HeadFiles | PlantedHead, *, hidden: int, target: str, dtype: torch.dtype, device: torch.device
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
    tensors, dropped = sort_tensors(read_tensors(files), files.path)
    check_hidden(tensors["fc.weight"].shape, files.path, hidden, target)
    config = read_config(files)
    EagleShape.of({name: tensor.shape for name, tensor in tensors.items()}, config)  # refuse before moving it
    moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    return LoadedHead(EagleHead.from_tensors(moved, config), files.source, dropped)


def check_hidden(fc: torch.Size, path: str, hidden: int, target: str) -> None:
    """Refuse a head whose ``fc`` was made for another hidden size than the target's.

    Raises:
        ConfigError: names both sizes.
    """
    if len(fc) != 2 or fc[1] != 2 * fc[0]:
        raise ConfigError(
            f"{path} holds fc.weight as {list(fc)}, not as [H, 2 H]: it is no EAGLE-1 or EAGLE-2 head"
        )
    if fc[0] != hidden:
        raise ConfigError(
            f"{path} is a head for targets of hidden size {fc[0]}, and {target} has {hidden}: set draft.path to a head "
            "that was trained for this target"
        )


@functools.lru_cache(maxsize=8)
def head_shape(files: HeadFiles | PlantedHead, hidden: int, target: str) -> EagleShape:
    """Sizes of a head without its weights, for planning; ``hidden`` and ``target`` as in :func:`load_head`.

    Raises:
        SubspecError: as :func:`load_head`.
    """
    if isinstance(files, PlantedHead):
        return files.shape()
    tensors, _ = sort_tensors(read_tensors(files, shapes_only=True), files.path)
    check_hidden(tensors["fc.weight"].shape, files.path, hidden, target)
    return EagleShape.of({name: tensor.shape for name, tensor in tensors.items()}, read_config(files))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
