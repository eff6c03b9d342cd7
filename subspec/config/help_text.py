"""Text of ``python -m subspec.run --help [GROUP|GROUP=OPTION|KEY]``, made from the config files.

The comment at the head of an option's YAML file describes the option, the comment beside a key describes the key, and
comments in ``config.yaml`` describe top-level keys.
"""

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from subspec.config.schema import SCHEMAS
from subspec.errors import ConfigError

GROUPS = {
    "target": "the model whose output is reproduced exactly",
    "draft": "the draft that proposes tokens",
    "quant": "how a draft's Linear layers are quantized (the substitute's; a small model's with draft.quantize)",
    "tree": "the shape of the draft tree",
    "decoding": "greedy or sampling, and the lengths",
    "offload": "where the target's weights live",
    "benchmark": "the prompts",
    "logger": "destination of the series besides the run folder",
    "experiment": "a file that sets several groups at once, or a table of such files",
    "hparams_search": "a search: Optuna proposes values, a run measures each, a table ranks them",
}
"""Config groups with their descriptions."""

HEADER = """\
SubSpec: lossless speculative decoding of models that do not fit into GPU memory.

usage: python -m subspec.run [GROUP=OPTION ...] [KEY=VALUE ...] [-m]

  python -m subspec.run                                   the embedded default model on any machine
  python -m subspec.run draft=none benchmark=mt_bench     plain decoding, the baseline
  python -m subspec.run target=hub target.path=ORG/NAME   any Llama, Qwen2, Qwen3 or Mistral checkpoint
  python -m subspec.run -m tree.depth=8,16 quant.bits=4,3 one run for every combination
  python -m subspec.run run_dir=FOLDER resume=true        continue an interrupted run
  python -m subspec.run -m ... sweep_dir=FOLDER           a sweep in this folder: runs what is missing there
"""

FOOTER = """\
The keys of a group or an option:   python -m subspec.run --help draft, --help draft=subspec, --help tree.depth
The keys of a composed run:         python -m subspec.run --cfg job
Your own machine's settings:        conf/local/default.yaml (not tracked by git)
The traceback of an expected error: SUBSPEC_DEBUG=1
"""


def description(file: Path) -> str:
    """Comment at the head of a YAML file as one line ("" without one)."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def options(conf: Path, group: str) -> list[tuple[str, str]]:
    """(option, description) of a group, nested folders as ``folder/name``."""
    root = conf / group
    files = sorted(root.rglob("*.yaml")) if root.is_dir() else []
    return [(file.relative_to(root).with_suffix("").as_posix(), description(file)) for file in files]


def defaults(conf: Path) -> dict[str, str]:
    """Default option of every group."""
    text = (conf / "config.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^ {2}- (\w+): (\w+)", text, re.MULTILINE))


def top_level_keys(conf: Path) -> list[tuple[str, str]]:
    """(key: default, description) of the keys outside groups."""
    text = (conf / "config.yaml").read_text(encoding="utf-8")
    return re.findall(r"^(\w+: \S+)\s+# (.+)$", text, re.MULTILINE)


def help_text(conf: Path) -> str:
    """The text of ``--help``."""
    chosen = defaults(conf)
    lines = [HEADER, "Groups (the default is marked with *):", ""]
    for group, meaning in GROUPS.items():
        lines.append(f"{group}: {meaning}")
        for name, text in options(conf, group):
            mark = "*" if chosen.get(group) == name else " "
            lines += _entry(f"{mark} {name}", text, 2, 21)
        lines.append("")
    lines.append("Keys of the run itself:")
    for key, text in top_level_keys(conf):
        lines += _entry(key, text, 4)
    lines += ["", FOOTER.rstrip()]
    return "\n".join(lines)


def help_on(conf: Path, words: Sequence[str]) -> str:
    """The text of ``--help WORD ...``. A word is a group, ``GROUP=OPTION``, a key, or an override of one.

    ConfigError if there is no such group, option or key.
    """
    return "\n".join(line for word in words for line in _help_on(conf, word))


def _help_on(conf: Path, word: str) -> Iterator[str]:
    name, _, chosen = word.lstrip("+~").partition("=")
    group, _, key = name.partition(".")
    if group not in GROUPS:
        found = [entry for entry in top_level_keys(conf) if entry[0].partition(":")[0] == name]
        if not found:
            known = [*GROUPS, *(entry.partition(":")[0] for entry, _ in top_level_keys(conf))]
            raise ConfigError(f"--help {name}: no such group or key{suggestion(name, known)}; see --help")
        yield from _entry(*found[0], indent=0)
        return
    known = dict(options(conf, group))
    wanted = chosen.split(",") if chosen and not key else list(known)
    for option in wanted:
        if option not in known:
            raise ConfigError(unknown_option(group, option, list(known)))
    if not chosen and not key:
        yield from (f"{group}: {GROUPS[group]}", "")
    shown = False
    for option in wanted:
        rows = [row for row in option_keys(conf, group, option) if key in ("", row[0].partition("=")[0])]
        if key and not rows:
            continue
        shown = True
        mark = " (default)" if defaults(conf).get(group) == option else ""
        yield from textwrap.wrap(f"{group}={option}{mark}: {known[option]}", 110, subsequent_indent="    ")
        for entry, text in rows:
            yield from _entry(f"{group}.{entry}", text, indent=4)
        if group in FILES and chosen:
            yield from ("", (conf / group / f"{option}.yaml").read_text(encoding="utf-8"))
    if key and not shown:
        raise ConfigError(f"{name}: no option of {group} has this key; `--help {group}` lists them")


FILES = ("experiment", "hparams_search")
"""Groups whose options set keys of the other groups."""


def option_keys(conf: Path, group: str, option: str) -> list[tuple[str, str]]:
    """(key=default, description) of the keys of an option: those of its file, then the others of its schema."""
    if group in FILES:
        return []
    given = _yaml_keys(conf / group / f"{option}.yaml")
    schema = schema_of(conf, group, option)
    plain = {} if schema is None else OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    declared = dict(_default_values(plain))
    others: dict[str, str] = {}  # options of the same schema first
    for name in sorted(dict(options(conf, group)), key=lambda one: schema_of(conf, group, one) is not schema):
        for key, (_, text) in _yaml_keys(conf / group / f"{name}.yaml").items():
            others[key] = others.get(key) or text
    rows = []
    for key in dict.fromkeys([*given, *declared]):
        value, text = given.get(key, (declared.get(key, ""), ""))
        if key != "name" and not (key in given and value == "" and any(k.startswith(f"{key}.") for k in given)):
            rows.append((f"{key}={value}", text or others.get(key) or _documented(schema, key)))
    return rows


def _documented(schema: type | None, key: str) -> str:
    """What the schema says of a key: the sentences that name it in double backquotes, else its enum's choices."""
    if schema is None:
        return ""
    first, _, rest = key.partition(".")
    kind = get_type_hints(schema)[first]
    if rest:
        return _documented(kind, rest) or _sentences(kind)[0].replace("``", "")
    for base in schema.__mro__:
        if found := [text for text in _sentences(base) if f"``{key}``" in text]:
            return " ".join(found).removeprefix(f"``{key}``: ").replace("``", "")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"{' | '.join(kind.__members__)}: {_sentences(kind)[0]}"
    return ""


