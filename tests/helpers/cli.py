"""Call the command line inside the test's own process, and read what a run left in its folder.

    ran = cli(*tiny_run(checkpoint, tmp_path / "run"), "draft=none")
    assert ran.code == 0, ran.err
    records_of(tmp_path / "run")

A process of its own costs seconds of imports; ``command`` is for the tests that need one.
"""

import atexit
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from subspec.cli.run import main

ROOT = Path(__file__).parents[2]

TIMES = {"timestamp", "prefill_s", "decode_s", "draft_s", "verify_s", "tokens_per_s", "tokens_per_s_total"}
TIMES |= {"peak_ram_gib", "ttft_s", "block_s", "block_p50_s", "block_p95_s", "block_p99_s"}
TIMES |= {"plain_s", "speedup_over_plain", "loop_s"}
"""Fields of a record that differ between two runs of the same configuration."""


@dataclass
class Ran:
    """How a command ended: exit status, standard output and error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on standard error; fails when there is anything else."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0]

    def refused(self, code: int, line: str) -> None:
        """Fails unless the command ended with ``code`` and one line that matches ``line``."""
        assert self.code == code, self.err
        assert re.search(line, self.error), self.error
        assert "Traceback" not in self.out


def cli(*arguments: object) -> Ran:
    """``python -m subspec.run ARGUMENTS`` without the process. Unexpected exceptions come through."""
    out, err = io.StringIO(), io.StringIO()
    argv, environment, threads = sys.argv, dict(os.environ), torch.get_num_threads()
    sys.argv = ["subspec"]
    os.environ["COLUMNS"] = "200"  # no line is broken, however long the folders' names are
    torch.set_num_threads(1)  # a tiny model gains nothing, and threads of busy machines wait for each other
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return Ran(stop.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
    raise AssertionError("main() came back without an exit status")


def done(*arguments: object) -> Ran:
    """:func:`cli`, which must end with status 0."""
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    return ran


def command(*arguments: object, env: dict[str, str | None] | None = None, **options: object) -> subprocess.Popen:
    """``python -m subspec.run ARGUMENTS`` as a process, its output in pipes. ``env``: None removes a variable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    changed = {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.Popen(
        [sys.executable, "-m", "subspec.run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in changed.items() if value is not None},
        **options,
    )


class Forked:
    """``python -m subspec.run ARGUMENTS`` in a fork of the test's process, which has paid for the imports.

    Has the part of ``subprocess.Popen`` that jobs and tests of kills need.

    Args:
        log, errors: files for the output; None: it is dropped, and errors are part of the output.
        env: changes of the environment; None removes a variable.
        entry: takes the arguments in place of that command.
    """

    def __init__(
        self,
        *arguments: object,
        log: int | None = None,
        errors: int | None = None,
        cwd: Path | None = None,
        env: dict[str, str | None] | None = None,
        entry: Callable[[list[str]], None] = main,
    ) -> None:
        self.returncode: int | None = None
        end, self._open = os.pipe()
        self.stdin = os.fdopen(self._open, "wb")
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        code = 1
        try:
            os.setsid()
            os.close(self._open)
            os.dup2(end, 0)
            log = os.open(os.devnull, os.O_WRONLY) if log is None else log
            for stream, file in ((1, log), (2, log if errors is None else errors)):
                os.dup2(file, stream)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf-8") for n in (1, 2))
            os.chdir(cwd or ".")
            for name, value in (env or {}).items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            GlobalHydra.instance().clear()
            atexit._clear()  # the parent's
            tempfile.tempdir = None
            try:
                entry([str(argument) for argument in arguments])
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            threading._shutdown()  # waits for threads as the interpreter does
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for the end; returns the exit status."""
        until(lambda: self.poll() is not None, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def tiny_run(checkpoint: Path, run_dir: Path, *, tokens: int = 12, samples: int = 2) -> list[str]:
    """Overrides of a run that takes a fraction of a second."""
    return [
        "target=hub",
        f"target.path={checkpoint}",
        "device=cpu",
        "logger=none",
        "benchmark.source=sample",
        f"benchmark.max_samples={samples}",
        f"decoding.max_new_tokens={tokens}",
        f"run_dir={run_dir}",
    ]


def records_of(run_dir: Path) -> list[dict]:
    """The records of a run."""
    text = (Path(run_dir) / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def texts_of(run_dir: Path) -> dict[tuple[str, int], list[int]]:
    """The token ids of a run by sample and turn."""
    return {(record["sample_id"], record["turn"]): record["token_ids"] for record in records_of(run_dir)}


def timeless(records: list[dict]) -> list[dict]:
    """Records without what differs from run to run."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def summary_of(run_dir: Path) -> dict:
    """The summary of a run."""
    return json.loads((Path(run_dir) / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def no_report(monkeypatch):
    """Sweeps draw no report: six plots take longer than tiny jobs. Import this fixture to use it."""
    monkeypatch.setattr("subspec.sweeps.sweeper.write_report", lambda *_: None)
