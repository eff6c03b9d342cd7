"""A streamed run of a planted target in this process: planned, loaded, and closed again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from subspec.config.schema import Config, DraftConfig, PlantedTargetConfig
from subspec.planning.plan import Plan, plan_run
from subspec.session import Assembly, assemble_streamed
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
