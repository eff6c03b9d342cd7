"""The cache folder: where it is, that damage is seen, and what is said when the disk does not play along."""

import errno
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from subspec.errors import SubspecError
from subspec.utils import disk as module


@pytest.fixture
def notes():
    return []


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SUBSPEC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_root() == tmp_path / ".cache" / "subspec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module.cache_root() == tmp_path / "xdg" / "subspec"
    monkeypatch.setenv("SUBSPEC_CACHE", "~/mine")
    assert module.cache_root() == tmp_path / "mine"


def folder_with_manifest(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / "words").write_text("a b c")
    module.write_manifest(folder, source="here")
    return folder


def test_every_damage_is_seen(tmp_path):
    folder = folder_with_manifest(tmp_path)
    assert module.damage(folder) is None
    content = (folder / "weights").read_bytes()
    (folder / "weights").write_bytes(content[:50])
    assert module.damage(folder) == "weights has 50 bytes instead of 200"
    (folder / "weights").write_bytes(content[:-1] + b"x")
    assert module.damage(folder) == "the content of weights has changed"
    (folder / "weights").unlink()
    assert module.damage(folder) == "weights is missing"
    (folder / module.MANIFEST).write_text("{}")
    assert "cannot be read" in module.damage(folder)
    (folder / module.MANIFEST).unlink()
    assert module.damage(folder) == "manifest.json is missing"


def test_publishing_replaces_and_opens_the_files_to_others(tmp_path):
    built, folder = folder_with_manifest(tmp_path), tmp_path / "final"
    folder.mkdir()
    (folder / "old").touch()
    (built / "weights").chmod(0o600)
    before = os.umask(0o022)
    try:
        module.publish(built, folder)
    finally:
        os.umask(before)
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "weights", "words"]
    assert stat.S_IMODE((folder / "weights").stat().st_mode) == 0o644
    assert not built.exists()


BEHIND = ValueError("could not save")
BEHIND.__cause__ = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        BEHIND,
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
    with (
        pytest.raises(SubspecError, match=r"cannot convert: the disk of .* is full;.*SUBSPEC_CACHE"),
        module.disk_errors("convert", tmp_path),
    ):
        raise error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written(tmp_path, number):
    with pytest.raises(SubspecError, match=r"cannot write to .*SUBSPEC_CACHE"), module.disk_errors("convert", tmp_path):
        raise OSError(number, os.strerror(number))


def test_bugs_stay_bugs(tmp_path):
    with pytest.raises(ZeroDivisionError), module.disk_errors("convert", tmp_path):
        raise ZeroDivisionError


def test_too_little_space_is_said_before(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_space", lambda folder: 300_000_000)
    module.require_space(tmp_path, 300_000_000, "preparing it")
    with pytest.raises(SubspecError, match=r"preparing it needs 0.80 GB in .* 0.30 GB are free.*SUBSPEC_CACHE"):
        module.require_space(tmp_path, 800_000_000, "preparing it")


def test_free_space_of_a_folder_to_be(tmp_path):
    assert module.free_space(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize("broken", ["a file", "forbidden"])
def test_a_lock_that_cannot_be_made_is_one_line(tmp_path, notes, monkeypatch, broken):
    folder = tmp_path / "targets" / "x"
    if broken == "a file":
        folder.parent.touch()
    else:  # as some special file systems say it

        def mkdir(*_, **__):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

        monkeypatch.setattr(Path, "mkdir", mkdir)
    with (
        pytest.raises(SubspecError, match=r"cannot write to .*SUBSPEC_CACHE"),
        module.disk_errors("prepare", folder.parent),
        module.folder_lock(folder, notes.append),
    ):
        pass


def test_the_lock_notes_that_it_waits_unless_it_must_not(tmp_path, notes):
    folder = tmp_path / "targets" / "x"

    def give_up(text):
        raise InterruptedError(text)

    with module.folder_lock(folder, notes.append):
        for options, error in (({}, InterruptedError), ({"wait": False}, BlockingIOError)):
            with (
                pytest.raises(error, match="another process is preparing"),
                module.folder_lock(folder, give_up, **options),
            ):
                pass
    with module.folder_lock(folder, notes.append):
        assert notes == []


def test_a_killed_process_leaves_no_lock(tmp_path, notes):
    folder = tmp_path / "made"
    child = os.fork()
    if child == 0:  # forked, so that nothing is imported again
        with module.folder_lock(folder, lambda text: None):
            (tmp_path / "held").touch()
            while True:
                time.sleep(60)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(BlockingIOError), module.folder_lock(folder, notes.append, wait=False):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with module.folder_lock(folder, notes.append, wait=False):
        assert notes == []
