"""``python -m subspec.run``: compose the configuration, run it, and end every expected failure in one line.

Hydra is asked to pass exceptions through instead of printing them, so that this module alone decides what a user
sees: one line and an exit status, or a traceback for what is a bug (``SUBSPEC_DEBUG=1`` shows it in any case).
Nothing heavy is imported before the configuration has been composed: a typo answers at once.
"""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from subspec.errors import SubspecError

if TYPE_CHECKING:
    from omegaconf import DictConfig

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m subspec.run`` and of the console script ``subspec``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_guarded(lambda: _main(arguments)))


def _main(arguments: list[str]) -> None:
    from subspec.utils.paths import conf_dir

    if "--help" in arguments or "-h" in arguments:
        from subspec.config.help_text import help_text

        print(help_text(conf_dir()), end="")
        return

    import hydra

    from subspec.cli.overrides import prepare
    from subspec.config.schema import register_schemas

    # Read when CUDA starts: segments that can grow keep a tight memory budget from fragmenting.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Exceptions reach _guarded instead of Hydra's own report.
    os.environ["HYDRA_FULL_ERROR"] = "1"
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
    """One run, or one of a sweep. An expected failure goes around Hydra, which would print its own line about it.

    Returns:
        What a search maximises, if there is one.
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
        cfg.experiment = cfg.study  # rows of one table are one group, to W&B and to the report
    try:
        if sweep:
            from subspec.sweeps.process import IN_PROCESS, job_spec, run_in_process

            if settings.launcher["_target_"] != IN_PROCESS:
                # A launcher of another project, on its worker: the job gets a process of its own there too.
                return run_in_process(job_spec(settings, cfg))
        from subspec.runs.runner import run

        return run(cfg, folder, overrides)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_how_to_continue(folder, settings.sweep.dir if sweep else None)) from stop
    except Exception as error:
        failure = _expected(error)
        if not sweep and (failure or isinstance(error, BrokenPipeError)):
            failures.append(error)
            return None
        if failure:
            # At once, for a sweep may take days; and raised, for the launcher may run its jobs in other processes.
            _fail(error, f"job {settings.job.num} ({' '.join(overrides)}): {failure[0]}")
        error.from_job = True
        raise


def _how_to_continue(folder: Path, sweep: str | None) -> str:
    from subspec.records.resume import OVERRIDES

    if sweep is not None:
        again = shlex.quote(f"sweep_dir={sweep}")
        return f"finished samples are kept; continue with the same command and {again}"
    if not (folder / OVERRIDES).exists():
        return "nothing had been generated yet; start again"
    return f"finished samples are kept; continue with {shlex.quote(f'run_dir={folder}')} resume=true"


def _guarded(call: Callable[[], None]) -> int:
    """Run ``call``; returns the process's exit status."""
    try:
        call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt as stop:
        _fail(stop, f"interrupted: {stop}" if str(stop) else "interrupted before the run began")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        failure = _expected(error)
        from_job = getattr(error, "from_job", False)
        if failure is None and isinstance(error, OSError) and error.filename and not from_job:
            failure = _no_folder(error)
        if failure is None:
            raise
        message, code = failure
        if not from_job:
            _fail(error, message)
        return code
    return 0


def _expected(error: Exception) -> tuple[str, int] | None:
    """The line and the exit status of a failure that is the user's to repair; None for a bug."""
    from subspec.config.errors import CONFIG_EXCEPTIONS, explain

    if isinstance(error, SubspecError):
        return str(error), error.exit_code
    if isinstance(error, CONFIG_EXCEPTIONS):
        return explain(error), 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        where = "host memory" if isinstance(error, MemoryError) else "device memory"
        return f"out of {where}: lower decoding.max_length or the tree, or take a smaller target or dtype", 1
    return None


def _no_folder(error: OSError) -> tuple[str, int]:
    """Hydra makes the run folder itself, before the runner could refuse it."""
    from subspec.utils.files import write_error

    return str(write_error(error, Path(error.filename), "choose another folder with run_dir=")), 1


def _fail(error: BaseException, message: str) -> None:
    if os.environ.get("SUBSPEC_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
