"""Fixtures of the benchmark tests: clean hub settings, and a hub of our own on localhost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from subspec.utils import network
from tests.helpers.fake_hub import FakeHub, use_hub

SETTINGS = ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"]
PROXIES = [f"{scheme}_proxy" for scheme in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [*SETTINGS, *PROXIES, *map(str.upper, PROXIES)]:
        monkeypatch.delenv(name, raising=False)
    network._probe.cache_clear()
    yield
    network._probe.cache_clear()


@pytest.fixture(scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """The hub's libraries, pointed at a hub on localhost and at caches of their own.

    One address per module: the libraries keep a file system object per process that remembers it.
    """
    import datasets.config
    from huggingface_hub import constants

    cache: Path = tmp_path_factory.mktemp("hub")
    with FakeHub().serving() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(hub.url, patch)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def hub(_served: FakeHub) -> FakeHub:
    """An empty hub that works. Use a name of its own for each data set: what was loaded stays cached."""
    _served.repositories.clear()
    _served.gated.clear()
    _served.requests.clear()
    _served.broken = False
    return _served
