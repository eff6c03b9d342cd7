"""A disk that fills up, a folder that cannot be written, an interrupt at the worst moment."""

import errno
import os
import re
import resource
import signal
from unittest.mock import Mock

import pytest

from subspec.errors import SubspecError
from subspec.records.run_folder import RECORDS, read_records
from subspec.utils import files
from tests.helpers.records import record
from tests.records.test_run_folder import filled, open_folder


def test_a_full_disk_stops_the_run_in_one_line_and_loses_nothing(tmp_path, monkeypatch):
    filled(tmp_path, 2)
    before = (tmp_path / RECORDS).read_bytes()
    write = os.write

    def half_then_full(handle, data):
        if len(data) < 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:-100])

    with open_folder(tmp_path, resume=True) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half_then_full)
            with pytest.raises(SubspecError) as caught:
                folder.append(record(2))
        assert re.fullmatch(rf".*{RECORDS}.*disk is full.*resume=true.*", str(caught.value))
        assert (tmp_path / RECORDS).read_bytes() == before, "no part of the record stays"
        assert folder.finished("s2", 0) is None
        assert folder.append(record(2)), "there is room again"
    assert [made["sample_id"] for made in read_records(tmp_path)[0]] == ["s0", "s1", "s2"]


def test_a_real_limit_of_the_kernel(tmp_path):
    """The kernel itself takes a part of a line and refuses the rest."""
    filled(tmp_path, 2)
    before = (tmp_path / RECORDS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_folder(tmp_path, resume=True) as folder:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
            with pytest.raises(SubspecError, match=r"records\.jsonl.*resume=true"):
                folder.append(record(2))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with pytest.raises(SubspecError, match=r"summary\.json"):
                folder.write_summary({"totals": {}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / RECORDS).read_bytes() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_an_interrupt_between_write_and_sync_takes_the_record_back(tmp_path, monkeypatch):
    with open_folder(tmp_path) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                folder.append(record(0))
        assert (tmp_path / RECORDS).read_bytes() == b""
        assert folder.append(record(0))
    assert len(read_records(tmp_path)[0]) == 1


def test_a_summary_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    with open_folder(tmp_path) as folder:
        folder.write_summary({"totals": {"tau": 1.0}})
        before = (tmp_path / "summary.json").read_text()
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(files.Path, "replace", Mock(side_effect=full))
        with pytest.raises(SubspecError, match="disk is full"):
            folder.write_summary({"totals": {"tau": 2.0}})
    assert (tmp_path / "summary.json").read_text() == before


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspecError, match=r"cannot write.*not a folder.*run_dir="):
        open_folder(tmp_path / "file" / "run")
    with pytest.raises(SubspecError, match=r"cannot write.*file is in its place.*run_dir="):
        open_folder(tmp_path / "file")

    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / RECORDS))
    monkeypatch.setattr(os, "open", Mock(side_effect=denied))
    with pytest.raises(SubspecError, match=r"no permission.*run_dir="):
        open_folder(tmp_path / "run")
