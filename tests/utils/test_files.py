"""Atomic files: the old content or the new one, and nothing beside it."""

import errno
import os

import pytest

from subspec.utils.files import write_atomic


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, durable):
    file = tmp_path / "file"
    write_atomic(file, b"old", durable=durable)
    write_atomic(file, b"n", bytearray(b"e"), memoryview(b"w"), durable=durable)
    assert file.read_bytes() == b"new"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(file), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, b"newer", durable=durable)
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "file", b"", durable=durable)
