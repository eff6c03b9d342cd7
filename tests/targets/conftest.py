"""Fixtures of the target tests: an own cache folder, a tiny packaged model, collected notes."""

import os

import pytest
import torch

from tests.helpers.packaged import GGUF, WHEEL, tiny_packaged


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Matrices this small gain nothing from more threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, used instead of the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SUBSPEC_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def package_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packaged")


@pytest.fixture(scope="session")
def packaged(package_folder):
    """A tiny model in the shape of the embedded default; do not change its files."""
    return tiny_packaged(package_folder)


@pytest.fixture
def wheel(packaged, package_folder):
    return package_folder / WHEEL


@pytest.fixture
def gguf(packaged, package_folder):
    return package_folder / GGUF


@pytest.fixture
def notes():
    """Collected notes; pass ``notes.append`` as the note."""
    return []


@pytest.fixture
def pip_settings(monkeypatch):
    """Takes away this machine's pip settings; returns a function that sets new ones (``INDEX_URL=...``)."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def settings(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"PIP_{name}", str(value))

    return settings
