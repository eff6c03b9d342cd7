"""Rows of a data set on the hub, from the service or from the local cache.

``datasets`` takes seconds to import and is imported only here. Failures are one-line
:class:`~subspec.errors.SubspecError`; after a :class:`~subspec.benchmarks.rows.DataUnavailableError` (no network, no
access) ``source=auto`` falls back to packaged prompts.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from subspec.benchmarks.rows import DataUnavailableError, Table, read_rows
from subspec.config.schema import HubData
from subspec.errors import ConfigError, SubspecError, causes
from subspec.utils.network import hub_problem

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 5.0


def describe(hub: HubData) -> str:
    """``path@config/split``, with the revision and the files where they are set."""
    config = f"@{hub.config}" if hub.config else ""
    revision = f" revision {hub.revision}" if hub.revision else ""
    files = f" ({', '.join(hub.files)})" if hub.files else ""
    return f"{hub.path}{config}/{hub.split}{revision}{files}"


def load_rows(hub: HubData, columns: tuple[str, ...]) -> tuple[Table, str | None]:
    """Fetch the data set, or read it from the local cache if the hub cannot be reached.

    Returns:
        The rows, and why they come from the local cache (None: they do not).
    """
    problem = None
    if not Path(hub.path).is_dir():  # a local data set folder needs no hub
        from huggingface_hub import constants

        problem = hub_problem(constants.ENDPOINT) or _first_request(hub)
    with _quiet(), _offline(problem is not None):
        try:
            rows = _files(hub, columns) if hub.files else _builder(hub, cached=problem is not None)
        except SubspecError:
            raise
        except Exception as error:
            raise _explain(error, hub, problem) from error
    return Table(rows, f"benchmark.hub.path={describe(hub)}"), problem


def _first_request(hub: HubData) -> str | None:
    """The problem of the service, or None. One request with a time limit: the libraries retry for tens of seconds."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub.path, revision=hub.revision, timeout=REQUEST_TIMEOUT_S)
    except Exception as error:
        if any(_is_network(e) for e in causes(error)):
            status = _status(error)
            return f"the hub does not work right now ({f'HTTP {status}' if status else type(error).__name__})"
        raise _explain(error, hub, None) from error
    return None


def _builder(hub: HubData, cached: bool) -> Sequence[dict[str, Any]]:
    """Rows through the data set's builder. ``cached``: from the caches of ``datasets`` or of ``hf download``."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    try:
        return load_dataset(hub.path, name=hub.config, split=hub.split, revision=hub.revision)
    except Exception:
        if not cached or Path(hub.path).is_dir():
            raise
        try:
            folder = snapshot_download(hub.path, repo_type="dataset", revision=hub.revision, local_files_only=True)
            return load_dataset(folder, name=hub.config, split=hub.split)
        except FileNotFoundError:
            pass
        raise  # the first error says what is missing


def _files(hub: HubData, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of single files, read row by row: a file may exceed free memory."""
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
    """Restrict the hub's libraries to their caches.

    They read ``HF_HUB_OFFLINE`` when they are imported, and these attributes at every request.
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
    """Silence progress bars and log lines of the hub's libraries."""
    import datasets
    from datasets.utils import logging

    from subspec.utils.console import quiet_libraries  # imports transformers

    bars, verbosity = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with quiet_libraries():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _explain(error: Exception, hub: HubData, problem: str | None) -> SubspecError:
    """Translate an error of the hub's libraries into one line."""
    from huggingface_hub import errors

    chain = causes(error)
    message = " ".join(str(error).split())
    data = f"benchmark.hub.path={hub.path}"
    elsewhere = "or use benchmark.source=file with benchmark.path=<rows.jsonl>"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    # `datasets` wraps a refusal into its own "not found" error and keeps the message.
    if caused_by(errors.GatedRepoError) or "gated dataset" in message:
        return DataUnavailableError(
            f"{data} is gated and this machine has no access",
            f"accept its terms on the data set's page on the hub and set HF_TOKEN, {elsewhere}",
        )
    if isinstance(error, ValueError) and "split" in message:
        return ConfigError(f"benchmark.hub.split={hub.split} is not a split of {hub.path} ({message})")
    if problem is not None:
        # A ValueError: the data set is cached, but not in this configuration.
        missing = f"{describe(hub)} is not in the local cache ({message})"
        missing = missing if isinstance(error, ValueError) else f"{data} is not in the local cache"
        return DataUnavailableError(f"{problem} and {missing}", f"fetch it once with a network, {elsewhere}")
    if caused_by(errors.RevisionNotFoundError) or message.startswith("Revision "):
        return ConfigError(f"benchmark.hub.revision={hub.revision} does not exist in {hub.path}; correct or drop it")
    if caused_by(errors.EntryNotFoundError) and hub.files:
        return ConfigError(f"benchmark.hub.files={hub.files}: not all of these files are in {hub.path}; correct them")
    if caused_by(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in message:
        return ConfigError(
            f"{data} is not on the hub, or is private; correct the name, or check HF_TOKEN if it is private"
        )
    if caused_by(errors.HFValidationError) or isinstance(error, FileNotFoundError):
        return ConfigError(f"{data} is neither a data set name (ORG/NAME) nor a folder with data files; correct it")
    if isinstance(error, ValueError) and "onfig" in message:
        return ConfigError(f"benchmark.hub.config={hub.config} is not a configuration of {hub.path} ({message})")
    if "scripts are no longer supported" in message:
        return ConfigError(f"{data} is a script data set; name its .jsonl files in benchmark.hub.files")
    refused = next((status for e in chain if (status := _status(e)) in (401, 403)), None)
    if refused:
        return ConfigError(f"the hub refuses access to {data} (HTTP {refused}); check HF_TOKEN")
    if any(map(_is_network, chain)):
        return DataUnavailableError(
            f"the hub failed while serving {hub.path} ({message[:160]})", f"try again, {elsewhere}"
        )
    return SubspecError(f"{data} cannot be loaded: {type(error).__name__}: {message[:300]}; {elsewhere[3:]}")


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500  # an overloaded or broken service
    # The HTTP library differs between releases of the hub's client, so its errors are recognized by module.
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0].startswith("httpx")
