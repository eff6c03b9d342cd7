"""One-line messages for exceptions of Hydra and OmegaConf, with the key and its valid values."""

import dataclasses
import re
import shlex
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from subspec.config.help_text import GROUPS, kinds, options, suggestion, unknown_option
from subspec.config.schema import Config
from subspec.errors import causes
from subspec.utils.paths import conf_dir

CONFIG_EXCEPTIONS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""Exceptions of composing or reading a wrong configuration."""


def explain(error: BaseException) -> str:
    """The message of ``error`` in one line."""
    chain = causes(error)
    override = _override_in(chain)
    for cause in chain:
        if isinstance(cause, MissingConfigException) and "/" in (cause.missing_cfg_file or ""):
            return _unknown_option(cause)
        if isinstance(cause, OverrideParseException):
            return _unreadable_override(cause.override)
        if isinstance(cause, yaml.YAMLError):
            return _broken_yaml(cause)
        if isinstance(cause, OmegaConfBaseException):
            kind = type(cause).__name__
            if override is not None and override.startswith("~"):
                return f"{override}: a key cannot be removed; give it a value, {override[1:]}=VALUE"
            if kind in ("ConfigKeyError", "ConfigAttributeError"):
                return _unknown_key_of(cause, override)
            if kind == "ValidationError":
                return _wrong_value(cause, override)
            if kind == "MissingMandatoryValue":
                return f"{cause.full_key} is not set: give it as {cause.full_key}=VALUE"
            if cause.full_key:  # mostly interpolations
                return f"{cause.full_key}: {_first_line(cause)}"
    text = _first_line(error)
    if "Could not override" in text:
        return _unknown_group(text)
    if ambiguous := re.search(r"Ambiguous value for argument '(.+)'", text):
        return f"{ambiguous[1]}: several values make a sweep: add -m (or write a list as KEY=[A,B])"
    return text


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _override_in(chain: list[BaseException]) -> str | None:
    """The ``key`` or ``key=value`` that Hydra names in its message."""
    for error in chain:
        found = re.search(r"(?:Could not override '([^']+)'|Error merging override (.+))", str(error))
        if found:
            return (found[1] or found[2]).strip()
    return None


_PACKAGE_HINT = " (in a file of your own: does it begin with `# @package _global_`?)"


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    if group == "hydra/launcher" and option in ("submitit_slurm", "submitit_local", "ray"):
        return f"{group}: needs packages that are not here: pip install 'subspec[sweep]' (in a checkout: '.[sweep]')"
    known = [name for name, _ in options(conf_dir(), group)] or sorted(error.options or [])
    return unknown_option(group, option, known)


def _unreadable_override(text: str) -> str:
    if "=" not in text:
        return f"{text}: give it a value, {text}=VALUE"
    key, _, value = text.partition("=")
    again = shlex.quote(f'{key}="{value}"')
    return f"{text}: not readable as KEY=VALUE; a value with special characters is quoted twice, as in {again}"


def _broken_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"a configuration file is not valid YAML: {_first_line(error)}; correct it"
    problem = getattr(error, "problem", None) or _first_line(error)
    return f"{mark.name}, line {mark.line + 1}: not valid YAML ({problem}); correct the file"


def unknown_key(key: str, node: type) -> str:
    """Message about a dotted key that the schema ``node`` of its parent does not have."""
    known = sorted(f.name for f in dataclasses.fields(node))
    parent, _, last = key.rpartition(".")
    if not parent:
        hint = _elsewhere(key) or suggestion(key, known)
        return f"{key}: no such key or group{hint}" + ("" if hint else f"; a run has {', '.join(known)}")
    hint = suggestion(last, known)
    if not hint and parent in GROUPS:
        if owners := _options_with(parent, last):
            return f"{key}: the chosen {parent} has no such key; it is a key of {' and '.join(owners)}"
        hint = _elsewhere(last)
    return f"{key}: no such key{hint}; {parent} has {', '.join(known)}"


def _elsewhere(key: str) -> str:
    found = [f"{group}.{key}" for group in GROUPS if _options_with(group, key)]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _options_with(group: str, key: str) -> list[str]:
    """``GROUP=OPTION`` of every kind of option whose schema has ``key``."""
    return [
        f"{group}={option}"
        for option, schema in kinds(conf_dir(), group).items()
        if key in {field.name for field in dataclasses.fields(schema)}
    ]


def _unknown_key_of(error: OmegaConfBaseException, override: str | None) -> str:
    missing = str(error.full_key or error.key)
    key = override.partition("=")[0].lstrip("+") if override else missing
    if key.startswith(f"{missing}."):  # quatn.bits: the missing key is quatn
        key = missing
    node: Any = error.object_type if dataclasses.is_dataclass(error.object_type) else Config
    text = unknown_key(key, node)
    return text + (_PACKAGE_HINT if override is None and node is Config else "")


def _unknown_group(text: str) -> str:
    key = re.search(r"Could not override '([^']+)'", text)
    name = key[1] if key else text
    return f"{name}: no such group{suggestion(name, list(GROUPS))}; the groups are {', '.join(GROUPS)}"


_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def _wrong_value(error: OmegaConfBaseException, override: str | None) -> str:
    key = override or str(error.full_key)
    kind = _expected_type(error)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{key}: choose one of {', '.join(member.name for member in kind)}"
    if get_origin(kind) is list:
        return f"{key}: expected a list, [A,B]"
    if kind in _TYPE_NAMES:
        hint = _PACKAGE_HINT if override is None and "." not in key else ""
        return f"{key}: expected {_TYPE_NAMES[kind]}{hint}"
    return f"{key}: {_first_line(error)}"


def _expected_type(error: OmegaConfBaseException) -> Any:
    """Type that the schema declares for the offending key, or None."""
    parent = error.parent_node
    owner = getattr(getattr(parent, "_metadata", None), "object_type", None)
    name = str(error.key if error.key is not None else error.full_key).rpartition(".")[2]
    if not dataclasses.is_dataclass(owner) or name not in get_type_hints(owner):
        return None
    declared = get_type_hints(owner)[name]
    if get_origin(declared) is list:
        return declared
    return next((t for t in get_args(declared) if t is not type(None)), declared)
