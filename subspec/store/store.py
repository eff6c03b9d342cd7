"""Results on disk that can be made again: a folder per kind and facts, a file per index, and a manifest.

The manifest holds the facts that the results follow from, and the size and SHA-256 of every file. A file that does not
agree with it is never used.

The folder is the cache's own, ``<cache>/substitutes/<hash of kind, format and facts>``, or the user's
(``quant.folder``). In the cache no trouble with a disk ends a run: a damaged file is made again, a full disk or a
folder without permission ends caching, and a note says so. In the user's folder each of these raises.

Concurrency: one process at a time writes to a folder. It holds the lock file beside it, which is released when the
process ends in any way. Readers take no lock, since files are replaced whole. One thread reads the next file ahead and
writes behind, since hashing and disks take about as long as the device does.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from safetensors import SafetensorError

from subspec.config.schema import Cache
from subspec.errors import ConfigError, SubspecError
from subspec.store.eviction import cache_limit, limit_cache, touch
from subspec.utils.console import Note, print_note
from subspec.utils.disk import MANIFEST, cache_root, folder_lock, free_space, is_full_disk
from subspec.utils.files import SCRATCH, Content, write_atomic
from subspec.utils.pinned import PinnedBuffer

T = TypeVar("T")

Index = int | str
"""Of a result: a layer's number, or a name."""

SLACK = 1.1
"""Free space to ask for, as a multiple of the bytes that will be written."""

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)
"""Errors of reading a damaged file."""


