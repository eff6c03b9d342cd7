"""Inputs of a prediction, from the command line: GPU, configuration, bandwidths and acceptance.

Modules that import torch or matplotlib are imported after the command line has been checked.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from subspec.cli.compose import compose_config
from subspec.cli.predict import PredictCommand
from subspec.config.enums import AUTO, Proposer
from subspec.config.schema import Config, StreamOffloadConfig, to_config
from subspec.errors import ConfigError
from subspec.planning.acceptance import Acceptance
from subspec.planning.gpu_specs import GpuSpec, find_gpu
from subspec.planning.machine import measure_gpu

if TYPE_CHECKING:
    from subspec.cli.predict_measured import Measured
    from subspec.planning.predict import Prediction
    from subspec.planning.predict_timing import Machine
    from subspec.utils.console import Note

DEFAULTS = {"draft": "subspec", "quant": "hqq", "offload": "stream", "logger": "none"}


def predict_command(command: PredictCommand, note: "Note") -> tuple["Prediction", str, bool, str]:
    """The prediction, a title, whether weights are planted, and the source of a draft level's time.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    gpu = named_gpu(command)
    measured = _measured(command)
    config = compose(command, gpu)
    for difference in measured.check(config) if measured is not None else ():
        note(difference)
    from subspec.drafts.check_config import check_against_target, check_config
    from subspec.planning.predict import DEPTHS, predict
    from subspec.targets import load_target_config

    check_config(config)
    model = load_target_config(config.target, note=note)
    check_against_target(config, model)
    machine, level_source = _machine(command, config, gpu, measured)
    prediction = predict(config, model, machine, _acceptance(command, config, measured), command.depths or DEPTHS)
    planted = hasattr(config.target, "shape") or (measured is not None and measured.planted)
    assert isinstance(config.offload, StreamOffloadConfig)
    title = f"{config.target.name} in {config.offload.vram_gib:g} GiB" + (f" on {gpu.name}" if gpu else "")
    return prediction, title, planted, level_source


def named_gpu(command: PredictCommand) -> GpuSpec | None:
    """The named or measured GPU; None: bandwidths are given instead.

    Raises:
        ConfigError: neither is given.
    """
    name = command.card
    if name == AUTO:
        return measure_gpu()
    if name is not None:
        try:
            return find_gpu(name)
        except ConfigError as error:
            message = str(error).replace("offload.card=", "card=").partition(" For another one")[0]
            hint = "For another one give memory_gb_per_s, offload.link_gb_per_s and offload.vram_gib"
            raise ConfigError(f"{message} {hint}" if "unknown card" in message else message) from error
    given = {text.partition("=")[0] for text in command.overrides}
    if "memory_gb_per_s" in command.numbers and {"offload.link_gb_per_s", "offload.vram_gib"} <= given:
        return None
    raise ConfigError(
        "card is not set: give card=NAME (e.g. card=rtx_4090), card=auto for this machine's GPU, or memory_gb_per_s, "
        "offload.link_gb_per_s and offload.vram_gib"
    )


def compose(command: PredictCommand, gpu: GpuSpec | None) -> Config:
    """The configuration, checked as for a run.

    Raises:
        ConfigError: as for a run.
    """
    given = {text.partition("=")[0] for text in command.overrides}
    if "offload.card" in given:
        raise ConfigError("offload.card: here the card is given as card=NAME")
    defaults = dict(DEFAULTS)
    if gpu is not None:
        defaults |= {"offload.vram_gib": AUTO}
        if command.card != AUTO:
            defaults |= {"offload.card": f"'{gpu.name}'"}
    stream = not any(text.startswith("offload=") and text != "offload=stream" for text in command.overrides)
    added = [
        f"{key}={value}"
        for key, value in defaults.items()
        if key not in given and (stream or not key.startswith("offload."))
    ]
    config = to_config(compose_config(command.overrides, added))
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(f"offload={config.offload.name}: predictions are for offload=stream; leave offload out")
    if config.draft.name == "none":
        raise ConfigError("draft=none: plain streaming is predicted in any case; leave draft out")
    from subspec.planning.budget import DeviceMemory, budget_of

    vram = budget_of(config.offload, DeviceMemory.of_card(gpu) if gpu else None)
    return replace(config, offload=replace(config.offload, vram_gib=vram.bytes / 2**30))


def _measured(command: PredictCommand) -> "Measured | None":
    if command.source is not None and "tau" in command.numbers:
        raise ConfigError("tau= and --from both say how much is accepted: give one of them")
    if command.source is None and "tau" not in command.numbers:
        raise ConfigError(
            "tau is not set: give tau=NUMBER as measured by a run (published for SubSpec, Qwen2.5-7B on MT-Bench: "
            "28.35), or --from RUN"
        )
    if command.source is None:
        return None
    from subspec.cli.predict_measured import read_measured

    return read_measured(command.source)


def _machine(
    command: PredictCommand, config: Config, gpu: GpuSpec | None, measured: "Measured | None"
) -> tuple["Machine", str]:
    """The machine, and the source of the time of a draft level."""
    from subspec.planning.predict_timing import EFFICIENCY, TILE_ROWS, Machine

    given = command.numbers
    memory = given.get("memory_gb_per_s") or (gpu.memory_gb_per_s if gpu else None)
    link = config.offload.link_gb_per_s or (gpu.link_gb_per_s if gpu else None)
    assert memory is not None
    assert link is not None
    tensor = gpu.tensor if gpu else None
    level_s, proposals_s = (given[key] / 1e3 if key in given else None for key in ("level_ms", "proposals_ms"))
    source = f"from {EFFICIENCY:.0%} of the memory bandwidth, and a constant per layer"
    source += f" and per row behind the first {TILE_ROWS}" if tensor else ""
    if level_s is not None:
        source = "level_ms, set by hand"
    elif measured is not None and measured.level_s and measured.fits(config, gpu):
        level_s, source = measured.level_s, f"measured by that run on {measured.device}"
    return Machine(link, memory, level_s, tensor=tensor, proposals_s=proposals_s), source


def _acceptance(command: PredictCommand, config: Config, measured: "Measured | None") -> Acceptance:
    """The acceptance of a measured run, or of a single tau; with ``draft.proposer`` its passes, too."""
    given = command.numbers
    if measured is not None:
        found = measured.acceptance
    else:
        depth = given.get("tau_depth", config.tree.depth)
        if depth != int(depth):
            raise ConfigError(f"tau_depth={depth:g}: expected a number of levels")
        found = Acceptance.from_tau(given["tau"], int(depth))
    proposes = getattr(config.draft, "proposer", Proposer.none) is not Proposer.none
    passes, source = given.get("passes"), "set by hand"
    if not proposes:
        if {"passes", "proposals_ms"} & given.keys():
            raise ConfigError("passes and proposals_ms are for draft.proposer: set it, or leave them out")
        return replace(found, passes=1.0)
    if passes is None and found.passes < 1:
        passes, source = found.passes, "measured by that run"
    if passes is None:
        raise ConfigError(
            "passes is not set: with draft.proposer give passes=NUMBER, the substitute's passes per drafted level "
            "(measured: experiments/drafts/cascade.md), or --from a run with a proposer"
        )
    if passes > 1:
        raise ConfigError(f"passes={passes:g}: expected passes per drafted level, at most 1")
    return replace(found, passes=passes, source=f"{found.source}; {passes:.2f} passes per level, {source}")
