"""Compose a configuration from overrides without Hydra's run: for commands that make no run folder."""

from collections.abc import Sequence

from omegaconf import DictConfig


def compose_config(overrides: Sequence[str], defaults: Sequence[str] = ()) -> DictConfig:
    """The configuration, with the checks of its keys and values.

    Args:
        overrides: as for a run. defaults: overrides that these take precedence over.

    Raises:
        ConfigError: as for a run.
    """
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
