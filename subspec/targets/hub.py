"""From ``target.path`` to a folder on disk: a local folder, or a hub id through the hub's own cache.

The hub client waits most of a minute before it gives up on a network, so a short probe comes first. Without a
network, or with ``HF_HUB_OFFLINE=1``, a complete cached snapshot is used. The configuration is fetched and
checked before the weights.
"""

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from subspec.config.schema import HubTargetConfig
from subspec.errors import ConfigError, SubspecError
from subspec.targets.checkpoint import TOKENIZER_FILES, check_folder_config, has_tokenizer
from subspec.targets.weight_files import CONFIG, INDEX, TARGET, Wanted, main_file, weight_files
from subspec.utils.console import Note, quiet_libraries
from subspec.utils.disk import is_full_disk, require_space
from subspec.utils.network import hub_problem

HTTP_S = 20.0
"""Timeout for the description of a repository, in seconds."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""ORG/NAME."""


@dataclass(frozen=True)
class Located:
    """A checkpoint folder on disk.

    Attributes:
        path: as the user gave it; source: recorded origin, the folder or hub id @ commit.
    """

    path: str
    source: str
    folder: Path


def locate(config: HubTargetConfig, note: Note, wanted: Wanted = TARGET, *, weights: bool = True) -> Located:
    """The folder of ``config.path`` at ``config.revision``, fetched first when it is a hub id.

    Args:
        weights: False: the configuration alone will do, and nothing large is fetched.

    Raises:
        ConfigError: no such folder, or not a supported model.
        SubspecError: the hub cannot be reached, refuses, or has no such repository or revision.
    """
    path, key = Path(config.path).expanduser(), wanted.key
    if path.is_dir():
        if config.revision is not None:
            raise ConfigError(f"{_revision(key)} is for hub ids; {key}={config.path} is a local folder")
        return Located(config.path, config.path, path)
    if path.is_file():
        raise ConfigError(f"{key}={config.path} is a file; pass {wanted.what}")
    if not HUB_ID.fullmatch(config.path):
        raise ConfigError(f"{key}={config.path}: no such folder, and not a hub id (ORG/NAME)")
    with quiet_libraries(bars=True):
        return _from_hub(config, note, wanted, weights)


def _from_hub(config: HubTargetConfig, note: Note, wanted: Wanted, weights: bool) -> Located:
    """The snapshot in the hub's cache, brought up to date where the hub can be reached."""
    held = cached(config, wanted, weights=weights)
    if held is not None and held.folder.name == config.revision:
        return held  # a commit never changes
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_problem(constants.ENDPOINT)
    trouble = SubspecError(f"the model hub is not used: {problem}")
    if problem is None:
        try:
            return _fetch(config, note, wanted, weights)
        except SubspecError:
            raise
        except Exception as error:
            trouble = explain_hub_error(error, config.path, config.revision, wanted.key)
            if held is None or isinstance(trouble, ConfigError):
                raise trouble from error
    if held is None:
        raise SubspecError(
            f"{wanted.key}={config.path}: no such folder, no complete copy in the hub cache, and {trouble}; "
            "check the network, or pass a local folder"
        )
    if not constants.HF_HUB_OFFLINE:  # set by the user
        note(f"{trouble}: using the cached {config.path}@{held.folder.name[:12]}")
    return held


def _fetch(config: HubTargetConfig, note: Note, wanted: Wanted, weights: bool) -> Located:
    """Bring the snapshot into the hub's cache: the configuration, then, if it is supported, the rest."""
    path, where = config.path, {"repo_id": config.path, "endpoint": constants.ENDPOINT}
    api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
    info = api.model_info(path, revision=config.revision, files_metadata=True, timeout=HTTP_S)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if CONFIG not in sizes:
        raise ConfigError(f"{path} has no {CONFIG}: pass {wanted.what}")

    def fetch(name: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(**where, revision=info.sha, filename=name)).parent

    folder = fetch(CONFIG)
    if wanted.family:
        check_folder_config(folder, path, wanted)
    if weights:
        main = main_file(sizes, path, wanted)
        names = [name for name in sizes if "/" not in name and any(fnmatch(name, text) for text in wanted.texts)]
        if wanted.tokenizer and not any(file in sizes for file in TOKENIZER_FILES):
            raise ConfigError(f"{path} holds no tokenizer; a target needs its own")
        names += [main] if main != INDEX else [main, *weight_files(fetch(INDEX))]
        if lacking := [name for name in names if name not in sizes]:
            raise ConfigError(f"{path} lacks {lacking[0]}, which its {INDEX} names; take another revision")
        needed = sum(sizes[name] for name in names if not (folder / name).exists())
        if needed:
            require_space(Path(constants.HF_HUB_CACHE), needed, f"fetching {path}", "HF_HUB_CACHE")
            note(f"fetching {path}@{info.sha[:12]} ({needed / 1e9:.2f} GB) into the hub cache")
        huggingface_hub.snapshot_download(**where, revision=info.sha, allow_patterns=names)
        remember_branch(folder, config.revision)
    return Located(path, f"{path}@{info.sha}", folder)


def cached(config: HubTargetConfig, wanted: Wanted, *, weights: bool = True) -> Located | None:
    """The snapshot in the hub's cache if everything that is wanted is there."""
    file = huggingface_hub.try_to_load_from_cache(config.path, CONFIG, revision=config.revision)
    if not isinstance(file, str):
        return None
    folder = Path(file).parent
    if weights:
        try:
            complete = all((folder / name).is_file() for name in weight_files(folder, wanted))
        except ConfigError:
            complete = False
        if not complete or (wanted.tokenizer and not has_tokenizer(folder)):
            return None
    return Located(config.path, f"{config.path}@{folder.name}", folder)


def remember_branch(folder: Path, revision: str | None) -> None:
    """Record in the hub's cache that the branch ``revision`` points to the commit of the snapshot ``folder``.

    Fetching by commit does not record it. It is written last, so that an interrupted update leaves the older, complete
    snapshot in use without a network.
    """
    if revision == folder.name:
        return
    ref = folder.parent.parent / "refs" / (revision or constants.DEFAULT_REVISION)
    ref.parent.mkdir(parents=True, exist_ok=True)
    partial = ref.with_name(f"{ref.name}.{os.getpid()}.part")
    partial.write_text(folder.name, encoding="utf-8")
    partial.replace(ref)


def explain_hub_error(error: Exception, path: str, revision: str | None, key: str) -> SubspecError:
    """One line for an exception of the hub client; ``key``: the configuration key that holds ``path``."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return SubspecError(
            f"{path} is gated: accept its terms on the model's page with your account, "
            "then set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{_revision(key)}={revision}: {path} has no such branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return ConfigError(
            f"{key}={path}: no such folder, and no such model on the hub for this account; "
            "check the spelling, or set HF_TOKEN if it is private"
        )
    if is_full_disk(error):
        return SubspecError(
            f"cannot fetch {path}: the disk of the hub cache is full; make room, or set HF_HUB_CACHE to a larger disk"
        )
    text = " ".join(str(error).split())[:300]
    return SubspecError(
        f"cannot fetch {path} from the hub ({type(error).__name__}: {text}); "
        "try again (complete files are kept), or pass a local folder"
    )


def _revision(key: str) -> str:
    """The configuration key of the revision beside that of a path."""
    return key.replace("path", "revision")
