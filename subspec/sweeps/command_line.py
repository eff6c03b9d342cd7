"""Translation of the command line of a sweep into Hydra's keys."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from subspec.errors import ConfigError
from subspec.utils.paths import conf_dir

SWEEP_DIR = "sweep_dir"
HYDRA_SWEEP_DIR = "hydra.sweep.dir"


def is_sweep(overrides: Sequence[str], config_dir: str | None = None) -> bool:
    """Whether the overrides are a sweep without ``-m``: a search, or a table experiment.

    Args:
        config_dir: value of ``--config-dir``, searched first.
    """
    if "hydra.mode=RUN" in overrides:  # a job of a sweep
        return False
    values = dict(text.partition("=")[::2] for text in overrides)
    if values.get("hparams_search") not in (None, "", "null"):
        return True
    return any(is_table(name, config_dir) for name in values.get("experiment", "").split(","))


def is_table(experiment: str, config_dir: str | None = None) -> bool:
    """Whether an experiment file lists rows (``hydra.sweeper.params``)."""
    for folder in filter(None, [config_dir and Path(config_dir), conf_dir()]):
        file = Path(folder) / "experiment" / f"{experiment}.yaml"
        if not experiment or not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            return bool(content["hydra"]["sweeper"]["params"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            return False  # Hydra reports the error
    return False


def place(overrides: Sequence[str], resume: bool) -> list[str]:
    """The overrides of a sweep, with its folder if that is known.

    ``sweep_dir=`` becomes Hydra's key. Without a folder, an unfinished sweep of the same overrides is continued.

    Raises:
        ConfigError: ``resume=true`` without such a sweep.
    """
    given = _for_jobs_only([re.sub(f"^{SWEEP_DIR}=", f"{HYDRA_SWEEP_DIR}=", text) for text in overrides])
    if any(text.startswith(f"{HYDRA_SWEEP_DIR}=") for text in given):
        return given
    from subspec.records.sweep_folder import unfinished_sweep

    # The manifest holds the overrides that Hydra's sweepers see: those of the run.
    command = [text for text in given if not text.startswith(("resume=", "hydra.", "hydra/", "+hydra"))]
    found = unfinished_sweep(command)
    if found is not None:
        print(f"continuing the sweep in {found}, which was not finished (sweep_dir=FOLDER starts another)")
        return [*given, f"{HYDRA_SWEEP_DIR}={found}"]
    if resume:
        raise ConfigError(
            "resume=true, but no unfinished sweep of the same overrides lies in multirun/: give its folder with "
            "sweep_dir=FOLDER, or leave resume out"
        )
    return given


def _for_jobs_only(overrides: Sequence[str]) -> list[str]:
    """Turn single values of a grid into choices of one, which Hydra leaves out of the sweep's own configuration.

    That configuration holds no row and no swept group. It would refuse ``offload.vram_gib=8`` beside ``experiment=a,b``
    as a key of the default ``offload=none``, although every job has it.
    """
    if any(text.startswith(("hparams_search=", "hydra/sweeper=")) for text in overrides):
        return list(overrides)  # a search keeps single values
    reader = OverridesParser.create()
    texts = []
    for text in overrides:
        key, _, value = text.partition("=")
        kept = key in ("experiment", "resume") or key.lstrip("+").startswith(("hydra.", "hydra/")) or not value
        choice = f"{key}=choice({value})"
        try:
            (plain,) = reader.parse_overrides([text])
            if not kept and not plain.is_sweep_override():
                reader.parse_overrides([choice])
                text = choice
        except HydraException:
            pass  # Hydra reports the error of the original
        texts.append(text)
    return texts
