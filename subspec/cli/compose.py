"""Compose a configuration from overrides without Hydra's run, and load it: for commands that make no run folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from omegaconf import DictConfig

if TYPE_CHECKING:
    from subspec.config.schema import Config
    from subspec.runs.console import RunConsole
    from subspec.runs.loading import Loaded


def compose_config(overrides: Sequence[str], defaults: Sequence[str] = ()) -> DictConfig:
    """The configuration, checked as for a run. ``overrides`` take precedence over ``defaults``."""
    from hydra import compose, initialize_config_dir

    from subspec.cli.overrides import prepare
    from subspec.config.checks import check_keys, check_values
    from subspec.config.schema import register_schemas, to_config
    from subspec.utils.paths import conf_dir

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*defaults, *prepare(overrides), "run_dir=unused"])
    check_keys(cfg)
    check_values(to_config(cfg))
    return cfg


@contextmanager
def loaded_target(
    cfg: DictConfig, console: "RunConsole", *, any_sampling: bool = False
) -> Iterator[tuple["Config", "Loaded"]]:
    """Load what a composed configuration describes, ready to generate; it is freed behind the ``with``.

    Args:
        any_sampling: plan for texts that are sampled in other ways than ``decoding`` says.
    """
    from subspec.decoding.from_config import build_sampling, for_any_sampling
    from subspec.runs.loading import load, resolve
    from subspec.session import check_draft, check_offload

    config, device, model = resolve(cfg, console)
    check_offload(config, device)
    check_draft(config, model, console.note)
    loaded = load(for_any_sampling(config) if any_sampling else config, device, console)
    try:
        loaded.assembly.engine.sampler.sampling = build_sampling(config)
        loaded.assembly.engine.prepare(loaded.target.chat_ids([{"role": "user", "content": "Hello"}]))
        yield config, loaded
    finally:
        loaded.assembly.close()
