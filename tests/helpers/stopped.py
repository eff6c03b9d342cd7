"""Runs that end before they are finished."""

from pathlib import Path

import pytest

from subspec.records.run_folder import RunFolder
from tests.helpers.cli import Forked, cli, until


class Killed(BaseException):
    """Stands for the end of the process: nothing in the project catches it."""


def killed_after(count: int, *options: object, at_once: bool = False) -> None:
    """Start a run whose process ends before it writes another record than the first ``count``.

    Args:
        at_once: end as soon as the last of them is written.
    """
    append = RunFolder.append

    def stop(self, record):
        if not at_once and len(self) == count:
            raise Killed
        written = append(self, record)
        if at_once and len(self) == count:
            raise Killed
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", stop)
        with pytest.raises(Killed):
            cli(*options)


def kill_after(count: int, folder: Path, process: Forked) -> None:
    """``kill -9`` a process once ``count`` whole records are in ``folder``."""
    file = folder / "records.jsonl"

    def written():
        assert process.poll() is None
        return file.exists() and file.read_bytes().count(b"\n") >= count

    until(written, 120)
    process.send_signal(9)
    process.wait()
