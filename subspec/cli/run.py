"""``python -m subspec.run``: compose the configuration and run it.

Hydra passes exceptions through (``HYDRA_FULL_ERROR``), so that :mod:`subspec.config.guard` alone reports failures.
Heavy modules are imported after the configuration has been composed, so that a typo is answered at once.
"""

import gc
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subspec import __version__
from subspec.config.guard import expected, fail, guarded

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m subspec.run`` and of the console script ``subspec``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    gc.disable()  # until the configuration has been accepted: composing makes much that lives on and no cycles
    # Hydra makes the run folder before the runner could refuse it: an OSError here is about that folder.
    try:
        sys.exit(guarded(lambda: _main(arguments), unwritable="choose another folder with run_dir="))
    finally:
        gc.enable()


def _main(arguments: list[str]) -> None:
    from subspec.utils.paths import conf_dir

    if "--version" in arguments:
        print(f"subspec {__version__}")
        return
    if "--help" in arguments or "-h" in arguments:
        from subspec.config.help_text import help_on, help_text

        words = [word for word in arguments if not word.startswith("-")]
        print(help_on(conf_dir(), words) if words else help_text(conf_dir()))
        return

    import hydra
    from hydra._internal.hydra import Hydra

    from subspec.cli.overrides import prepare
    from subspec.config.schema import register_schemas

    # Read when CUDA starts. Expandable segments prevent fragmentation under a tight memory budget.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # `prepare` has told runs from sweeps: Hydra would compose everything once more to read hydra.mode.
    Hydra.get_mode = lambda *_, **__: None
    register_schemas()
    sys.argv = [sys.argv[0], *prepare(arguments)]
    failures: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(cfg: "DictConfig") -> float | None:
        return _job(cfg, failures)

    job()
    if failures:
        raise failures[0]


def _job(cfg: "DictConfig", failures: list[Exception]) -> float | None:
    """Run one configuration, alone or as a job of a sweep; returns the figure that a search maximises, if there is one.

    Expected failures of a single run go into ``failures``: Hydra would print a line of its own about an exception.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    overrides = OmegaConf.to_container(settings.overrides.task, resolve=False)  # as typed
    sweep = settings.mode is RunMode.MULTIRUN
    if sweep:
        cfg.run_dir = f"{settings.sweep.dir}/{settings.sweep.subdir}"
    if cfg.study:
        cfg.experiment = cfg.study  # rows of one table are one group in W&B and in the report
    try:
        if sweep:
            from subspec.sweeps.process import IN_PROCESS, job_process, run_in_process

            if settings.launcher["_target_"] != IN_PROCESS:
                # A worker of another project's launcher: the job runs in a process of its own there too.
                return run_in_process(job_process(settings, cfg))
        _begin(cfg)
        gc.enable()
        from subspec.runs.runner import run

        figure = run(cfg, folder, overrides)
        if not sweep and not cfg.plan_only:
            _say(f"tables and plots: python -m subspec.report {shlex.quote(os.path.relpath(folder))}")
        return figure
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_continue(folder, settings.sweep.dir if sweep else None)) from stop
    except Exception as error:
        failure = expected(error)
        if not sweep and (failure or isinstance(error, BrokenPipeError)):
            failures.append(error)
            return None
        if failure:
            # Printed at once, because a sweep may take days, and raised for the launcher.
            fail(error, f"job {settings.job.num} ({' '.join(overrides)}): {failure[0]}")
        error.reported = True
        raise


def _say(text: str) -> None:
    from subspec.utils.terminal import Terminal

    Terminal().note(text)


def _begin(cfg: "DictConfig") -> None:
    """Refuse wrong values and print the first line, before torch and transformers take seconds to import."""
    from subspec.config.checks import check_keys, check_values
    from subspec.config.help_text import GROUPS
    from subspec.config.schema import to_config

    check_keys(cfg)
    config = to_config(cfg)
    check_values(config)
    chosen = {group: getattr(cfg[group], "name", None) or cfg[group] for group in GROUPS if cfg[group] is not None}
    words = [f"{group}={name}" for group, name in chosen.items()]
    _say(f"subspec {__version__}: {' '.join(words)} run_dir={cfg.run_dir}")


def _how_to_continue(folder: Path, sweep: str | None) -> str:
    from subspec.records.run_files import OVERRIDES

    if sweep is not None:
        again = shlex.quote(f"sweep_dir={sweep}")
        return f"finished samples are kept; continue with the same command and {again}"
    if not (folder / OVERRIDES).exists():
        return "nothing had been generated yet; start again"
    return f"finished samples are kept; continue with {shlex.quote(f'run_dir={folder}')} resume=true"
