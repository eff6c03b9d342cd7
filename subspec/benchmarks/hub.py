"""Rows of a data set on the hub, from its service or from the local cache.

``datasets`` takes seconds to import and is imported only here. Everything that can go wrong ends as a
:class:`~subspec.errors.SubspecError` of one line; :class:`HubUnavailableError` marks the failures after which
``source=auto`` may fall back (no network, no access), as opposed to data that is wrong.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspec.benchmarks.files import read_rows
from subspec.config.schema import HubData
from subspec.errors import ConfigError, SubspecError
from subspec.utils.network import hub_problem

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0


class HubUnavailableError(SubspecError):
    """The data set is out of reach (no network and not cached, or no permission); ``reason`` says why."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclass(frozen=True)
class HubRows:
    """Rows by position, without loading them all. ``cached_because``: why the hub itself was not asked, if so."""

    rows: Sequence[dict[str, Any]]
    columns: list[str]
    cached_because: str | None

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        if isinstance(self.rows, list):
            return [row.get(name) for row in self.rows]
        return list(self.rows[name])


def describe(hub: HubData) -> str:
    """``path@config/split``, with the revision and the files where they are set."""
    config = f"@{hub.config}" if hub.config else ""
    revision = f" revision {hub.revision}" if hub.revision else ""
    files = f" ({', '.join(hub.files)})" if hub.files else ""
    return f"{hub.path}{config}/{hub.split}{revision}{files}"


def load_rows(hub: HubData, columns: tuple[str, ...]) -> HubRows:
    """Fetch the data set, or read it from the local cache when the hub cannot be reached."""
    problem = None
    if not Path(hub.path).is_dir():  # a data set folder on this machine needs no hub
        from huggingface_hub import constants

        problem = hub_problem(constants.ENDPOINT) or _first_request(hub)
    with _quiet(), _offline(problem is not None):
        try:
            rows = _files(hub, columns) if hub.files else _builder(hub)
        except SubspecError:
            raise
        except Exception as error:
            raise _explain(error, hub, problem) from error
    names = sorted({key for row in rows for key in row}) if isinstance(rows, list) else rows.column_names
    return HubRows(rows, names, cached_because=problem)


def _first_request(hub: HubData) -> str | None:
    """Ask the hub for the data set's description: why that fails for reasons of its service, else None.

    The libraries repeat a failing request for tens of seconds; this one is made once, with a time limit.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub.path, revision=hub.revision, timeout=REQUEST_TIMEOUT_S)
    except Exception as error:
        if any(_is_network(e) for e in _causes(error)):
            status = _status(error)
            return f"the hub does not work right now ({f'HTTP {status}' if status else type(error).__name__})"
        raise _explain(error, hub, None) from error
    return None


def _builder(hub: HubData) -> Sequence[dict[str, Any]]:
    from datasets import load_dataset

    return load_dataset(hub.path, name=hub.config, split=hub.split, revision=hub.revision)


def _files(hub: HubData, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of single JSON-lines files, read line by line: they may be far larger than the memory to spare."""
    from huggingface_hub import hf_hub_download

    rows = []
    for name in hub.files:
        path = Path(hub.path, name)
        if not Path(hub.path).is_dir():
            log.info("fetching %s of %s", name, hub.path)
            path = Path(hf_hub_download(hub.path, name, repo_type="dataset", revision=hub.revision))
        rows += [row for _, row in read_rows(path, f"{name} of benchmark.hub.path={hub.path}", columns)]
    return rows


@contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """Make the hub's libraries use their caches only.

    ``HF_HUB_OFFLINE`` is read when they are imported, which may be long past; both look at these attributes
    at every request.
    """
    if not enabled:
        yield
        return
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no chatter: a run's console belongs to the run."""
    import datasets
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    hub_bars, bars = not are_progress_bars_disabled(), datasets.is_progress_bar_enabled()
    verbosities = [(module, module.get_verbosity()) for module in (datasets_logging, hub_logging)]
    disable_progress_bars()
    datasets.disable_progress_bars()
    for module, _ in verbosities:
        module.set_verbosity_error()
    try:
        yield
    finally:
        for module, verbosity in verbosities:
            module.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            enable_progress_bars()


def _explain(error: Exception, hub: HubData, problem: str | None) -> SubspecError:
    """One line for what the libraries report in many ways."""
    from huggingface_hub import errors

    chain = list(_causes(error))
    message = " ".join(str(error).split())
    data = f"benchmark.hub.path={hub.path}"
    elsewhere = "or use benchmark.source=file with benchmark.path=<rows.jsonl>"
    # `datasets` wraps a refusal into a "not found" of its own and keeps only the words.
    if any(isinstance(e, errors.GatedRepoError) for e in chain) or "gated dataset" in message:
        return HubUnavailableError(
            f"{data} is gated and this machine has no access",
            f"accept its terms on the data set's page on the hub and set HF_TOKEN, {elsewhere}",
        )
    if isinstance(error, ValueError) and "split" in message:
        return ConfigError(f"benchmark.hub.split={hub.split} is not a split of {hub.path} ({message})")
    if problem is not None:
        if isinstance(error, ValueError):  # cached, but not this configuration
            return HubUnavailableError(
                f"{problem} and {describe(hub)} is not in the local cache ({message})",
                f"fetch it once with a network, {elsewhere}",
            )
        return HubUnavailableError(
            f"{problem} and {data} is not in the local cache", f"fetch it once with a network, {elsewhere}"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain) or message.startswith("Revision "):
        return ConfigError(
            f"benchmark.hub.revision={hub.revision} does not exist in {hub.path}; correct or drop it"
        )
    if any(isinstance(e, errors.EntryNotFoundError) for e in chain) and hub.files:
        return ConfigError(
            f"benchmark.hub.files={hub.files}: not all of these files are in {hub.path}; correct them"
        )
    if (
        any(isinstance(e, errors.RepositoryNotFoundError) for e in chain)
        or "doesn't exist on the Hub" in message
    ):
        return ConfigError(
            f"{data} is not on the hub, or is private; correct the name, or check HF_TOKEN if it is private"
        )
    if (
        any(isinstance(e, errors.HFValidationError) for e in chain)
        or type(error).__name__ == "FileNotFoundError"
    ):
        return ConfigError(
            f"{data} is neither a data set name (ORG/NAME) nor a folder with data files; correct it"
        )
    if isinstance(error, ValueError) and "onfig" in message:
        return ConfigError(
            f"benchmark.hub.config={hub.config} is not a configuration of {hub.path} ({message})"
        )
    if "scripts are no longer supported" in message:
        return ConfigError(f"{data} is a script data set; name its .jsonl files in benchmark.hub.files")
    refused = next((status for e in chain if (status := _status(e)) in (401, 403)), None)
    if refused:
        return ConfigError(f"the hub refuses access to {data} (HTTP {refused}); check HF_TOKEN")
    if any(_is_network(e) for e in chain):
        return HubUnavailableError(
            f"the hub failed while serving {hub.path} ({message[:160]})", f"try again, {elsewhere}"
        )
    if any(isinstance(e, errors.HFValidationError) for e in chain) or isinstance(error, FileNotFoundError):
        return ConfigError(
            f"{data} is neither a data set name (ORG/NAME) nor a folder with data files; correct it"
        )
    return SubspecError(f"{data} cannot be loaded: {type(error).__name__}: {message[:300]}; {elsewhere[3:]}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500  # an overloaded or broken service; anything else is an answer
    # The HTTP library differs between releases of the hub's client; its errors are known by their module.
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[
        0
    ].startswith("httpx")
