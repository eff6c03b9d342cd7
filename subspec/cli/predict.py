"""``python -m subspec.predict``: the command line of speed predictions."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from subspec.config.guard import guarded
from subspec.errors import ConfigError

HELP = """\
What would I get? Tokens per second of a target on a card: plain streaming, and SubSpec over tree depths.

usage: python -m subspec.predict card=NAME tau=NUMBER [KEY=VALUE ...] [--from RUN] [--plot FILE] [--json FILE]

  python -m subspec.predict target=qwen2_5_7b offload.vram_gib=8 card=rtx_4090 tau=26
  python -m subspec.predict target=planted_qwen2_5_32b card=rtx_3090 --from outputs/mine
  python -m subspec.predict target=hub target.path=FOLDER card=auto tau=12 tau_depth=32    this machine's own GPU

Nothing is loaded: of a target only its config.json is read.

  card=NAME          whose memory, link and bandwidth (RTX 4090, A100 40GB, ...); auto: measure this machine's GPU
  tau=NUMBER         tokens per target pass, as some run measured it with a tree of tau_depth levels
  tau_depth=N        default: tree.depth; of an adaptive tree its mean depth
  passes=NUMBER      with draft.proposer: passes of the substitute per drafted level, as some run measured them
  --from RUN         instead of tau and passes: acceptance by depth from a run's folder (also the time of a draft
                     level, where the run was on the same card with the same target, draft, bits and tree.width)
  depths=[8,16,32]   tree depths to predict beside tree.depth
  memory_gb_per_s=X  device-memory bandwidth, GB/s, instead of the card's (offload.link_gb_per_s=X: the link's)
  level_ms=X         milliseconds of a draft level, where you have measured one (with draft.proposer: of a pass)
  proposals_ms=X     with draft.proposer: milliseconds of its guesses for a pass (default: its weights are read)
  --plot FILE        a picture (.png, .svg, .pdf)
  --json FILE        everything, for a program

Everything else is as for `python -m subspec.run` (its --help lists the groups). Defaults here: draft=subspec,
quant=hqq, offload=stream with all of the card's memory.
"""

NUMBERS = ("tau", "tau_depth", "passes", "memory_gb_per_s", "level_ms", "proposals_ms")
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class PredictCommand:
    """The parsed command line: keys of this command, of them the positive ``numbers``, overrides, and files."""

    card: str | None
    depths: tuple[int, ...]
    numbers: dict[str, float]
    overrides: list[str]
    source: Path | None
    plot: Path | None
    json: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `python -m subspec.predict --help` shows what there is")


def parse(arguments: Sequence[str]) -> PredictCommand:
    """Parse the command line.

    Raises:
        ConfigError: it is wrong.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_intermixed_args(list(arguments))
    own: dict[str, str] = {}
    rest: list[str] = []
    for text in parsed.overrides:
        key, equals, value = text.partition("=")
        if key in ("card", "depths", *NUMBERS) and equals:
            own[key] = value
        else:
            rest.append(text)
    if parsed.plot is not None and parsed.plot.suffix not in PICTURES:
        raise ConfigError(f"--plot {parsed.plot}: the name must end in {', '.join(PICTURES)}")
    depths = _depths(own["depths"]) if "depths" in own else ()
    numbers = {key: _positive(key, own[key]) for key in NUMBERS if key in own}
    return PredictCommand(own.get("card"), depths, numbers, rest, parsed.source, parsed.plot, parsed.json)


def _positive(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key}={text}: expected a positive number")
    return value


def _depths(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        depths = (0,)
    if min(depths) < 1:
        raise ConfigError(f"depths={text}: expected numbers of levels, as in depths=[8,16,32]")
    return depths


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the module and of the console script ``subspec-predict``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        sys.exit(0)
    sys.exit(guarded(lambda: _main(arguments)))


def _main(arguments: Sequence[str]) -> None:
    command = parse(arguments)
    # Imported here, what takes seconds last: the help and a wrong command line need none of it.
    from subspec.cli.predict_inputs import predict_command
    from subspec.utils.files import write_json, writing
    from subspec.utils.terminal import Terminal

    console = Terminal()
    prediction, title, planted, level_source = predict_command(command, console.note)
    from subspec.planning.plan_table import plan_table
    from subspec.planning.predict_table import depth_table, plot, remarks

    console.rich.print(plan_table(prediction.plan))
    console.rich.print("predicted speed of decoding over tree depths", style="bold")
    console.rich.print(depth_table(prediction))
    for line in remarks(prediction, planted, level_source):
        console.note(line)
    for file, write in (
        (command.plot, lambda file: plot(prediction, title, planted, file)),
        (command.json, lambda file: write_json(file, prediction.to_dict() | {"planted": planted})),
    ):
        if file is None:
            continue
        with writing(file, "choose another file"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file)
        console.note(f"written: {file}")
