"""The folder where prepared targets are kept: where it is, and how not to be fooled by what lies in it.

A checkpoint is built in a work folder, gets a manifest (size and SHA-256 of each of its files), and is renamed
into place: it is there completely or not at all. Reading it back checks it against the manifest, so a file
that was cut off or flipped since is noticed. One lock file per target lets only one process build.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from subspec.errors import SubspecError
from subspec.utils.console import Note

MANIFEST = "manifest.json"

Content = bytes | bytearray | memoryview
"""Of a file, or of a piece of one."""

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
    """Whether ``error`` (or what caused it) says that a disk or quota is full.

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
    """Whether a program's output says that a disk or quota is full."""
    return any(mark in text for mark in ("No space left on device", "os error 28", "Disk quota exceeded"))


@contextmanager
def disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder under the cache into one line with the remedy.

    Args:
        doing: what went wrong, as in "cannot <doing>".
        folder: where it was written to.
    """
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


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what would fill the disk.

    Raises:
        SubspecError: fewer than ``needed`` bytes are free where ``folder`` is or will be.
    """
    free = free_space(folder)
    if free < needed:
        raise SubspecError(
            f"{what} needs {_gb(needed)} in {folder} and only {_gb(free)} are free; "
            "make room, or set SUBSPEC_CACHE to a folder on a larger disk"
        )


@contextmanager
def build_lock(folder: Path, note: Note, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock beside ``folder`` (created if need be), saying so when another process has it.

    The lock dies with its process, however that ends.

    Args:
        wait: for another process that has it.

    Raises:
        SubspecError: it cannot be made, or another process has it and is not waited for.
    """
    with disk_errors("prepare the target", folder.parent):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # what some special file systems say instead of "forbidden"
            raise PermissionError(errno.EPERM, error.strerror) from error
        lock = FileLock(folder.parent / f"{folder.name}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0.2)
        except Timeout as error:
            if not wait:
                raise SubspecError("another process is preparing it") from error
            note(f"another process is preparing {folder.name}: waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_manifest(folder: Path, **facts: object) -> None:
    """Record every file of ``folder`` (size in bytes, SHA-256) and ``facts`` in its manifest."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())
    }
    text = json.dumps({**facts, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in ``folder``, compared with its manifest; None when nothing is.

    Raises:
        SubspecError: the folder is there but may not be read.
    """
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
    """Move the complete folder ``built`` to ``folder``, readable for whoever shares the cache."""
    umask = os.umask(0)
    os.umask(umask)
    for file in built.iterdir():
        file.chmod(0o666 & ~umask)
        with file.open("rb") as stream:  # a crash after the rename must not leave empty files behind
            os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    built.replace(folder)


def replace_file(file: Path, *content: Content) -> None:
    """Write a file beside its place and rename it: readers find the old one, the new one, or none.

    Its pieces follow each other. It is not forced to the disk: for what can be made again, and is checked when it is
    read.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            for piece in content:
                stream.write(piece)
        part.replace(file)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
