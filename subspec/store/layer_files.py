"""A folder of files that follow from a target and can be made again: one per decoder layer, beside a manifest.

The manifest has each file's size and SHA-256, and the facts that the files follow from. In the cache nothing of this
fails a run: a damaged layer is made again, a full disk or a folder that cannot be written to ends caching, and each
of these is said. One process writes a folder at a time; one thread reads ahead and writes behind, because hashing and
disks take about as long as the device does.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from safetensors import SafetensorError

from subspec.errors import SubspecError
from subspec.store.cache_limit import cache_limit, limit_cache, touch
from subspec.utils.console import Note, print_note
from subspec.utils.disk import (
    MANIFEST,
    Content,
    build_lock,
    free_space,
    is_full_disk,
    replace_file,
)

SLACK = 1.1
"""Free space asked for, over what the files take."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""What reading a damaged file raises."""


class LayerFiles:
    """Reads and writes one folder; a context manager.

    Args:
        folder: None: remember nothing.
        expected_bytes: of all files; nothing is written unless so much and a tenth is free.
        facts: what the files follow from (JSON types).
        note: told what was wrong and what was done about it.

    Attributes:
        trouble: why nothing (more) is written; None while all is well.
    """

    format: ClassVar[int]
    kind: ClassVar[str]
    making: ClassVar[str]
    """Of messages: what the files hold, and what is done where they do not."""
    suffix: ClassVar[str]
    waits: ClassVar[bool] = True
    """For another process that writes here; else this one writes nothing."""

    def __init__(
        self,
        folder: Path | None,
        *,
        expected_bytes: int = 0,
        facts: Mapping[str, Any] | None = None,
        note: Note = print_note,
    ) -> None:
        self.folder, self.expected_bytes, self.facts, self.note = folder, expected_bytes, facts or {}, note
        self.trouble: str | None = "quant.cache=off" if folder is None else None
        self._files: dict[str, dict[str, Any]] = {}
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, self.kind.replace(" ", "-"))
        self._held = ExitStack()
        self._locked = False
        self._wrote = False
        if folder is not None:
            self._open()
            self._files = self._manifest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written, let other processes have their turn, and keep the cache in its limits."""
        try:
            self._wait()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._held.close()
        if self.folder is not None:
            self._limit(self.folder)

    # ------------------------------------------------------------------------------ what a user's folder changes

    def _open(self) -> None:
        assert self.folder is not None
        cache_limit()  # a limit that is no number is refused before anything is done
        touch(self.folder)  # so that no other process takes it for unused while it is read

    def _limit(self, folder: Path) -> None:
        touch(folder)
        if self._wrote:
            limit_cache(folder.parent, keep=folder, note=self.note)

    def _unreadable(self, error: Exception) -> None:
        assert self.folder is not None
        self.note(f"{self.folder / MANIFEST} cannot be read ({type(error).__name__}): {self.making} again")

    def _damaged(self, layer: str, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else str(error)
        self.note(f"the cached {self.kind}'s layer {layer} is damaged ({why}): {self.making} it again")

    def _give_up(self, why: str) -> None:
        self.trouble = why
        self.note(f"the {self.kind} is not cached: {why}")

    def _remove(self) -> None:
        assert self.folder is not None
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------- reading

    def _file(self, layer: str) -> str:
        return f"layer_{int(layer):03}{self.suffix}" if layer.isdecimal() else f"{layer}{self.suffix}"

    def _manifest(self) -> dict[str, dict[str, Any]]:
        assert self.folder is not None
        try:
            files = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return {str(name): dict(entry) | {"bytes": int(entry["bytes"])} for name, entry in files.items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable(error)
            return {}

    @staticmethod
    def _check_size(expected: Mapping[str, Any], size: int) -> None:
        if size != expected["bytes"]:
            raise ValueError(f"{size} bytes instead of {expected['bytes']}")

    @staticmethod
    def _check_content(expected: Mapping[str, Any], *pieces: Content) -> None:
        if _digest(pieces) != expected["sha256"]:
            raise ValueError("its content has changed")

    # ------------------------------------------------------------------------------------------- writing

    def _lock(self) -> None:
        """Be the only one who writes here. Whoever had to wait finds what the other has written."""
        assert self.folder is not None
        try:
            self._held.enter_context(build_lock(self.folder, self.note, wait=self.waits))
        except (SubspecError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._give_up(reason)
            return
        self._locked = True
        for part in self.folder.glob(f"*{self.suffix}.*"):  # of a process that was killed
            with suppress(OSError):  # another user's
                part.unlink(missing_ok=True)
        self._files = self._manifest()
        there = sum(int(entry["bytes"]) for entry in self._files.values())
        needed = int(max(0, self.expected_bytes - there) * SLACK)
        free = free_space(self.folder)
        if free < needed:
            self._give_up(f"it needs {needed / 1e9:.1f} GB in {self.folder} and {free / 1e9:.1f} GB are free")

    def _write_behind(self, layer: str, content: Callable[[], Sequence[Content]]) -> None:
        """Have a layer's file written by the thread, when the one before is.

        Args:
            content: what is in it, one piece after the other; asked in the thread.
        """
        self._wait()
        if not self._locked:
            self._lock()
        if self.trouble is None:
            self._writing = self._thread.submit(self._write, self._file(layer), content)

    def _write(self, name: str, content: Callable[[], Sequence[Content]]) -> None:
        """In the thread: one layer's file, then the manifest that vouches for it."""
        assert self.folder is not None
        try:
            pieces = content()
            # No fsync: after a crash the manifest's hash tells a file that did not get to the disk.
            replace_file(self.folder / name, *pieces)
            entry = {"bytes": sum(len(piece) for piece in pieces), "sha256": _digest(pieces)}
            self._files = {**self._files, name: entry}
            self._wrote = True
            manifest = {"facts": self.facts, "format": self.format, "files": self._files}
            replace_file(self.folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        except (OSError, MemoryError, SafetensorError) as error:
            if is_full_disk(error):
                # A full disk harms more than this run: give back what was taken.
                self._remove()
                self._files = {}
                self._give_up(f"the disk of {self.folder} is full")
            else:
                self._give_up(f"cannot write to {self.folder} ({getattr(error, 'strerror', None) or error})")

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _digest(pieces: Sequence[Content]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
