"""The cache folder, and folders in it that are checked against a manifest: size and SHA-256 of each file."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from subspec.errors import SubspecError
from subspec.utils.console import Note

MANIFEST = "manifest.json"

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def cache_root() -> Path:
    """``$SUBSPEC_CACHE``, else ``$XDG_CACHE_HOME/subspec``, else ``~/.cache/subspec`` (not created)."""
    if own := os.environ.get("SUBSPEC_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "subspec"
    return Path("~/.cache/subspec").expanduser().absolute()


def sha256(file: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_full_disk(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes reports a full disk or quota.

    Libraries written in Rust report it as text only: ``... (os error 28)``.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if says_full_disk(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def says_full_disk(text: str) -> bool:
    """Whether a program's output reports a full disk or quota."""
    return any(mark in text for mark in ("No space left on device", "os error 28", "Disk quota exceeded"))


@contextmanager
def disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn a full or forbidden ``folder`` under the cache into "cannot ``doing``" on one line, with the remedy."""
    try:
        yield
    except SubspecError:
        raise
    except Exception as error:
        if is_full_disk(error):
            raise SubspecError(
                f"cannot {doing}: the disk of {folder} is full; "
                "make room, or set SUBSPEC_CACHE to a folder on a larger disk"
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise SubspecError(
                f"cannot {doing}: cannot write to {folder} ({error.strerror}); "
                "set SUBSPEC_CACHE to a folder that you can write to"
            ) from error
        raise


def free_space(folder: Path) -> int:
    """Free bytes on the disk that holds ``folder`` (or its nearest existing parent)."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int, what: str, variable: str = "SUBSPEC_CACHE") -> None:
    """Refuse to begin what would fill the disk.

    Args:
        variable: of the environment, which names another folder.

    Raises:
        SubspecError: fewer than ``needed`` bytes are free where ``folder`` is or will be.
    """
    free = free_space(folder)
    if free < needed:
        raise SubspecError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder} and only {free / 1e9:.2f} GB are free; "
            f"make room, or set {variable} to a folder on a larger disk"
        )


@contextmanager
def folder_lock(folder: Path, note: Note, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file beside ``folder``, whose parents are created; it is released when the process ends in any way.

    Args:
        note: told when another process holds the lock and is waited for.

    Raises:
        OSError: the lock file cannot be created, or, without ``wait``, another process holds it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # some special file systems say so instead of "forbidden"
        raise PermissionError(errno.EPERM, error.strerror) from error
    lock = FileLock(folder.parent / f"{folder.name}.lock", mode=0o666)
    try:
        lock.acquire(timeout=0.2)
    except Timeout as error:
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "another process is preparing it") from error
        note(f"another process is preparing {folder.name}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_manifest(folder: Path, **facts: object) -> None:
    """Record every file of ``folder`` (size in bytes, SHA-256) and ``facts`` in its manifest."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    text = json.dumps({**facts, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """How ``folder`` differs from its manifest; None if it does not. Raises SubspecError if it may not be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
        for name, expected in files.items():
            if sha256(folder / name) != expected["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except PermissionError as error:
        raise SubspecError(
            f"cannot read {error.filename}: {error.strerror}; set SUBSPEC_CACHE to a folder of your own"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return None


def publish(built: Path, folder: Path) -> None:
    """Move the complete folder ``built`` to ``folder``, readable for all users of the cache."""
    umask = os.umask(0)
    os.umask(umask)
    for file in built.iterdir():
        file.chmod(0o666 & ~umask)
        with file.open("rb") as stream:  # a crash after the rename must not leave empty files behind
            os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    built.replace(folder)
