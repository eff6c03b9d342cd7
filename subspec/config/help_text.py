"""Text of ``python -m subspec.run --help``, made from the config files.

The comment at the head of an option's YAML file describes the option; comments in ``config.yaml`` describe top-level
keys.
"""

import re
import textwrap
from pathlib import Path

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
            lines += textwrap.wrap(
                text, 110, initial_indent=f"  {mark} {name:<18} ", subsequent_indent=" " * 23
            ) or [f"  {mark} {name}"]
        lines.append("")
    lines.append("Keys of the run itself:")
    for key, text in top_level_keys(conf):
        lines += textwrap.wrap(text, 110, initial_indent=f"    {key:<24} ", subsequent_indent=" " * 29)
    lines += ["", FOOTER]
    return "\n".join(lines)