def _sentences(documented: type) -> list[str]:
    return re.split(r"(?<=\.) ", " ".join((documented.__doc__ or "").split()).replace("``auto``", "auto"))


def schema_of(conf: Path, group: str, option: str) -> type | None:
    """The dataclass of an option; None: its file names none."""
    text = (conf / group / f"{option}.yaml").read_text(encoding="utf-8")
    found = re.search(r"/schema/(\w+/\w+)@_here_", text)
    return SCHEMAS[found[1]] if found else None


def kinds(conf: Path, group: str) -> dict[str, type]:
    """One option of every schema of a group, with the schema: the option of the schema's own name, else the first."""
    found: dict[type, str] = {}
    for option, _ in options(conf, group):
        schema = None if group in FILES else schema_of(conf, group, option)
        if schema is not None and (schema not in found or SCHEMAS.get(f"{group}/{option}") is schema):
            found[schema] = option
    return {option: schema for schema, option in found.items()}


def _yaml_keys(file: Path) -> dict[str, tuple[str, str]]:
    """(value, comment) by dotted key of an option's file."""
    found: dict[str, tuple[str, str]] = {}
    parent = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+): *(.*?) *(?:# (.*))?$", line)
        if not match or match[2] == "defaults":
            continue
        indent, key, value, text = match[1], match[2], match[3], match[4] or ""
        parent = parent if indent else key
        rule = re.fullmatch(r"\$\{streamed_tree:\w+,(\w+)\}", value)
        found[f"{parent}.{key}" if indent else key] = (rule[1] if rule else value, text)
    return found


def _default_values(values: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as YAML in one line) of a schema's default values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _default_values(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}", yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _entry(key: str, text: str, indent: int, column: int = 28) -> list[str]:
    first = f"{' ' * indent}{key:<{column - 1}} "
    wrapped = textwrap.wrap(text, 110, initial_indent=first, subsequent_indent=" " * (indent + column))
    return wrapped or [first.rstrip()]


def unknown_option(group: str, option: str, known: Sequence[str]) -> str:
    """Message about an option that a group does not have."""
    listed = f"`--help {group}` lists them" if len(known) > 20 else f"{group} has {', '.join(known) or 'none'}"
    return f"{group}={option}: no such option{suggestion(option, known)}; {listed}"


def suggestion(word: str, known: Sequence[str]) -> str:
    """``" (did you mean X?)"``; empty without a similar word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""
