"""Bring a run's target onto the machine in the way ``offload`` asks for, and assemble the engine around it."""

import gc
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from subspec.config.schema import (
    AccelerateOffloadConfig,
    Config,
    Eagle2DraftConfig,
    NoDraftConfig,
    StreamOffloadConfig,
)
from subspec.decoding.bitwise_choice import choose_bitwise, why_not
from subspec.decoding.engine import Engine
from subspec.decoding.from_config import build_sampling
from subspec.errors import ConfigError
from subspec.planning.plan import Plan, plan_run
from subspec.planning.plan_table import plan_table
from subspec.records.metrics import LinkInfo
from subspec.runs.console import RunConsole
from subspec.session import Assembly, assemble, assemble_streamed
from subspec.targets import Target, load_target, open_source, resolve_dtype
from subspec.targets.device import check_memory
from subspec.targets.source import LayerSource
from subspec.utils.console import Note

GIB = 2**30

ACCELERATE_RESERVE = 1.5
"""GiB of the budget that ``offload=accelerate`` leaves for activations, logits and the layer on its way."""


@dataclass
class Loaded:
    """A run ready to generate.

    Attributes:
        target: name, tokenizer and origin of the weights; its ``model`` holds no layer weights when streamed.
        assembly: the engine.
        plan: of a streamed run.
        link: of a streamed run that streams anything.
    """

    target: Target
    assembly: Assembly
    plan: Plan | None = None
    link: LinkInfo | None = None

    def facts(self) -> dict[str, Any]:
        """What offloading actually did, for the record."""
        decoder = self.assembly.decoder
        facts: dict[str, Any] = {
            "kv_cache_bytes": self.assembly.engine.cache.nbytes,
            "bitwise": self.assembly.bitwise.facts(),
        }
        if self.plan is not None:
            facts["plan"] = self.plan.to_dict()
            facts["streamed_bytes_per_pass"] = getattr(decoder, "streamed_bytes_per_pass", 0)
            facts["link_gb_per_s"] = self.link.gb_per_s if self.link else None
            facts["prefill_chunk"] = self.plan.prefill_chunk
            facts["codec"] = self.plan.codec.value
            # Codes that came out larger than planned let layers stream that the plan has on the device.
            facts["resident_layers"] = getattr(decoder, "resident_layers", ())
            streamed = self.assembly.streamed
            if streamed is not None and streamed.bits_per_weight is not None:
                facts["coded_bits_per_weight"] = streamed.bits_per_weight
            if streamed is not None and streamed.head_bits_per_weight is not None:
                facts["coded_head_bits_per_weight"] = streamed.head_bits_per_weight
            if streamed is not None and streamed.coded is not None:
                facts["coded_cache"] = streamed.coded.report()
        draft = self.assembly.engine.draft
        if self.assembly.draft_facts:
            facts["draft"] = self.assembly.draft_facts
        if hasattr(draft, "graphs_captured"):
            facts["graphs_captured"] = draft.graphs_captured
        if launches := getattr(draft, "launches", ""):
            facts["draft_launches"] = launches
        for name in ("modules_on_device", "modules_offloaded"):
            if hasattr(decoder, name):
                facts[name] = getattr(decoder, name)
        return facts


def check_offload(config: Config, device: torch.device) -> None:
    """What the offloading needs of the device and of the other groups.

    Raises:
        ConfigError: it is not there.
    """
    offload = config.offload
    if isinstance(offload, AccelerateOffloadConfig) and not isinstance(config.draft, NoDraftConfig):
        raise ConfigError("offload=accelerate is a baseline of plain decoding: set draft=none")
    if isinstance(offload, StreamOffloadConfig) and offload.card is not None:
        raise ConfigError(f"offload.card={offload.card} is for planning: add plan_only=true, or leave it out")
    if isinstance(offload, StreamOffloadConfig | AccelerateOffloadConfig) and device.type != "cuda":
        raise ConfigError(
            f"offload={offload.name} needs a CUDA device, and this run is on the {device.type}: set offload=none, or "
            "plan_only=true with offload=stream to see the plan without one"
        )


def check_draft(config: Config, model: PretrainedConfig, note: Note) -> None:
    """What the draft's own files rule out, before the target's weights are fetched or read.

    Args:
        model: the target's transformers configuration.

    Raises:
        SubspecError: in one line with the remedy.
    """
    if isinstance(config.draft, Eagle2DraftConfig):
        from subspec.drafts.eagle_checkpoint import head_shape, locate_for

        head_shape(locate_for(config.draft, config.target, note), model.hidden_size, config.target.name)


