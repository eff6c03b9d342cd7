"""Overrides of a run, stored in its folder, so that ``run_dir=FOLDER resume=true`` continues it.

The run writes them after it has locked the folder. Hydra would write them earlier, also for a run that is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from subspec.errors import ConfigError
from subspec.records.run_files import ELSEWHERE, OVERRIDES
from subspec.utils.files import write_atomic, writing


def is_resumed(given: Mapping[str, str]) -> bool:
    """Whether ``resume`` is true. ``given``: values of the command line by key."""
    return given.get("resume", "").lower() in ("true", "yes", "on", "1")


def with_stored_overrides(overrides: Sequence[str], given: Mapping[str, str], *, must_exist: bool = True) -> list[str]:
    """The overrides of the command line, with ``resume=true`` completed by those stored in its folder.

    Args:
        given: values of the overrides by key.
        must_exist: refuse a folder without a run if no other override says which run to start there.

    Raises:
        ConfigError: ``resume=true`` without a folder, or with one that does not tell which run to continue.
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
        return list(overrides)  # first session of a batch script that always passes resume=true
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(file) from error
    if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
        raise _unreadable(file)
    return [*(text for text in stored if _key(text) not in given), *overrides]


def store_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Store the overrides for :func:`with_stored_overrides`."""
    kept = [text for text in overrides if _key(text) not in ("resume", "run_dir")]
    with writing(folder / OVERRIDES, ELSEWHERE):
        write_atomic(folder / OVERRIDES, yaml.safe_dump(kept, width=1000, allow_unicode=True).encode("utf-8"))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _unreadable(file: Path) -> ConfigError:
    return ConfigError(f"{file} cannot be read: mend it, or delete it and give the run's overrides again")
