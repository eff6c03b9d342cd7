"""``python -m subspec.predict``: what would I get? Speeds from a card, a target and a measured tau."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from subspec.cli.guard import guarded
from subspec.errors import ConfigError

if TYPE_CHECKING:
    from subspec.cli.predict_measured import Measured
    from subspec.config.schema import Config
    from subspec.planning.acceptance import Acceptance
    from subspec.planning.gpu_specs import Card
    from subspec.planning.predict_timing import Machine

HELP = """\
What would I get? Tokens per second of a target on a card: plain streaming, and SubSpec over tree depths.

usage: python -m subspec.predict card=NAME tau=NUMBER [KEY=VALUE ...] [--from RUN] [--plot FILE] [--json FILE]

  python -m subspec.predict target=qwen2_5_7b offload.vram_gib=8 card=rtx_4090 tau=26
  python -m subspec.predict target=planted_qwen2_5_32b card=rtx_3090 --from outputs/mine
  python -m subspec.predict target=hub target.path=FOLDER card=auto tau=12 tau_depth=32    this machine's own GPU

Nothing is loaded: of a target only its config.json is read.

  card=NAME          whose memory, link and bandwidth (RTX 4090, A100 40GB, ...); auto: measure this machine's GPU
  tau=NUMBER         tokens per target pass, as some run measured it with a tree of tau_depth levels
  tau_depth=N        default: tree.depth
  --from RUN         instead of tau: acceptance by depth from a run's folder (also the time of a draft level, where
                     the run was on the same card with the same target, draft, bits and tree.width)
  depths=[8,16,32]   tree depths to predict beside tree.depth
  memory_gb_per_s=X  device-memory bandwidth, GB/s, instead of the card's (offload.link_gb_per_s=X: the link's)
  level_ms=X         milliseconds of a draft level, where you have measured one
  --plot FILE        a picture (.png, .svg, .pdf)
  --json FILE        everything, for a program

Everything else is as for `python -m subspec.run` (its --help lists the groups). Defaults here: draft=subspec,
quant=hqq, offload=stream with all of the card's memory.
"""

NUMBERS = ("tau", "tau_depth", "memory_gb_per_s", "level_ms")
OWN = ("card", "depths", *NUMBERS)
DEFAULTS = {"draft": "subspec", "quant": "hqq", "offload": "stream", "logger": "none"}
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Asked:
    """The command line, taken apart."""

    own: dict[str, str]
    overrides: list[str]
    source: Path | None
    plot: Path | None
    json: Path | None

    def number(self, key: str) -> float | None:
        """A key of ours as a positive number; None when it was not given.

        Raises:
            ConfigError: it is none.
        """
        text = self.own.get(key)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf"):
            raise ConfigError(f"{key}={text}: expected a positive number")
        return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `python -m subspec.predict --help` shows what there is")


def parse(arguments: Sequence[str]) -> Asked:
    """Take the command line apart.

    Raises:
        ConfigError: it is wrong.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--from", dest="source", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    said = parser.parse_intermixed_args(list(arguments))
    own, rest = {}, []
    for text in said.overrides:
        key, equals, value = text.partition("=")
        if key in OWN and equals:
            own[key] = value
        else:
            rest.append(text)
    if said.plot is not None and said.plot.suffix not in PICTURES:
        raise ConfigError(f"--plot {said.plot}: the name must end in {', '.join(PICTURES)}")
    return Asked(own, rest, said.source, said.plot, said.json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the module and of the console script ``subspec-predict``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        sys.exit(0)
    sys.exit(guarded(lambda: _main(arguments)))


def _main(arguments: Sequence[str]) -> None:
    from rich.text import Text

    from subspec.planning.plan_table import plan_table
    from subspec.planning.predict import predict
    from subspec.planning.predict_table import depth_table, plot, said_lines
    from subspec.runs.console import RunConsole
    from subspec.targets import load_target_config
    from subspec.utils.files import write_error, write_json

    asked = parse(arguments)
    console = RunConsole()
    card = find(asked)
    config = compose(asked, card)
    measured = _measured(asked)
    model = load_target_config(config.target, note=console.note)
    machine, level_source = make_machine(asked, config, card, measured)
    acceptance = make_acceptance(asked, config, measured)
    prediction = predict(config, model, machine, acceptance, _depths(asked))
    planted = hasattr(config.target, "shape") or (measured is not None and measured.planted)
    console.rich.print(plan_table(prediction.plan))
    console.rich.print(Text("predicted speed of decoding over tree depths", style="bold"))
    console.rich.print(depth_table(prediction))
    for line in said_lines(prediction, planted, level_source):
        console.note(line)
    title = f"{config.target.name} in {config.offload.vram_gib:g} GiB" + (f" on {card.name}" if card else "")
    for file, write in (
        (asked.plot, lambda file: plot(prediction, title, planted, file)),
        (asked.json, lambda file: write_json(file, prediction.to_dict() | {"planted": planted})),
    ):
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file)
        except OSError as error:
            raise write_error(error, file, "choose another file") from error
        console.note(f"written: {file}")


