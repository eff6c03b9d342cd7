"""The project's launcher and sweepers as Hydra plugins.

Hydra accepts plugins only from modules below ``hydra_plugins``, a namespace package that several distributions share
(it has no ``__init__.py``). Hydra imports this file at every start, also before it refuses a configuration, so each
class here imports the one that it stands for when it is instantiated. Hydra skips abstract classes, hence the bases.
"""

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper


class ProcessLauncher(BasicLauncher):
    """``hydra/launcher=process``, the default: one fresh process per job, one at a time per GPU."""

    def __new__(cls, **settings: Any) -> Launcher:
        from subspec.sweeps import launcher

        return launcher.ProcessLauncher(**settings)


class GridSweeper(BasicSweeper):
    """``hydra/sweeper=grid``, the default: every combination, resumable, with a table at the end."""

    def __new__(cls, **settings: Any) -> Sweeper:
        from subspec.sweeps import sweeper

        return sweeper.GridSweeper(**settings)


class SearchSweeper(BasicSweeper):
    """``hydra/sweeper=search``: combinations chosen by Optuna."""

    def __new__(cls, **settings: Any) -> Sweeper:
        from subspec.sweeps import search

        return search.SearchSweeper(**settings)
