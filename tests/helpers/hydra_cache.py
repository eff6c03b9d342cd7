"""Hydra composes a configuration once per choice of groups, and not again for every test.

Composing takes a quarter of a second of computing, as long as a run of a tiny model. What depends on the groups alone
is remembered; Hydra applies the overrides of values as ever. Configurations that may lie in a test's own folders are
composed anew, because their files change.
"""

import copy
import dataclasses
import pickle
from typing import Any

from hydra._internal import config_loader_impl as loader
from hydra._internal import defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult

OWN_FOLDERS = ("command-line", "hydra.searchpath")
"""Beginnings of the names that Hydra gives to folders besides the project's."""


def install() -> None:
    """Replace the steps of Hydra's loader that depend on files and groups alone."""
    read, find = ConfigRepository.load_config, loader.create_defaults_list
    merge, load_one = (
        loader.ConfigLoaderImpl._compose_config_from_defaults_list,
        loader.ConfigLoaderImpl._load_single_config,
    )
    choices = defaults_list._create_interpolation_map
    files: dict[Any, Any] = {}
    lists: dict[Any, Any] = {}
    merged: dict[int, bytes | None] = {}
    begun: dict[Any, bytes] = {}

    def load_config(self, config_path):
        if (sources := _sources(self)) is None:
            return read(self, config_path)
        if (sources, config_path) not in files:
            files[sources, config_path] = read(self, config_path)
        return copy.deepcopy(files[sources, config_path])

    def create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        if (sources := _sources(repo)) is None:
            return find(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        others = [one for one in overrides_list if one not in values]
        groups = tuple(one.input_line for one in others if not one.is_sweep_override())
        key = sources, config_name, groups, prepend_hydra, skip_missing
        if key not in lists:
            lists[key] = find(repo, config_name, overrides_list, prepend_hydra, skip_missing)
            merged[id(lists[key].defaults)] = None
        return dataclasses.replace(lists[key], config_overrides=values)

    def compose(self, defaults, repo):
        if id(defaults) not in merged:
            return merge(self, defaults, repo)
        if merged[id(defaults)] is None:
            # Every configuration begins with Hydra's own and the one without groups.
            count = 1 + next((n for n, one in enumerate(defaults) if one.primary), -1)
            key = _sources(repo), tuple((one.config_path, one.package) for one in defaults[:count])
            if key not in begun:
                begun[key] = pickle.dumps(merge(self, defaults[:count], repo))
            rest = [Begun(config_path=begun[key]), *defaults[count:]]
            merged[id(defaults)] = pickle.dumps(merge(self, rest, repo))
        return pickle.loads(merged[id(defaults)])

    def load_single(self, default, repo):
        if not isinstance(default, Begun):
            return load_one(self, default, repo)
        return ConfigResult("begun", "", pickle.loads(default.config_path), {}, is_schema_source=True)

    def interpolation_map(overrides, children, self_added):
        return choices(overrides, children, self_added) if any(d.is_interpolation() for d in children) else None

    class Begun(ResultDefault):
        """Stands for several: ``config_path`` is what they come to, pickled."""

    defaults_list._create_interpolation_map = interpolation_map
    loader.ConfigLoaderImpl._load_single_config = load_single
    ConfigRepository.load_config = load_config
    loader.create_defaults_list = create_defaults_list
    loader.ConfigLoaderImpl._compose_config_from_defaults_list = compose


def _sources(repo: Any) -> tuple[tuple[str, str], ...] | None:
    """The folders that files are searched in; None: some are a test's own."""
    sources = tuple((source.provider, source.path) for source in repo.get_sources())
    return None if any(provider.startswith(OWN_FOLDERS) for provider, _ in sources) else sources
