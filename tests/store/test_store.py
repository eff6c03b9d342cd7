"""The store: nothing unchecked is read; no trouble with a disk ends a run, except in the user's own folder."""

import errno
import gc
import hashlib
import json
import os
import shutil
import threading
import time
import weakref
from contextlib import suppress

import pytest
from filelock import FileLock

from subspec.config.schema import Cache
from subspec.errors import ConfigError, SubspecError
from subspec.store import store as module
from subspec.store.eviction import RECENT_S, cache_limit, limit_cache, touch
from subspec.store.store import Store
from subspec.utils.disk import MANIFEST

FACTS = {"target": "org/name@abc", "bits": 4, "axis": 1}


class Words(Store[str]):
    name, making, made_as, suffix, format = "list of words", "writing", "written", ".txt", 1

    def parse(self, content):
        return content.tensor.numpy().tobytes().decode("ascii")


class Impatient(Words):
    waits = False


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    return tmp_path / "substitutes"


@pytest.fixture
def notes():
    return []


@pytest.fixture
def run(notes):
    """A run that reads three results, makes the missing ones, and returns how many it read, and its store."""

    def run(*, kind=Words, facts=FACTS, **options):
        notes.clear()
        with kind(facts, note=notes.append, **options) as store:
            for index in (0, 1, "head"):
                found = store.get(index)
                if found is None:
                    store.made += 1
                    store.put(index, lambda index=index: [b"the ", f"word {index}".encode()])
                else:
                    assert found == f"the word {index}"
                    store.read += 1
        return store.read, store

    return run


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_second_run_reads_what_the_first_one_made(run, notes, root):
    assert run()[0] == 0
    read, store = run()
    assert read == 3
    assert store.folder.parent == root
    assert names(store.folder) == ["head.txt", "layer_000.txt", "layer_001.txt", MANIFEST]
    assert store.report() == {"folder": str(store.folder), "read": 3, "written": 0, "trouble": None}
    assert notes == []
    assert json.loads((store.folder / MANIFEST).read_text())["facts"] == FACTS
    with FileLock(root / f"{store.folder.name}.lock", timeout=0):
        pass  # the lock was released


def test_every_fact_kind_and_format_has_its_own_folder(monkeypatch):
    folders = {Words(FACTS).folder, Words(dict(reversed(FACTS.items()))).folder}
    folders |= {Words({**FACTS, name: "other"}).folder for name in FACTS}
    monkeypatch.setattr(Words, "format", 2)
    folders.add(Words(FACTS).folder)
    monkeypatch.setattr(Words, "name", "other")
    folders.add(Words(FACTS).folder)
    assert len(folders) == 1 + len(FACTS) + 2


def test_off_keeps_nothing(run, root):
    _, store = run(cache=Cache.off)
    assert store.report() == {"folder": None, "read": 0, "written": 3, "trouble": "quant.cache=off"}
    assert not root.exists()


def vouch(file, content):
    """Replace a file, and its entry of the manifest."""
    file.write_bytes(content)
    manifest = json.loads((file.parent / MANIFEST).read_text())
    manifest["files"][file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (file.parent / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"2"),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: vouch(file, "é".encode()),  # agrees with the manifest, but cannot be parsed
    ],
)
@pytest.mark.parametrize("name", ["layer_000.txt", "layer_001.txt"])
def test_a_damaged_file_is_noted_once_and_made_again(run, notes, damage, name):
    _, store = run()
    damage(store.folder / name)
    assert run()[0] == 2
    assert len(notes) == 1
    assert f"{name} is damaged" in notes[0]
    assert run()[0] == 3
    assert notes == []


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', "{", '{"files": {"layer_000.txt": {"bytes": null, "sha256": ""}}}']
)
def test_a_damaged_manifest_is_noted_once(run, notes, text):
    _, store = run()
    (store.folder / MANIFEST).write_text(text)
    assert run()[0] == 0
    assert len(notes) == 1
    assert f"{MANIFEST} is damaged" in notes[0]
    assert run()[0] == 3


