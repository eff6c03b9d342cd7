"""Check a run's configuration, and load its target in the way that ``offload`` configures."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig

from subspec.config.defaults import fill_tree
from subspec.config.enums import Codec
from subspec.config.schema import AccelerateOffloadConfig, Config, StreamOffloadConfig, to_config
from subspec.drafts.check_config import check_against_target, check_config
from subspec.errors import SubspecError
from subspec.memory.allocator import GIB
from subspec.offload.disk import StoredLayer, measure_disk, stored_layers
from subspec.planning.plan import Bandwidth, Plan
from subspec.planning.plan_table import plan_table
from subspec.records.metrics import LinkInfo
from subspec.runs.console import RunConsole
from subspec.session import (
    Assembly,
    assemble,
    assemble_accelerate,
    assemble_streamed,
    cap_device,
    free_device,
    plan_for,
)
from subspec.targets import Target, load_target, load_target_config, open_source, resolve_device, resolve_dtype


@contextmanager
def about(key: str) -> Iterator[None]:
    """Prefix errors that do not name the config key ``key``."""
    try:
        yield
    except SubspecError as error:
        if str(error).startswith(key):
            raise
        raise type(error)(f"{key}: {error}") from error


def resolve(cfg: DictConfig, console: RunConsole) -> tuple[Config, torch.device, PretrainedConfig]:
    """Check a composed configuration by itself and against the target's ``config.json``, before anything is loaded.

    Args:
        cfg: what depends on the device is filled in.

    Returns:
        The configuration, the device, and the target's transformers configuration.
    """
    config = to_config(cfg)
    check_config(config)
    device = resolve_device(config.device)
    fill_tree(cfg, device.type)
    config = to_config(cfg)
    with about("target"):
        model = load_target_config(config.target, note=console.note)
    check_against_target(config, model)
    return config, device, model


@dataclass
class Loaded:
    """A run ready to generate.

    Attributes:
        target: name, tokenizer and origin of the weights; its ``model`` holds no layer weights when streamed.
        assembly: the engine.
        plan: of a streamed run.
        link: of a streamed run that streams any layer.
    """

    target: Target
    assembly: Assembly
    plan: Plan | None = None
    link: LinkInfo | None = None

    def facts(self) -> dict[str, Any]:
        """The effects of offloading, drafting and arithmetic, for the record."""
        facts = self.assembly.facts()
        if self.plan is not None:
            facts["link_gb_per_s"] = self.link.gb_per_s if self.link else None
            if self.plan.disk is not None and "disk" in facts:
                facts["disk"]["gb_per_s"] = self.plan.disk.gb_per_s
                facts["slower_link"] = self.plan.slower_link
        return facts


def load(config: Config, device: torch.device, console: RunConsole) -> Loaded:
    """Load the target and assemble the run."""
    free_device(device)
    if isinstance(config.offload, StreamOffloadConfig):
        return _load_streamed(config, device, console)
    if isinstance(config.offload, AccelerateOffloadConfig):
        assembly, target = assemble_accelerate(config, device, console.note)
        return Loaded(target, assembly)
    target = load_target(config.target, device, note=console.note)
    return Loaded(target, assemble(config, target, console.note))


def _load_streamed(config: Config, device: torch.device, console: RunConsole) -> Loaded:
    # Planned before the cap: the link's probe is not part of the run, and it must not fail before the plan is refused.
    source = open_source(config.target, resolve_dtype(config.target.dtype, device), device, note=console.note)
    plan, stored = plan_for(config, source.config, device), list[StoredLayer]()
    if plan.disk_layers and plan.codec is Codec.none:
        stored = stored_layers(source, console.note, plan.disk_layers)
        plan = _with_disk(plan, stored)
    console.rich.print(plan_table(plan))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        cap_device(plan.vram.allocator / GIB, device)
    assembly = assemble_streamed(config, source, plan, device, note=console.note, stored=stored)
    streamed = assembly.streamed
    assert streamed is not None
    if streamed.coded is not None:
        bits = streamed.head_bits_per_weight
        head = "" if bits is None else f"; LM head coded, {bits:.2f} bits per weight"
        console.note(f"exact weights: {streamed.coded.summary()}{head}")
    target = streamed.target
    if target.disk is not None and plan.disk is None:  # the files of coded layers were not there before
        if streamed.coded is not None and streamed.coded.made:
            os.sync()  # or what this run has written would reach the disk while it is measured
        plan = assembly.plan = _with_disk(plan, target.disk.layers)
        assert plan.disk is not None
        console.note(
            f"disk: {plan.disk.gb_per_s:.2f} GB/s, measured; a pass takes at least {plan.pass_seconds or 0:.3f} s "
            f"(the {plan.slower_link} is slower)"
        )
    link = None
    if target.streamer is not None and plan.link is not None:
        link = LinkInfo(plan.link.gb_per_s, target.streamer.bytes_per_pass)
        if target.disk is not None and plan.disk is not None and plan.slower_link == "disk":
            target.recorded = target.disk
            link = LinkInfo(plan.disk.gb_per_s, target.disk.bytes_per_pass)
    return Loaded(Target.of(source, streamed.target.model, device), assembly, plan, link)


def _with_disk(plan: Plan, layers: Sequence[StoredLayer]) -> Plan:
    """The plan with the measured bandwidth of the disk, unless it has one; on a CPU that is the link."""
    if plan.disk is not None:
        return plan
    disk = Bandwidth(measure_disk(layers, plan.ring_slots), "disk, measured")
    return replace(plan, disk=disk, link=plan.link or disk)
