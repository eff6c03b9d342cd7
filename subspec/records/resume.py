"""``run_dir=FOLDER resume=true`` is all it takes: the overrides a run was started with are kept in its folder.

They are written by the run itself, once it owns the folder (Hydra would write them before, also for a run that is
then refused), and replaced as a whole, so that a kill leaves the old or the new ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from subspec.errors import ConfigError
from subspec.utils.files import write_atomic, write_error

OVERRIDES = "overrides.yaml"


def is_resumed(given: Mapping[str, str]) -> bool:
    """Whether the command line asks to continue a run. ``given``: values by key."""
    return given.get("resume", "").lower() in ("true", "yes", "on", "1")


def with_stored_overrides(
    overrides: Sequence[str], given: Mapping[str, str], *, must_exist: bool = True
) -> list[str]:
    """The overrides of a resumed run, completed with those stored in its folder.

    What is said on the new command line wins; everything else is as it was. Without ``resume=true`` the overrides
    come back unchanged.

    Args:
        overrides: of the command line.
        given: their values by key.
        must_exist: whether a folder without a run, and no word about the run to start there, is refused.

    Raises:
        ConfigError: ``resume=true`` without a folder, or with one that tells nothing about the run to continue.
    """
    if not is_resumed(given):
        return list(overrides)
    if not given.get("run_dir"):
        raise ConfigError("resume=true needs the folder to continue: run_dir=FOLDER")
    file = Path(given["run_dir"]) / OVERRIDES
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist and set(given) <= {"resume", "run_dir"}:
            raise ConfigError(
                f"resume=true, but run_dir={given['run_dir']} holds no run to continue: correct the folder, "
                "or leave resume out to start a run there"
            ) from None
        return list(overrides)  # a batch script that always says resume=true, in its first session
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(file) from error
    if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
        raise _unreadable(file)
    return [*(text for text in stored if _key(text) not in given), *overrides]


def store_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Keep what :func:`with_stored_overrides` will need."""
    kept = [text for text in overrides if _key(text) not in ("resume", "run_dir")]
    try:
        write_atomic(folder / OVERRIDES, yaml.safe_dump(kept, width=1000, allow_unicode=True).encode("utf-8"))
    except OSError as error:
        raise write_error(error, folder / OVERRIDES, "choose another folder with run_dir=") from error


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _unreadable(file: Path) -> ConfigError:
    return ConfigError(f"{file} cannot be read: mend it, or delete it and give the run's overrides again")
