"""Writing files that survive a kill: strict JSON, atomic replacement, and errors a person can act on."""

import errno
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from subspec.errors import SubspecError

RESUME_HINT = "what is finished is safe: continue with resume=true run_dir={run_dir}"

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
    """One line for a failed write: which file, why, and the remedy."""
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    return SubspecError(f"cannot write {path}: {reason}; {remedy}")


def plain(value: Any) -> Any:
    """``value`` as what strict JSON can hold: NaN and infinities become None, enums and scalars their value."""
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
    """``value`` as one line of ASCII JSON, newline included: no cut can fall into the middle of a character."""
    return json.dumps(plain(value), allow_nan=False).encode("ascii") + b"\n"


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: whenever the process dies, the old or the new content is there, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
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
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot sync a folder; the data itself is already synced
    finally:
        os.close(handle)
