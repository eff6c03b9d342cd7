"""``hparams_search=NAME``: Optuna proposes values, a job measures each proposal, a table ranks them.

Hydra's Optuna sweeper runs the search. This module stores the study in the sweep's folder (``search.db``), so that the
same command continues a stopped search with the proposal that was being measured. A proposal is measured once. A failed
proposal (no room in the budget) is recorded, and the search continues.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from subspec.errors import ConfigError, SubspecError
from subspec.records.sweep_folder import SweepFolder
from subspec.runs.console import RunConsole
from subspec.sweeps.job_table import Row, job_rows, ranked, show_rows
from subspec.sweeps.resumable import ResumableLauncher
from subspec.sweeps.sweeper import command_of, continued_by, task_arguments

STORAGE = "search.db"
TABLE = "search"
STOPPED = "stopped"
"""Attribute of a study: numbers of trials whose measurement was stopped."""


@dataclass
class SearchSweeper(Sweeper):
    """Searches with Optuna.

    Attributes:
        n_trials: trials of the whole search.
        n_jobs: proposals at a time; None: as many as the launcher runs.
        sampler: ``tpe`` or ``random``.
        startup: random trials before TPE uses results.
        seed: seed of the sampler.
        params: search space by key, in the grammar of the command line.
    """

    n_trials: int
    n_jobs: int | None = None
    sampler: str = "tpe"
    startup: int = 8
    seed: int = 0
    params: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.params = dict(self.params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra.

        Raises:
            ConfigError: a key of the sweeper has an invalid value.
            SubspecError: the packages of the search are not installed.
        """
        if not (isinstance(self.n_trials, int) and self.n_trials >= 1):
            raise ConfigError(f"hydra.sweeper.n_trials={self.n_trials} must be at least 1")
        if self.sampler not in ("tpe", "random"):
            raise ConfigError(f"hydra.sweeper.sampler={self.sampler}: choose one of tpe, random")
        if OmegaConf.select(config, "optimise") is None:
            raise ConfigError("a search needs optimise=tokens_per_s or optimise=tau: what it maximises")
        optuna = _import_optuna()
        from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper

        self.hydra_context = hydra_context
        self.config = config
        self.folder_path = Path(str(config.hydra.sweep.dir)).resolve()
        self.storage = f"sqlite:///{self.folder_path / STORAGE}"
        self.engine = OptunaSweeper(
            sampler=optuna.samplers.RandomSampler(),  # replaced when the number of trials is known
            direction="maximize",
            storage=self.storage,
            study_name=TABLE,
            n_trials=self.n_trials,
            n_jobs=1,
            max_failure_rate=1.0,
            search_space=None,
            custom_search_space=None,
            params=OmegaConf.create(self.params),
        ).sweeper
        self.engine.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Search, then print and write the ranking.

        Raises:
            SubspecError: no proposal could be measured.
        """
        console = RunConsole()
        optimise = self.config.optimise
        with SweepFolder.open(self.folder_path, command_of(arguments)) as folder:
            engine = self.engine
            measured = self._prepare_study()
            if measured:
                console.note(f"continuing: {measured} of {self.n_trials} trials were measured before")
            left = self.n_trials - measured
            keys = self._searched(arguments)
            launcher = ResumableLauncher(
                engine.launcher, self.hydra_context, self.config, folder, total=left, keys=keys
            )
            engine.n_trials = max(left, 0)
            engine.n_jobs = self.n_jobs or getattr(engine.launcher, "width", lambda: 1)()
            engine.launcher = launcher
            try:
                try:
                    engine.sweep(task_arguments(arguments, {}))
                except ValueError:
                    if self._complete():
                        raise
                finally:
                    rows = self._show(console, folder, optimise.value, keys) if folder.jobs else []
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(continued_by(folder)) from stop
            folder.write(finished=True)
        best = rows[0] if rows and rows[0].value is not None else None
        if best is None:
            raise SubspecError("the search found nothing: every trial failed, see the table above for why")
        console.note(f"best {optimise.value}: {best.value:.4g} with {best.label} (job {best.job})")

    def _prepare_study(self) -> int:
        """Create or load the study; returns the number of measured trials."""
        optuna = _import_optuna()
        try:
            study = optuna.create_study(
                study_name=TABLE, storage=self.storage, direction="maximize", load_if_exists=True
            )
            stopped = list(study.user_attrs.get(STOPPED, []))
            states = optuna.trial.TrialState
            for trial in study.get_trials():
                if trial.state is states.RUNNING:  # its session was killed: propose the same again
                    study.tell(trial.number, state=states.FAIL)
                    stopped.append(trial.number)
                    if trial.params:
                        study.enqueue_trial(trial.params)
            study.set_user_attr(STOPPED, stopped)
            trials = [trial for trial in study.get_trials() if trial.state.is_finished()]
        except Exception as error:
            raise SubspecError(
                f"{self.folder_path / STORAGE} cannot be used ({_first_line(error)}): mend or delete it "
                "(finished jobs are kept and not measured again), or choose another folder with sweep_dir="
            ) from error
        samplers = optuna.samplers
        seed = self.seed + len(trials)  # a continued search must not propose the first trials again
        self.engine.sampler = (
            samplers.TPESampler(n_startup_trials=self.startup, seed=seed)
            if self.sampler == "tpe"
            else samplers.RandomSampler(seed=seed)
        )
        return len([trial for trial in trials if trial.number not in stopped])

    def _complete(self) -> bool:
        optuna = _import_optuna()
        study = optuna.load_study(study_name=TABLE, storage=self.storage)
        return any(trial.state is optuna.trial.TrialState.COMPLETE for trial in study.get_trials())

    def _searched(self, arguments: Sequence[str]) -> set[str]:
        """Keys whose values are proposed."""
        parsed = OverridesParser.create().parse_overrides(list(arguments))
        return {*self.params, *(one.get_key_element() for one in parsed if one.is_sweep_override())}

    def _show(self, console: RunConsole, folder: SweepFolder, optimise: str, keys: set[str]) -> list[Row]:
        jobs = list(folder.jobs.values())
        rows = ranked(job_rows(folder, jobs, optimise, keys))
        paths = [folder.job_folder(job) for job in jobs]
        title = f"Search, the highest {optimise} first"
        show_rows(console, rows, paths, folder.path / TABLE, title, "ranking")
        return rows


def _import_optuna() -> Any:
    try:
        import hydra_plugins.hydra_optuna_sweeper.optuna_sweeper  # noqa: F401
        import optuna
    except ImportError as error:
        raise SubspecError(
            f"a search needs packages that are not here ({error}): pip install 'subspec[sweep]' "
            "(in a checkout: '.[sweep]')"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper").setLevel(logging.CRITICAL)  # the table says it
    warnings.filterwarnings("ignore", module="optuna|sqlalchemy|hydra_plugins")
    return optuna


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
