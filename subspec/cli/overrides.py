"""Preparation of the command line for Hydra: order, quoting of paths, error messages, resumed runs.

Hydra's own messages name neither the argument nor a remedy, or print a page of usage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from subspec.config.help_text import GROUPS, options
from subspec.errors import ConfigError
from subspec.records.resume import is_resumed, with_stored_overrides
from subspec.sweeps.command_line import SWEEP_DIR, is_sweep, place
from subspec.utils.paths import conf_dir

PATH_KEYS = ("run_dir", "sweep_dir", "hydra.sweep.dir", "baseline", "target.path", "benchmark.path")
"""Keys whose values may hold any character; Hydra's grammar accepts only some unquoted."""


def prepare(arguments: Sequence[str]) -> list[str]:
    """The arguments for Hydra: flags first, then overrides.

    Raises:
        ConfigError: an unknown flag, or contradictory arguments.
        OverrideParseException: an argument that is no override.
    """
    parser = get_args_parser()
    parser.error = _refuse  # argparse would print its usage and exit
    said = parser.parse_intermixed_args(list(arguments))
    flags = [argument for argument in arguments if argument not in said.overrides]
    shows = said.cfg is not None or said.info is not None
    if sum(map(bool, (said.run, said.multirun, said.cfg, said.info, said.shell_completion))) > 1:
        _refuse("--run and -m run, --cfg and --info show: give one of them")
    if said.resolve and not said.cfg:
        _refuse("--resolve is for --cfg: add --cfg job, or leave it out")
    # Hydra would take the override behind a bare --info for its value.
    flags = [f"--info={said.info}" if flag in ("--info", "-i") else flag for flag in flags]
    sweep = said.multirun or (not shows and is_sweep(said.overrides, said.config_dir))
    overrides: dict[str, Override] = {}
    for given_text in said.overrides:
        text, parsed = _checked(given_text, sweep)
        overrides.pop(text, None)  # a repeated override takes the later place: a=2 a=1 a=2
        overrides[text] = parsed
    given = {parsed.key_or_group: _text(parsed) for parsed in overrides.values()}
    if sweep:
        if "run_dir" in given:
            raise ConfigError("run_dir= names the folder of one run: a sweep takes sweep_dir=FOLDER")
        return [*flags, *([] if said.multirun else ["-m"]), *place(list(overrides), is_resumed(given))]
    if SWEEP_DIR in given and shows:
        overrides = {text: parsed for text, parsed in overrides.items() if parsed.key_or_group != SWEEP_DIR}
    elif SWEEP_DIR in given:
        raise ConfigError("sweep_dir= names the folder of a sweep: add -m, or give run_dir=FOLDER")
    return [*flags, *with_stored_overrides(list(overrides), given, must_exist=not shows)]


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; `python -m subspec.run --help` shows what there is")


def _checked(text: str, sweep: bool) -> tuple[str, Override]:
    """An override in Hydra's grammar, and its parsed form."""
    key, equals, value = text.partition("=")
    if not key.strip():
        raise ConfigError(f"{text}: there is no key before the equals sign; give KEY=VALUE")
    if key in ("run_dir", SWEEP_DIR) and value.startswith("~"):
        # Shells do not expand ~ after an equals sign.
        text = f"{key}={Path(value).expanduser()}"
    reader = OverridesParser.create()
    try:
        (parsed,) = reader.parse_overrides([text])
    except OverrideParseException:
        if key not in PATH_KEYS or not equals:
            raise
        parsed = None
    if parsed is None or (key in PATH_KEYS and parsed.is_sweep_override() and not sweep):
        escaped = text.partition("=")[2].replace('"', '\\"')
        text = f'{key}="{escaped}"'
        (parsed,) = reader.parse_overrides([text])
    if key in GROUPS and not parsed.is_sweep_override() and not isinstance(parsed.value(), str | list | dict):
        known = ", ".join(name for name, _ in options(conf_dir(), key))
        raise ConfigError(f"{text}: choose one of {known or '(there is none yet)'}, or leave {key} out")
    return text, parsed


def _text(parsed: Override) -> str:
    return "" if parsed.is_sweep_override() or parsed.value() is None else str(parsed.value())
