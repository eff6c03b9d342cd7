"""Runs that end before they are finished."""

import time
from pathlib import Path

import pytest

from subspec.records.run_folder import RunFolder
from tests.helpers.cli import Forked, cli


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def killed_after(count: int, *options: object) -> None:
    """Start a run whose process ends when it would write another record than the first ``count``."""
    append = RunFolder.append

    def stop(self, record):
        if len(self) == count:
            raise Killed
        return append(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        with pytest.raises(Killed):
            cli(*options)


def kill_after(count: int, folder: Path, process: Forked) -> None:
    """``kill -9`` a process once ``count`` whole records are in ``folder``."""
    file, deadline = folder / "records.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(9)
    process.wait()
