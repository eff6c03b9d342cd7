"""Files that survive a kill: atomic replacement, strict JSON, and errors that name the remedy."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from subspec.errors import SubspecError

RESUME_HINT = "what is finished is safe: continue with resume=true run_dir={run_dir}"

SCRATCH = ".tmp"
"""End of the names of files that are being written."""

Content = bytes | bytearray | memoryview
"""Of a file, or of a piece of one."""

_REASONS = {
    errno.ENOSPC: "the disk is full, free some space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file may not grow any further",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file is in its place",
}


def write_error(error: OSError, path: Path, remedy: str) -> SubspecError:
    """One line for a failed write: the file, the reason, and the remedy."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return SubspecError(f"cannot write {path}: {reason}; {remedy}")


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn a failure to write ``path`` into :func:`write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path, remedy) from error


def plain(value: Any) -> Any:
    """``value`` as strict JSON can hold it: NaN and infinities become None, enums and scalars their value."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and PyTorch scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"a record cannot hold {type(value).__name__}: {value!r}")


def json_line(value: Any) -> bytes:
    """``value`` as one line of ASCII JSON with its newline: a cut never falls into the middle of a character."""
    return json.dumps(plain(value), allow_nan=False).encode("ascii") + b"\n"


def write_atomic(path: Path, *content: Content, durable: bool = True) -> None:
    """Replace ``path`` by the pieces of ``content``; a process that dies leaves the old or the new file, whole.

    Args:
        durable: survive a power loss, too. Not needed for a file that is checked when it is read and can be made again.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}{SCRATCH}")
    try:
        with scratch.open("wb") as file:
            for piece in content:
                file.write(piece)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by indented, strict JSON."""
    text = json.dumps(plain(value), allow_nan=False, indent=2, ensure_ascii=False)
    write_atomic(path, text.encode("utf-8", "replace") + b"\n")


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power loss, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder; the data itself is already synced
            os.fsync(handle)
    finally:
        os.close(handle)