def test_a_killed_writer_leaves_what_it_finished(run, notes):
    with suppress(KeyboardInterrupt), Words(FACTS) as store:
        store.put(0, lambda: [b"the word 0"])
        raise KeyboardInterrupt
    half = store.folder / ".layer_001.txt.1234.tmp"
    half.write_bytes(b"the w")
    (store.folder / ".layer_002.txt.1234.tmp").mkdir()  # as a file of another user: it cannot be removed
    assert run()[0] == 1
    assert not half.exists()
    assert notes == []


@pytest.fixture
def full(monkeypatch):
    """Have the disk fail from the given write on, with the given error."""

    def arm(number=errno.ENOSPC, first=3):
        write, count = module.write_atomic, []

        def failing(file, *content, **options):
            count.append(file)
            if len(count) > first:
                raise OSError(number, os.strerror(number))
            write(file, *content, **options)

        monkeypatch.setattr(module, "write_atomic", failing)

    return arm


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_given_back_what_was_taken(run, notes, full, number):
    full(number)
    _, store = run()
    assert store.trouble == f"the disk of {store.folder} is full"
    assert len(notes) == 1
    assert "not cached: the disk" in notes[0]
    assert names(store.folder) == []


def test_any_other_error_of_writing_ends_caching(run, notes, full):
    full(errno.EIO)
    _, store = run()
    assert "cannot write to" in store.trouble
    assert len(notes) == 1
    assert run()[0] == 1


def test_too_little_room_is_noted_before_writing(run, notes, monkeypatch):
    monkeypatch.setattr(module, "free_space", lambda folder: 1_099_000_000)
    _, store = run(expected_bytes=1_000_000_000)
    assert "not cached: it needs 1.1 GB" in notes[0]
    assert not store.folder.exists()
    run()
    assert run(expected_bytes=1_000_000_000)[0] == 3  # what is there is read
    assert notes == []


def test_a_folder_that_cannot_be_made_ends_caching(run, notes, root):
    root.write_text("a file")
    assert run()[0] == 0
    assert len(notes) == 1
    assert "not cached" in notes[0]


def test_a_process_that_waited_finds_what_the_other_one_wrote(run, notes, root):
    folder = run()[1].folder
    elsewhere = folder.rename(root / "elsewhere")
    held = threading.Event()

    def other_process():  # locks are per thread, so a thread can stand in
        with FileLock(root / f"{folder.name}.lock"):
            held.set()
            time.sleep(0.4)
            shutil.copytree(elsewhere, folder)

    other = threading.Thread(target=other_process)
    other.start()
    held.wait()
    read, _ = run()
    other.join()
    assert read == 3
    assert len(notes) == 1
    assert "waiting" in notes[0]


def test_a_kind_that_does_not_wait_writes_nothing_but_reads_what_appears(run, notes, root):
    store = Impatient(FACTS, note=notes.append)
    assert not store.has(0)
    with FileLock(root / f"{store.folder.name}.lock"):
        assert run(kind=Impatient)[0] == 0
        assert notes == ["the list of words is not cached: another process is preparing it"]
    run(kind=Impatient)
    assert store.has(0)
    assert store.get(0) == "the word 0"
    store.close()


def test_a_result_that_was_read_ahead_in_vain_is_freed(run, monkeypatch):
    run()
    buffers = []
    parse = Words.parse
    monkeypatch.setattr(Words, "parse", lambda *both: buffers.append(weakref.ref(both[1])) or parse(*both))
    with Words(FACTS) as store:
        assert store.get(0) == "the word 0"
    gc.collect()
    assert [buffer() for buffer in buffers] == [None, None]


# ------------------------------------------------------------------------------------------- the user's folder


def test_a_new_or_empty_folder_is_filled_read_ever_after_and_may_move(run, tmp_path, root):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "deeper", tmp_path / "empty"):
        assert run(folder=folder, cache=Cache.off)[0] == 0
        assert run(folder=str(folder))[0] == 3
    folder.rename(tmp_path / "there")
    read, store = run(folder=tmp_path / "there")
    assert (read, store.folder, root.exists()) == (3, tmp_path / "there", False)
    assert run(folder=tmp_path / "there", facts={**FACTS, "target": "moved"})[0] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "it was made with bits 4, this run has 8"),
        ({"bits_by": {"lm_head": 8}}, r"it was made with bits_by None, this run has \{'lm_head': 8\}"),
    ],
)
def test_a_folder_of_other_facts_is_refused(run, tmp_path, change, message):
    run(folder=tmp_path / "mine")
    with pytest.raises(ConfigError, match=rf"^quant\.folder=.*mine cannot be used: {message}; name a new folder"):
        run(folder=tmp_path / "mine", facts={**FACTS, **change})


