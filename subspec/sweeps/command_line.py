"""What the command line says about sweeps, put into Hydra's words before Hydra reads it."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from subspec.errors import ConfigError
from subspec.records.sweep_folder import unfinished_sweep
from subspec.utils.paths import conf_dir

SWEEP_DIR = "sweep_dir"
HYDRA_SWEEP_DIR = "hydra.sweep.dir"


def is_sweep(overrides: Sequence[str], config_dir: str | None = None) -> bool:
    """Whether the overrides ask for many runs without ``-m``: a search, or a table experiment.

    Args:
        config_dir: of ``--config-dir``, searched first.

    Raises:
        ConfigError: a table in a list of experiments.
    """
    if "hydra.mode=RUN" in overrides:  # a job of the sweep itself
        return False
    values = dict(text.partition("=")[::2] for text in overrides)
    if values.get("hparams_search") not in (None, "", "null"):
        return True
    names = values.get("experiment", "").split(",")
    tables = [name for name in names if is_table(name, config_dir)]
    if tables and len(names) > 1:
        raise ConfigError(f"experiment={tables[0]} is a table, a sweep of its own: give one table at a time")
    return bool(tables)


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
            return False  # Hydra says what is wrong with it
    return False


def place(overrides: Sequence[str], resume: bool) -> list[str]:
    """The overrides of a sweep, its folder among them where it is known already.

    ``sweep_dir=`` becomes Hydra's key. Without either, a sweep of the same overrides that was stopped before it was
    finished is continued.

    Raises:
        ConfigError: ``resume=true``, and there is no such sweep.
    """
    given = _for_jobs_only([_as_hydra_key(text) for text in overrides])
    if any(text.startswith(f"{HYDRA_SWEEP_DIR}=") for text in given):
        return given
    # Hydra's sweepers see the overrides of the run only, and the manifest holds those.
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


def _as_hydra_key(text: str) -> str:
    key, equals, value = text.partition("=")
    return f"{HYDRA_SWEEP_DIR}={value}" if key == SWEEP_DIR and equals else text


def _for_jobs_only(overrides: Sequence[str]) -> list[str]:
    """Single values of a grid as choices of one, which Hydra leaves out of the configuration of the sweep itself.

    That one has no row and no swept group in it: ``offload.vram_gib=8`` beside ``experiment=a,b`` would be refused as
    a key of the default ``offload=none``, though every job has it.
    """
    if any(text.startswith(("hparams_search=", "hydra/sweeper=")) for text in overrides):
        return list(overrides)  # a search takes single values as they are
    reader = OverridesParser.create()
    texts = []
    for text in overrides:
        key, _, value = text.partition("=")
        kept = (
            key in ("experiment", "resume") or key.lstrip("+").startswith(("hydra.", "hydra/")) or not value
        )
        choice = f"{key}=choice({value})"
        try:
            (plain,) = reader.parse_overrides([text])
            if not kept and not plain.is_sweep_override():
                reader.parse_overrides([choice])
                text = choice
        except HydraException:
            pass  # Hydra says what is wrong with the original
        texts.append(text)
    return texts
