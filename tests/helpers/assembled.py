"""Engines as runs build them: of a streamed planted target, and of a substitute beside a whole target."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from subspec.config.schema import (
    Cache,
    Config,
    DecodingConfig,
    DraftConfig,
    OffloadConfig,
    PlantedTargetConfig,
    QuantConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.tree_policy import TreePolicy
from subspec.planning.plan import Plan, plan_run
from subspec.session import Assembly, assemble, assemble_streamed
from subspec.targets import Target
from subspec.targets.load import open_source
from subspec.utils.console import Note
from tests.helpers.planning import settings

CPU = torch.device("cpu")
TINY = PlantedTargetConfig(name="planted_tiny", shape="tiny")


def streamed_settings(draft: DraftConfig, tree: tuple[int, int] = (3, 3), **changes: object) -> Config:
    """A tiny planted target in 1 GiB and 128 tokens; ``changes`` as of :func:`tests.helpers.planning.settings`."""
    made = settings(**{"vram_gib": 1.0, "decoding": {"max_length": 128}, "tree": tree, **changes})
    return replace(made, target=TINY, draft=draft)


def planned_here(config: Config) -> Plan:
    """The plan of a run on a machine with a link of 25 GB/s."""
    source = open_source(config.target, torch.bfloat16, CPU, note=lambda text: None)
    return plan_run(config, source.config, link_gb_per_s=25.0, host_free=None, device=None)


@contextmanager
def streamed(config: Config, note: Note = lambda text: None) -> Iterator[tuple[Plan, Assembly]]:
    """The plan, and the engine that was loaded by it."""
    source, plan = open_source(config.target, torch.bfloat16, CPU, note=lambda text: None), planned_here(config)
    assembly = assemble_streamed(config, source, plan, CPU, note=note)
    try:
        yield plan, assembly
    finally:
        assembly.close()


def substitute_beside(model: PreTrainedModel, quant: QuantConfig, policy: TreePolicy, **draft: object) -> Assembly:
    """An engine that drafts with a substitute of ``model``, which is whole on its device."""
    config = Config(
        draft=SubstituteDraftConfig(name="subspec", **draft),
        quant=replace(quant, cache=Cache.off),
        decoding=DecodingConfig(name="greedy", max_length=64),
        offload=OffloadConfig(name="none"),
    )
    target = Target("tiny", model, None, (), model.dtype, model.device, "", "")
    return assemble(config, target, policy=policy, note=lambda text: None)
