"""The size limit of the results in the cache: the least recently used folders are removed.

``SUBSPEC_CACHE_GIB`` (64 by default) limits the bytes under ``<cache>/substitutes``, and is compared after a run has
written to it. A folder that was used within the last hour (a process may be loading it) or whose lock is held is never
removed.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

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
    if not gib >= 0:  # NaN, too
        raise ConfigError(
            f"{VARIABLE}={text}: give the GiB that quantized substitutes and coded targets may take, for instance 64"
        )
    return int(min(gib, 2**40) * 2**30)


def touch(folder: Path) -> None:
    """Mark a folder as used now."""
    with suppress(OSError):
        os.utime(folder / MANIFEST)


def limit_cache(root: Path, *, note: Note, now: float | None = None) -> list[Path]:
    """Remove the least recently used folders under ``root`` until the others fit the limit; returns the removed ones.

    ``now``: seconds since the epoch; None: the clock's.
    """
    limit, now = cache_limit(), time.time() if now is None else now
    found: list[tuple[float, Path, int]] = []
    with suppress(OSError):
        for folder in root.iterdir():
            with suppress(OSError):
                if folder.is_dir():
                    manifest, size = folder / MANIFEST, sum(file.stat().st_size for file in folder.iterdir())
                    used = (manifest if manifest.is_file() else folder).stat().st_mtime
                    found.append((used, folder, size))
    total = kept = sum(size for _, _, size in found)
    removed: list[Path] = []
    for used, folder, size in sorted(found):
        if kept > limit and now - used >= RECENT_S and _remove(folder):
            removed.append(folder)
            kept -= size
    if removed:
        note(
            f"{len(removed)} quantized substitutes or coded targets, the least recently used, were removed from the "
            f"cache: {(total - kept) / 2**30:.1f} GiB ({VARIABLE} is the limit: {limit / 2**30:g} GiB)"
        )
    return removed


def _remove(folder: Path) -> bool:
    try:
        with FileLock(folder.parent / f"{folder.name}.lock", mode=0o666).acquire(timeout=0):
            # Renamed first: a reader finds all of its files, or none.
            gone = folder.with_name(f"{folder.name}.{os.getpid()}.gone")
            folder.replace(gone)
            shutil.rmtree(gone, ignore_errors=True)
            return True
    except OSError:  # also a lock that another process holds
        return False