class Store(ABC, Generic[T]):
    """Results of one kind that follow from the same facts; a context manager.

    Args:
        facts: what the results follow from (JSON types).
        cache: ``quant.cache``; ``off`` keeps nothing.
        folder: ``quant.folder``, whatever ``cache`` is; None: the cache's own folder.
        expected_bytes: of all files. Nothing is written unless :data:`SLACK` times as much is free.
        note: receives one line per problem.

    Attributes:
        folder: of the files; None: nothing is kept.
        read, made: results found here, and results made by this run; counted by the callers.
        trouble: why nothing (more) is written; None if nothing is wrong.

    Raises:
        ConfigError: ``folder`` holds other files or results of other facts, or ``SUBSPEC_CACHE_GIB`` is no number.
    """

    name: ClassVar[str]
    """Of all results together, in messages."""
    making: ClassVar[str]
    """Of messages: ``quantizing``."""
    made_as: ClassVar[str]
    """Key of ``made`` in the record."""
    suffix: ClassVar[str]
    format: ClassVar[int]
    """Version of the files' format; another one makes another folder."""
    waits: ClassVar[bool] = True
    """Wait for another process that writes to the folder; otherwise write nothing."""
    required: bool = False
    """Whether the run reads its weights from these files: a result that cannot be kept then ends it."""

    def __init__(
        self,
        facts: Mapping[str, Any],
        *,
        cache: Cache = Cache.auto,
        folder: str | Path | None = None,
        expected_bytes: int = 0,
        note: Note = print_note,
    ) -> None:
        self.facts: dict[str, Any] = json.loads(json.dumps(dict(facts)))
        self.owned, self.expected_bytes, self.note = folder is not None, expected_bytes, note
        self.folder: Path | None = None
        if folder is not None:
            self.folder = Path(folder).expanduser().absolute()
            self._check_owned()
        elif cache is not Cache.off:
            cache_limit()  # refused before anything is done
            text = json.dumps({"kind": self.name, "format": self.format, **self.facts}, sort_keys=True)
            self.folder = cache_root() / "substitutes" / hashlib.sha256(text.encode()).hexdigest()[:24]
            touch(self.folder)  # another process must not evict it while it is read
        self.trouble = "quant.cache=off" if self.folder is None else None
        self.read = self.made = 0
        self._files: dict[str, dict[str, Any]] = {}
        self._ahead: dict[Index, Future[T | None]] = {}
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, self.name.replace(" ", "-"))
        self._held = ExitStack()
        self._locked = self._wrote = False
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish writing, release the lock, and evict old results if the cache is over its limit."""
        try:
            self.flush()
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._ahead.clear()
            self._held.close()
        if self.folder is not None and not self.owned:
            touch(self.folder)
            if self._wrote:
                limit_cache(self.folder.parent, note=self.note)

    def report(self) -> dict[str, Any]:
        """For the record."""
        folder = None if self.folder is None else str(self.folder)
        return {"folder": folder, "read": self.read, self.made_as: self.made, "trouble": self.trouble}

    # ------------------------------------------------------------------------------------------- reading

    @abstractmethod
    def parse(self, content: PinnedBuffer) -> T:
        """A result from the content of its file; any of :data:`UNREADABLE` says that the file is damaged."""

    def has(self, index: Index) -> bool:
        """Whether a result is kept, also one that another process has written since the store was opened.

        Acquires the lock on a miss if the kind waits: the other process may be about to make the result.
        """
        name = self._file(index)
        if self.folder is not None and name not in self._files and not self._locked:
            self._files = self._manifest()
            if name not in self._files and self.waits and self.trouble is None:
                self._acquire()
        return name in self._files

    def get(self, index: Index, *, ahead: bool = True) -> T | None:
        """A result; None if it is not kept, or damaged. ``ahead``: read the result of the next number ahead."""
        if not self.has(index):
            return None
        begun = self._ahead.pop(index, None)
        found = self._load(index) if begun is None else begun.result()
        if ahead and isinstance(index, int) and self._file(following := index + 1) in self._files:
            self._ahead = {following: self._thread.submit(self._load, following)}
        return found

    def file(self, index: Index) -> tuple[Path, str] | None:
        """A result's file, on the disk and not only in the page cache, and its SHA-256; None if it is not kept whole.

        The content is not read.
        """
        self.flush()
        if not self.has(index):
            return None
        name = self._file(index)
        expected = self._files[name]
        try:
            with self._path(name).open("rb") as stream:
                os.fsync(stream.fileno())  # or the first reads past the page cache would wait for it
                whole = os.fstat(stream.fileno()).st_size == expected["bytes"]
        except OSError:
            whole = False
        return (self._path(name), expected["sha256"]) if whole else None

    def _load(self, index: Index) -> T | None:
        name = self._file(index)
        expected = self._files.get(name)
        if expected is None:  # the disk was full meanwhile
            return None
        try:
            with self._path(name).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != expected["bytes"]:
                    raise ValueError(f"{size} bytes instead of {expected['bytes']}")
                content = PinnedBuffer(size, pin=False)
                stream.readinto(content.tensor.numpy())
            if hashlib.sha256(content.tensor.numpy()).hexdigest() != expected["sha256"]:
                raise ValueError("its content has changed")
            return self.parse(content)
        except UNREADABLE as error:
            self._damaged(name, error)
            return None

    def _manifest(self) -> dict[str, dict[str, Any]]:
        try:
            files = json.loads(self._path(MANIFEST).read_text(encoding="utf-8"))["files"]
            return {
                str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in files.items()
            }
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except UNREADABLE as error:
            self._damaged(MANIFEST, error)
            return {}

    # ------------------------------------------------------------------------------------------- writing

    def put(self, index: Index, content: Callable[[], Sequence[Content]]) -> None:
        """Write a result behind, after the one before it; ``content`` (pieces of its file) is called in the thread."""
        self.flush()
        if self.trouble is None and not self._locked:
            self._acquire()
        if self.trouble is None:
            self._writing = self._thread.submit(self._write, self._file(index), content)

    def _acquire(self) -> None:
        """Acquire the write lock, then re-read the manifest in case another process updated it."""
        assert self.folder is not None
        try:
            self._held.enter_context(folder_lock(self.folder, self.note, wait=self.waits))
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        self._locked = True
        for part in self.folder.glob(f"*{SCRATCH}"):  # of a process that was killed
            with suppress(OSError):  # another user's
                part.unlink(missing_ok=True)
        self._files = self._manifest()
        there = sum(entry["bytes"] for entry in self._files.values())
        needed, free = int(max(0, self.expected_bytes - there) * SLACK), free_space(self.folder)
        if free < needed:
            self._give_up(f"it needs {needed / 1e9:.1f} GB in {self.folder} and {free / 1e9:.1f} GB are free")

    def _write(self, name: str, content: Callable[[], Sequence[Content]]) -> None:
        """In the thread: a result's file, then the manifest. No fsync: hashes detect a file that a crash cut off."""
        assert self.folder is not None
        try:
            pieces, digest = content(), hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            self.folder.mkdir(exist_ok=True)
            write_atomic(self._path(name), *pieces, durable=False)
            entry = {"bytes": sum(len(piece) for piece in pieces), "sha256": digest.hexdigest()}
            self._files = {**self._files, name: entry}
            manifest = {"facts": self.facts, "format": self.format, "files": self._files}
            text = json.dumps(manifest, indent=1) + "\n"
            write_atomic(self._path(MANIFEST), text.encode(), durable=False)
            self._wrote = True
        except (OSError, MemoryError, SafetensorError) as error:
            why = f"cannot write to {self.folder} ({getattr(error, 'strerror', None) or error})"
            if is_full_disk(error):
                why = f"the disk of {self.folder} is full"
                for own in (*self._files, name, MANIFEST):  # give back what was taken, and nothing else
                    with suppress(OSError):
                        self._path(own).unlink(missing_ok=True)
                self._files = {}
            self._give_up(why)

    def flush(self) -> None:
        """Wait until what was put is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    # ------------------------------------------------------------------------------------------- the folder

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _file(self, index: Index) -> str:
        return f"layer_{index:03}{self.suffix}" if isinstance(index, int) else f"{index}{self.suffix}"

    def _damaged(self, name: str, error: Exception) -> None:
        """Note a file that cannot be used, once; in the user's folder raise."""
        why = f"{name} is damaged ({error.strerror or error if isinstance(error, OSError) else error})"
        if self.owned:
            raise self._refusal(why) from error
        if name not in self._said:
            self._said.add(name)
            self.note(f"the cached {self.name}'s {why}: {self.making} it again")

    def _give_up(self, why: str) -> None:
        self.trouble = why
        if self.required:
            raise SubspecError(
                f"offload=stream keeps a {self.name} on disk: {why}; make room, or set SUBSPEC_CACHE to a folder on a "
                "larger disk"
            )
        if self.owned:
            raise SubspecError(f"quant.folder={self.folder}: the {self.name} cannot be kept there: {why}")
        self.note(f"the {self.name} is not cached: {why}")

    def _check_owned(self) -> None:
        """Refuse a user's folder that is neither empty nor holds results of these facts."""
        assert self.folder is not None
        file = self.folder / MANIFEST
        try:
            if not file.is_file():
                if self.folder.exists() and any(self.folder.iterdir()):
                    raise self._refusal("it holds other files")
                return
            found = json.loads(file.read_text(encoding="utf-8"))
            kept, kept_format = dict(found["facts"]), found["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"its {MANIFEST} is damaged ({type(error).__name__})") from error
        if kept_format != self.format:
            raise self._refusal(f"it has format {kept_format}, this version reads {self.format}")
        # The weights' checksums tell the target, whose checkpoint may have moved.
        for key in sorted((kept.keys() | self.facts.keys()) - {"target"}):
            if kept.get(key) != self.facts.get(key):
                raise self._refusal(f"it was made with {key} {kept.get(key)}, this run has {self.facts.get(key)}")

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"quant.folder={self.folder} cannot be used: {why}; name a new folder, where the {self.name} is then kept"
        )
