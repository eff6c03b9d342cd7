"""The command: its help, what it refuses, and how it ends."""

import os
import re
import signal
import socket
import time
from dataclasses import fields

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
import httpx

from subspec.cli.compose import compose_config, loaded_target
from subspec.cli.serve import main
from subspec.config.schema import ServeConfig
from subspec.decoding.from_config import build_sampling
from subspec.decoding.sampling import Sampling
from subspec.runs import loading
from subspec.runs.console import RunConsole
from tests.helpers.cli import Forked, until
from tests.helpers.tiny import tiny_checkpoint

SMALL = ["device=cpu", "draft=none", "decoding.max_length=512"]


def refused(capsys, *arguments):
    """The exit status, and the one line of the error."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return stop.value.code, line


PORTS = ("serve.port=high", "serve.port=70000", "serve.port")
OTHERS = ("serve.queue=-1", "serve.api_key=", "serve.host=no.such.host.invalid", "serve=5", "tree.depth=0", "draft=no")


@pytest.mark.parametrize("argument", ["serve.prot=1", *PORTS, *OTHERS])
def test_a_wrong_configuration_is_one_line(capsys, argument):
    code, line = refused(capsys, "target=planted_tiny", *SMALL, argument)
    assert code == 2
    assert ("did you mean port" if "prot" in argument else argument.partition("=")[0]) in line


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("subspec.cli.compose.loaded_target", lambda *_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = refused(capsys, "target=planted_tiny", *SMALL, f"serve.port={port}")
    assert code == 2
    assert f"serve.port={port}" in line


def test_without_the_extra_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else name)
    code, line = refused(capsys, "target=planted_tiny", *SMALL)
    assert (code, "uvicorn" in line, "subspec[serve]" in line) == (1, True, True)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for field in fields(ServeConfig):
        assert f"serve.{field.name}=" in shown


def test_the_plan_has_room_for_any_sampling(monkeypatch):
    """Greedy by default, as the configuration says; a request may ask for more."""
    planned = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda config, *rest: planned.append(config) or load(config, *rest))
    with loaded_target(compose_config(["target=planted_tiny", *SMALL]), RunConsole(), any_sampling=True) as (_, loaded):
        assert loaded.assembly.engine.sampler.sampling == Sampling()
    most = build_sampling(planned[0])
    assert most.temperature > 0
    assert most.top_k
    assert most.top_p < 1


@pytest.fixture
def command(tmp_path):
    """The command in a process of its own: the process, its address, and its console."""
    console = tmp_path / "console"
    path = tiny_checkpoint(tmp_path / "tiny", max_positions=8192)
    log = os.open(console, os.O_CREAT | os.O_WRONLY)
    arguments = ["target=hub", f"target.path={path}", *SMALL, "decoding.max_length=8192", "serve.port=0"]
    process = Forked(*arguments, log=log, env={"SUBSPEC_API_KEY": "k"}, entry=main)
    os.close(log)
    until(lambda: "/v1" in console.read_text() or process.poll() is not None)
    yield process, re.search(r"http://\S+/v1", console.read_text())[0], console
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()


BODY = {"prompt": "a", "max_tokens": 3000, "stream": True, "ignore_eos": True}
KEY = {"Authorization": "Bearer k"}


def test_ctrl_c_finishes_what_runs_and_refuses_what_is_new(command):
    process, url, console = command
    with httpx.stream("POST", f"{url}/completions", json=BODY, headers=KEY, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        until(lambda: "finishing 1" in console.read_text())
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models", headers=KEY)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert '"finish_reason": "length"' in rest[-4]
    assert process.wait() == 0
    assert "Traceback" not in console.read_text()


def test_a_second_ctrl_c_ends_at_once(command):
    process, url, console = command
    body = BODY | {"max_tokens": 8000}
    with httpx.stream("POST", f"{url}/completions", json=body, headers=KEY, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        until(lambda: "finishing 1" in console.read_text())
        process.send_signal(signal.SIGINT)
        rest = list(lines)
    assert process.wait() == 130
    assert not any('"finish_reason": "length"' in line for line in rest)
    assert "Traceback" not in console.read_text()


def test_an_idle_server_ends_at_once(command):
    process, url, console = command
    assert httpx.get(f"{url}/models").status_code == 401
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "finishing" not in console.read_text()