def find(asked: Asked) -> "Card | None":
    """The card that was named, or measured; None when bandwidths were given instead.

    Raises:
        ConfigError: neither was.
    """
    from subspec.planning.gpu_specs import find_card
    from subspec.planning.machine import AUTO, measure_card

    name = asked.own.get("card")
    if name == AUTO:
        return measure_card()
    if name is not None:
        try:
            return find_card(name)
        except ConfigError as error:
            message = str(error).replace("offload.card=", "card=").partition(" For another one")[0]
            hint = "For another one give memory_gb_per_s, offload.link_gb_per_s and offload.vram_gib"
            raise ConfigError(f"{message} {hint}" if "unknown card" in message else message) from error
    given = {text.partition("=")[0] for text in asked.overrides}
    if "memory_gb_per_s" in asked.own and {"offload.link_gb_per_s", "offload.vram_gib"} <= given:
        return None
    raise ConfigError(
        "card is not set: give card=NAME (e.g. card=rtx_4090), card=auto for this machine's GPU, or memory_gb_per_s, "
        "offload.link_gb_per_s and offload.vram_gib"
    )


def compose(asked: Asked, card: "Card | None") -> "Config":
    """The configuration, checked as for a run.

    Raises:
        ConfigError: as for a run.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from subspec.cli.overrides import prepare
    from subspec.config.checks import check_keys
    from subspec.config.schema import StreamOffloadConfig, register_schemas, to_config
    from subspec.drafts.check_config import check_config
    from subspec.planning.machine import AUTO, usable_vram_gib
    from subspec.utils.paths import conf_dir

    overrides = prepare(asked.overrides)
    given = {text.partition("=")[0] for text in overrides}
    if "offload.card" in given:
        raise ConfigError("offload.card: here the card is given as card=NAME")
    defaults = dict(DEFAULTS)
    if card is not None:
        defaults |= {"offload.vram_gib": f"{usable_vram_gib(card)}"}
        if asked.own["card"] != AUTO:
            defaults |= {"offload.card": f"'{card.name}'"}
    stream = not any(text.startswith("offload=") and text != "offload=stream" for text in overrides)
    added = [
        f"{key}={value}"
        for key, value in defaults.items()
        if key not in given and (stream or not key.startswith("offload."))
    ]
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = hydra_compose("config", [*added, *overrides, "run_dir=unused"])
    check_keys(cfg)
    config = to_config(cfg)
    check_config(config)
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(
            f"offload={config.offload.name}: predictions are for offload=stream; leave offload out"
        )
    if config.draft.name == "none":
        raise ConfigError("draft=none: plain streaming is predicted in any case; leave draft out")
    if card is not None and config.offload.vram_gib > card.vram_gib:
        raise ConfigError(
            f"offload.vram_gib={config.offload.vram_gib:g} is more than the {card.vram_gib:g} GiB of {card.name}: "
            f"set it to at most {usable_vram_gib(card)}"
        )
    return config


def _measured(asked: Asked) -> "Measured | None":
    from subspec.cli.predict_measured import read_measured

    if asked.source is not None and "tau" in asked.own:
        raise ConfigError("tau= and --from both say how much is accepted: give one of them")
    if asked.source is None and "tau" not in asked.own:
        raise ConfigError(
            "tau is not set: give tau=NUMBER as measured by a run (published for SubSpec, Qwen2.5-7B on MT-Bench: "
            "28.35), or --from RUN"
        )
    return read_measured(asked.source) if asked.source is not None else None


def make_machine(
    asked: Asked, config: "Config", card: "Card | None", measured: "Measured | None"
) -> "tuple[Machine, str]":
    """The machine, and where the time of a draft level comes from."""
    from subspec.planning.predict_timing import EFFICIENCY, Machine

    memory = asked.number("memory_gb_per_s") or (card.memory_gb_per_s if card else None)
    link = config.offload.link_gb_per_s or (card.link_gb_per_s if card else None)
    assert memory is not None
    assert link is not None
    level_ms = asked.number("level_ms")
    if level_ms is not None:
        return Machine(link, memory, level_ms / 1e3), "level_ms"
    if measured is not None and measured.level_s and measured.fits(config, card):
        return Machine(link, memory, measured.level_s), f"measured by that run on {measured.device}"
    return Machine(link, memory), f"from {EFFICIENCY:.0%} of the memory bandwidth, and a constant per layer"


def make_acceptance(asked: Asked, config: "Config", measured: "Measured | None") -> "Acceptance":
    """From the run, or from a single tau."""
    from subspec.planning.acceptance import Acceptance

    if measured is not None:
        return measured.acceptance
    tau, depth = asked.number("tau"), asked.number("tau_depth")
    assert tau is not None
    if depth is not None and depth != int(depth):
        raise ConfigError(f"tau_depth={depth:g}: expected a number of levels")
    return Acceptance.from_tau(tau, int(depth) if depth is not None else config.tree.depth)


def _depths(asked: Asked) -> tuple[int, ...]:
    from subspec.planning.predict import DEPTHS

    text = asked.own.get("depths")
    if text is None:
        return DEPTHS
    try:
        depths = tuple(int(part) for part in text.strip("[]").split(","))
    except ValueError:
        depths = (0,)
    if min(depths) < 1:
        raise ConfigError(f"depths={text}: expected numbers of levels, as in depths=[8,16,32]")
    return depths
