"""The limit of what quantized substitutes and coded targets may take of the cache: the longest unused ones make room.

``SUBSPEC_CACHE_GIB`` (64 when unset) is compared after a run has added to ``<cache>/substitutes``. What is in use is
never removed: the run's own folder, one that another process writes (it holds the lock), and one that was used within
the last hour (a process may be loading it).
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from subspec.errors import ConfigError
from subspec.utils.console import Note
from subspec.utils.disk import MANIFEST

VARIABLE, DEFAULT_GIB = "SUBSPEC_CACHE_GIB", 64.0
RECENT_S = 3600.0


def cache_limit() -> int:
    """Bytes that quantized substitutes and coded targets may take.

    Raises:
        ConfigError: ``SUBSPEC_CACHE_GIB`` is no number, or negative.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        gib = float(text) if text else DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not gib >= 0:
        raise ConfigError(
            f"{VARIABLE}={text}: give the GiB that quantized substitutes and coded targets may take, for instance 64"
        )
    return int(min(gib, 2**40) * 2**30)


def touch(folder: Path) -> None:
    """Mark a folder as used now."""
    with suppress(OSError):
        os.utime(folder / MANIFEST)


def limit_cache(root: Path, *, keep: Path, note: Note, now: float | None = None) -> list[Path]:
    """Remove the longest unused folders under ``root`` until the others fit the limit.

    Args:
        keep: never removed.
        note: told what was removed.
        now: seconds since the epoch; None: the clock's.

    Returns:
        What was removed.
    """
    limit, now = cache_limit(), time.time() if now is None else now
    found = []
    with suppress(OSError):
        for folder in root.iterdir():
            with suppress(OSError):
                if folder.is_dir():
                    size = sum(file.stat().st_size for file in folder.iterdir())
                    found.append((_used(folder), folder, size))
    total = sum(size for _, _, size in found)
    removed, freed = [], 0
    for used, folder, size in sorted(found):
        if total - freed <= limit:
            break
        if folder == keep or now - used < RECENT_S or not _remove(folder):
            continue
        removed.append(folder)
        freed += size
    if removed:
        note(
            f"{len(removed)} quantized substitutes or coded targets that were not used for longest left the cache, "
            f"{freed / 2**30:.1f} GiB ({VARIABLE} sets what they may take: {limit / 2**30:g} GiB)"
        )
    return removed


def _used(folder: Path) -> float:
    manifest = folder / MANIFEST
    return (manifest if manifest.is_file() else folder).stat().st_mtime


def _remove(folder: Path) -> bool:
    lock = FileLock(folder.parent / f"{folder.name}.lock", mode=0o666)
    try:
        with lock.acquire(timeout=0):
            # Out of the way first: a reader finds the whole of it, or nothing.
            gone = folder.with_name(f"{folder.name}.{os.getpid()}.gone")
            folder.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
            return True
    except (Timeout, OSError):
        return False