def test_a_folder_of_other_files_or_another_version_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"quant\.folder=.*holds other files"):
        run(folder=tmp_path)
    run(folder=tmp_path / "mine")
    monkeypatch.setattr(Words, "format", 99)
    with pytest.raises(ConfigError, match=r"quant\.folder=.*it has format 1, this version reads 99"):
        run(folder=tmp_path / "mine")


def test_a_damaged_folder_is_refused_and_stays_as_it_is(run, tmp_path):
    folder = tmp_path / "mine"
    run(folder=folder)
    for name in ("layer_000.txt", MANIFEST):
        (folder / name).write_bytes(b"{")
        with pytest.raises(ConfigError, match=rf"quant\.folder=.*{name} is damaged"):
            run(folder=folder)
        assert (folder / name).read_bytes() == b"{"


def test_a_folder_that_cannot_hold_the_results_stops_the_run(run, tmp_path, monkeypatch, full):
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspecError, match=r"quant\.folder=.*cannot be (kept there|used)"):
        run(folder=tmp_path / "file" / "mine")
    folder = tmp_path / "full"
    folder.mkdir()
    full()
    with pytest.raises(SubspecError, match=r"quant\.folder=.*cannot be kept there: the disk of .* is full"):
        run(folder=folder)
    assert names(folder) == []
    monkeypatch.setattr(module, "free_space", lambda folder: 1)
    with pytest.raises(SubspecError, match=r"quant\.folder=.*cannot be kept there: it needs"):
        run(folder=tmp_path / "small", expected_bytes=10**9)


# ------------------------------------------------------------------------------------------- the size limit

MIB, HOUR, NOW = 2**20, 3600.0, 2e9


@pytest.fixture
def old(root, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", str(2.5 / 1024))
    for name, hours in {"old": 50, "older": 90, "new": 20, "now": 0.01}.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "layer_000.safetensors").write_bytes(b"x" * MIB)
        (folder / MANIFEST).write_text("{}")
        os.utime(folder / MANIFEST, (NOW - hours * HOUR,) * 2)
        (root / f"{name}.lock").touch()
    return root


def left(root):
    return {folder.name for folder in root.iterdir() if folder.is_dir()}


def test_the_least_recently_used_are_removed_until_the_rest_fits(old, notes):
    removed = limit_cache(old, note=notes.append, now=NOW)
    assert [folder.name for folder in removed] == ["older", "old"]
    assert left(old) == {"new", "now"}
    assert len(notes) == 1
    assert "SUBSPEC_CACHE_GIB" in notes[0]
    assert limit_cache(old, note=pytest.fail, now=NOW) == []
    assert limit_cache(old / "none", note=pytest.fail) == []


def test_folders_in_use_stay(old, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", "0")
    with FileLock(old / "older.lock"):  # written by another process
        limit_cache(old, note=lambda text: None, now=NOW)
    assert left(old) == {"older", "now"}
    limit_cache(old, note=lambda text: None, now=NOW + RECENT_S)
    assert left(old) == set()


def test_a_store_keeps_the_limit_when_it_wrote(run, notes, root, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", "0")
    folders = []
    for bits in (1, 2):
        folders.append(run(facts={**FACTS, "bits": bits})[1].folder)
        if bits == 1:
            os.utime(folders[0] / MANIFEST, (time.time() - 2 * HOUR,) * 2)
    assert left(root) == {folders[1].name}
    assert len(notes) == 1
    os.utime(folders[1] / MANIFEST, (time.time() - 2 * HOUR,) * 2)
    assert run(facts={**FACTS, "bits": 2})[0] == 3  # reading marks it as used
    assert time.time() - (folders[1] / MANIFEST).stat().st_mtime < 60
    touch(root / "never there")


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("SUBSPEC_CACHE_GIB", text)
    with pytest.raises(ConfigError, match=f"SUBSPEC_CACHE_GIB={text}"):
        cache_limit()
    with pytest.raises(ConfigError, match="SUBSPEC_CACHE_GIB"):
        Words(FACTS)
