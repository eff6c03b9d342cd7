"""The project's launcher and sweepers as Hydra plugins.

Hydra accepts plugins only from modules below ``hydra_plugins``, a namespace package that several distributions share
(it has no ``__init__.py``). Hydra imports this file at every start, so it imports no heavy module.
"""

from subspec.sweeps import launcher, search, sweeper


class ProcessLauncher(launcher.ProcessLauncher):
    """``hydra/launcher=process``, the default: one fresh process per job, one at a time per GPU."""


class GridSweeper(sweeper.GridSweeper):
    """``hydra/sweeper=grid``, the default: every combination, resumable, with a table at the end."""


class SearchSweeper(search.SearchSweeper):
    """``hydra/sweeper=search``: combinations chosen by Optuna."""
