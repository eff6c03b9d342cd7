"""``hparams_search=NAME``: Optuna proposes values, a job measures each proposal, a table ranks them.

The study is stored in the sweep's folder (``search.db``), so that the same command continues a stopped search with the
proposal that was being measured. A proposal is measured once. A failed proposal (no room in the budget) is recorded,
and the search continues. Hydra's Optuna plugin reads the search space; its sweeper cannot be continued.
"""

import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from subspec.errors import ConfigError, SubspecError
from subspec.records.sweep_folder import SweepFolder
from subspec.runs.console import RunConsole
from subspec.sweeps.job_table import Row, job_rows, ranked, show_rows
from subspec.sweeps.resumable import ResumableLauncher
from subspec.sweeps.sweeper import GridSweeper, interrupts_explained, without_resume

STORAGE, TABLE = "search.db", "search"
RESULTS = "optimization_results.yaml"  # as Hydra's own Optuna sweeper writes it
STOPPED = "stopped"  # attribute of a study: numbers of trials whose measurement was stopped


@dataclass
class SearchSweeper(GridSweeper):
    """Searches with Optuna.

    Args:
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
    params: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        super().__init__(self.params)

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
        self.optuna, self.read_space = _import_optuna()
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Search, then print and write the ranking.

        Raises:
            SubspecError: no proposal could be measured.
        """
        console, optimise = RunConsole(), self.config.optimise.value
        wanted = without_resume(arguments)
        with SweepFolder.open(Path(str(self.config.hydra.sweep.dir)).resolve(), wanted) as folder:
            study, measured = self._open_study(folder.path / STORAGE)
            if measured:
                console.note(f"continuing: {measured} of {self.n_trials} trials were measured before")
            space, fixed = self.read_space([*(f"{key}={value}" for key, value in self.params.items()), *wanted])
            keys = {*self.params, *space}
            space = {key: values for key, values in space.items() if key not in fixed}
            left = self.n_trials - measured
            launcher = ResumableLauncher(self.launcher, self.hydra_context, self.config, folder, total=left, keys=keys)
            width = self.n_jobs or getattr(self.launcher, "width", lambda: 1)()
            with interrupts_explained(folder):
                try:
                    for begin in range(0, left, width):
                        trials = [study.ask(space) for _ in range(min(width, left - begin))]
                        overrides = [[f"{k}={v}" for k, v in {**one.params, **fixed}.items()] for one in trials]
                        results = launcher.launch(overrides, initial_job_idx=begin)
                        for trial, result in zip(trials, results, strict=True):
                            self._tell(study, trial, result)
                finally:
                    rows = _show(console, folder, optimise, keys) if folder.jobs else []
            with suppress(ValueError):  # no trial has a value
                best = {"best_params": study.best_params, "best_value": study.best_value}
                OmegaConf.save(OmegaConf.create({"name": "optuna", **best}), folder.path / RESULTS)
            folder.write(finished=True)
        best = rows[0] if rows and rows[0].value is not None else None
        if best is None:
            raise SubspecError("the search found nothing: every trial failed, see the table above for why")
        console.note(f"best {optimise}: {best.value:.4g} with {best.label} (job {best.job})")

    def _tell(self, study: Any, trial: Any, result: JobReturn) -> None:
        """Record what a job measured; without the figure it has failed."""
        value = result.return_value if result.status is JobStatus.COMPLETED else None
        if value is None:
            study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)

    def _open_study(self, file: Path) -> tuple[Any, int]:
        """Create or load the study; returns it and the number of measured trials."""
        samplers, states = self.optuna.samplers, self.optuna.trial.TrialState
        try:
            study = self.optuna.create_study(
                study_name=TABLE, storage=f"sqlite:///{file}", direction="maximize", load_if_exists=True
            )
            stopped = list(study.user_attrs.get(STOPPED, []))
            for trial in study.get_trials():
                if trial.state is states.RUNNING:  # its session was killed: propose the same again
                    study.tell(trial.number, state=states.FAIL)
                    stopped.append(trial.number)
                    if trial.params:
                        study.enqueue_trial(trial.params)
            study.set_user_attr(STOPPED, stopped)
            ended = [trial.number for trial in study.get_trials() if trial.state.is_finished()]
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise SubspecError(
                f"{file} cannot be used ({why}): mend or delete it "
                "(finished jobs are kept and not measured again), or choose another folder with sweep_dir="
            ) from error
        seed = self.seed + len(ended)  # a continued search must not propose the first trials again
        study.sampler = (
            samplers.TPESampler(n_startup_trials=self.startup, seed=seed)
            if self.sampler == "tpe"
            else samplers.RandomSampler(seed=seed)
        )
        return study, len(set(ended) - set(stopped))


def _show(console: RunConsole, folder: SweepFolder, optimise: str, keys: Collection[str]) -> list[Row]:
    jobs = list(folder.jobs.values())
    rows = ranked(job_rows(folder, jobs, optimise, keys))
    title = f"Search, the highest {optimise} first"
    show_rows(console, rows, [folder.job_folder(job) for job in jobs], folder.path / TABLE, title, "ranking")
    return rows


def _import_optuna() -> tuple[Any, Any]:
    """Optuna, and the function with which Hydra's plugin reads a search space."""
    try:
        import optuna
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
    except ImportError as error:
        raise SubspecError(
            f"a search needs packages that are not here ({error}): pip install 'subspec[sweep]' "
            "(in a checkout: '.[sweep]')"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna|sqlalchemy|hydra_plugins")
    return optuna, create_params_from_overrides