def plan_for(config: Config, model: PretrainedConfig, device: torch.device | None) -> Plan:
    """The plan of a streamed run: for this machine's device, or, with ``device`` None, for a card on paper."""
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(f"plan_only=true plans offload=stream, not offload={config.offload.name}")
    link, total = None, None
    if device is not None and device.type == "cuda":
        dtype = resolve_dtype(config.target.dtype, device)
        if why_not(config.decoding.bitwise, model, dtype, device):  # the pass that will run is planned
            config = replace(config, decoding=replace(config.decoding, bitwise=False))
        from subspec.offload.bandwidth import measure_link

        total = torch.cuda.get_device_properties(device).total_memory
        if config.offload.link_gb_per_s is None:
            link = measure_link(device)
    return plan_run(
        config, model, link_gb_per_s=link, host_free=psutil.virtual_memory().available, device_total=total
    )


def print_plan(plan: Plan, console: RunConsole) -> None:
    """The plan as a table."""
    console.rich.print(plan_table(plan))


def load(config: Config, device: torch.device, console: RunConsole) -> Loaded:
    """Load the target and assemble the run.

    Raises:
        SubspecError: anything the user can repair.
    """
    offload = config.offload
    free_device(device)
    if isinstance(offload, StreamOffloadConfig):
        return _load_streamed(config, device, console)
    if isinstance(offload, AccelerateOffloadConfig):
        return _load_accelerate(config, offload, device, console)
    target = load_target(config.target, device, note=console.note)
    return Loaded(target, assemble(config, target, note=console.note))


def cap_device(vram_gib: float, device: torch.device) -> None:
    """Let PyTorch allocate no more than the budget: a promise, not an estimate."""
    index = (
        torch.cuda.current_device() if device.index is None else device.index
    )  # the fraction wants a number
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, vram_gib * GIB / total), index)


def free_device(device: torch.device) -> None:
    """Give back what an earlier run of this process left, its cap and its peaks too: modules that know each other go
    only when collected."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _load_streamed(config: Config, device: torch.device, console: RunConsole) -> Loaded:
    offload = config.offload
    assert isinstance(offload, StreamOffloadConfig)
    # Planned before the cap: the link's probe is no part of the run, and a budget too small for it deserves the plan's
    # own refusal.
    source = open_source(config.target, resolve_dtype(config.target.dtype, device), device, note=console.note)
    plan = plan_for(config, source.config, device)
    print_plan(plan, console)
    torch.cuda.reset_peak_memory_stats(device)
    cap_device(offload.vram_gib, device)
    assembly = assemble_streamed(config, source, plan, device, note=console.note)
    streamed = assembly.streamed
    assert streamed is not None
    if streamed.coded is not None:
        console.note(
            f"exact weights: {streamed.coded.summary()}{_head_summary(streamed.head_bits_per_weight)}"
        )
    link = None
    if streamed.decoder.streamer is not None and plan.link is not None:
        link = LinkInfo(plan.link.gb_per_s, streamed.decoder.streamed_bytes_per_pass)
    return Loaded(_target(source, assembly, device), assembly, plan, link)


def _head_summary(bits: float | None) -> str:
    return "" if bits is None else f"; LM head coded, {bits:.2f} bits per weight"


def _load_accelerate(
    config: Config, offload: AccelerateOffloadConfig, device: torch.device, console: RunConsole
) -> Loaded:
    from subspec.offload.accelerate import AccelerateTarget, host_bytes

    cap_device(offload.vram_gib, device)
    source = open_source(config.target, resolve_dtype(config.target.dtype, device), device, note=console.note)
    if offload.vram_gib <= ACCELERATE_RESERVE:
        raise ConfigError(
            f"offload.vram_gib={offload.vram_gib} leaves nothing for weights: accelerate needs more than "
            f"{ACCELERATE_RESERVE} GiB"
        )
    weight_bytes = int((offload.vram_gib - ACCELERATE_RESERVE) * GIB)
    what = f"offload=accelerate keeps {source.name} in host memory"
    check_memory(host_bytes(source, weight_bytes), torch.device("cpu"), what)
    decoder = AccelerateTarget(source, device, weight_bytes)
    bitwise = choose_bitwise(
        config.decoding.bitwise, source.config, source.dtype, device, console.note, accelerate=True
    )
    sampling = build_sampling(config)
    engine = Engine(
        decoder,
        sampling=sampling,
        max_length=config.decoding.max_length,
        prefill_chunk=config.decoding.prefill_chunk,
        eos_token_ids=source.eos_token_ids,
        tokenizer=source.tokenizer,
    )
    assembly = Assembly(engine, decoder, sampling, None, bitwise=bitwise)
    return Loaded(_target(source, assembly, device), assembly)


def _target(source: LayerSource, assembly: Assembly, device: torch.device) -> Target:
    return Target(
        name=source.name,
        model=assembly.decoder.model,
        tokenizer=source.tokenizer,
        eos_token_ids=source.eos_token_ids,
        dtype=source.dtype,
        device=device,
        source=source.source,
        identity=source.identity,
        planted=source.planted,
        notes=tuple(getattr(source, "notes", ())),
    )
