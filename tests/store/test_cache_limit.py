"""Old substitutes leave the cache when it is over its limit, and nothing that is in use does."""

import os
import time

import pytest
from filelock import FileLock

from subspec.errors import ConfigError
from subspec.store.cache_limit import RECENT_S, cache_limit, limit_cache, touch
from subspec.utils.disk import MANIFEST

MIB, HOUR = 2**20, 3600.0
NOW = 2e9


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", str(2.5 / 1024))
    for name, hours in {"old": 50, "older": 90, "new": 20, "now": 0.01}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "layer_000.safetensors").write_bytes(b"x" * MIB)
        (folder / MANIFEST).write_text("{}")
        os.utime(folder / MANIFEST, (NOW - hours * HOUR,) * 2)
        (tmp_path / f"{name}.lock").touch()
    return tmp_path


def left(root):
    return {folder.name for folder in root.iterdir() if folder.is_dir()}


def test_the_longest_unused_leave_until_the_rest_fits(root):
    notes = []
    removed = limit_cache(root, keep=root / "new", note=notes.append, now=NOW)
    assert [folder.name for folder in removed] == ["older", "old"]
    assert left(root) == {"new", "now"}
    assert len(notes) == 1
    assert "2 quantized substitutes" in notes[0]
    assert "SUBSPEC_CACHE_GIB" in notes[0]
    assert limit_cache(root, keep=root / "new", note=notes.append, now=NOW) == []


def test_within_the_limit_nothing_leaves(root, monkeypatch):
    monkeypatch.delenv("SUBSPEC_CACHE_GIB")
    assert limit_cache(root, keep=root / "new", note=pytest.fail, now=NOW) == []


def test_what_is_in_use_stays(root, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", "0")
    with FileLock(root / "older.lock"):  # written by another process
        removed = limit_cache(root, keep=root / "old", note=lambda text: None, now=NOW)
    assert [folder.name for folder in removed] == ["new"]
    assert left(root) == {"older", "old", "now"}
    assert limit_cache(root, keep=root / "old", note=lambda text: None, now=NOW + RECENT_S) != []
    assert left(root) == {"old"}


def test_using_a_substitute_makes_it_young(root):
    touch(root / "older")
    assert time.time() - (root / "older" / MANIFEST).stat().st_mtime < 60
    touch(root / "never there")


def test_there_may_be_nothing(tmp_path):
    assert limit_cache(tmp_path / "none", keep=tmp_path, note=pytest.fail) == []


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", text)
    with pytest.raises(ConfigError, match=f"SUBSPEC_CACHE_GIB={text}: give the GiB"):
        cache_limit()


def test_a_store_that_wrote_keeps_the_limit(tmp_path, monkeypatch):
    import torch

    from subspec.store.substitutes import SubstituteStore

    monkeypatch.setenv("SUBSPEC_CACHE_GIB", "0")
    weight, notes = torch.randn(8, 64), []
    for name in ("first", "second"):
        with SubstituteStore(tmp_path / name, note=notes.append) as kept:
            assert kept.find(weight, "0.x") is None
            kept.keep(weight, "0.x", {"q": weight})
            kept.end_layer()
        os.utime(tmp_path / name / MANIFEST, (time.time() - 2 * HOUR,) * 2)
    assert left(tmp_path) == {"second"}
    assert len(notes) == 1
