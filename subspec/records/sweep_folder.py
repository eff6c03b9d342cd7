"""A sweep's folder: its lock, and ``sweep.json``, which says which job lies in which folder.

A job is known by the digest of its resolved configuration, without the keys that change no record: spelling an
override differently or in another order finds the same job, changing the configuration makes a new one, and asking
for more samples extends the old one.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from subspec.errors import ConfigError, SubspecError
from subspec.records.records import FREE_KEYS, LOCK
from subspec.utils.files import write_error, write_json

MANIFEST = "sweep.json"
ROOT = "multirun"
"""Where sweeps go that are given no folder (``conf/hydra/default.yaml``)."""

REMEDY = "choose another folder with sweep_dir="


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    Attributes:
        number: name of its folder.
        overrides: of its configuration, as the sweeper gave them.
        digest: of its resolved configuration.
    """

    number: int
    overrides: tuple[str, ...]
    digest: str


class SweepFolder:
    """A sweep's folder, held by one process. Make one with :meth:`open`; use it as a context manager."""

    def __init__(
        self, path: Path, lock: filelock.BaseFileLock, command: Sequence[str], made: Sequence[Path] = ()
    ) -> None:
        self.path = path
        self.command = list(command)
        self.jobs: dict[str, Job] = {}
        self.finished = False
        self._lock = lock
        self._made = list(made)  # folders that were not there before, the innermost first

    @classmethod
    def open(cls, path: str | os.PathLike[str], command: Sequence[str]) -> Self:
        """Take the folder and read which jobs it holds.

        Args:
            command: the overrides of the whole sweep, to be found again by.

        Raises:
            SubspecError: another process is writing it, or it cannot be written.
            ConfigError: it holds a single run, or a manifest that cannot be read.
        """
        path = Path(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise write_error(error, path, REMEDY) from error
        if lock is None:
            raise SubspecError(
                f"sweep_dir={path} is in use by another process: wait for it, or {REMEDY}FOLDER"
            )
        folder = cls(path, lock, command, made)
        try:
            if (path / "records.jsonl").exists():
                raise ConfigError(f"sweep_dir={path} holds the records of a single run: {REMEDY}FOLDER")
            folder._read()
        except BaseException:
            folder.close()
            raise
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def assign(self, wanted: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[Job]:
        """The jobs of a list of (overrides, resolved configuration); new ones get the next numbers.

        Equal configurations are one job.

        Raises:
            SubspecError: the manifest cannot be written.
        """
        jobs, known = [], len(self.jobs)
        for overrides, config in wanted:
            digest = config_digest(config)
            if digest not in self.jobs:
                self.jobs[digest] = Job(self._free_number(), tuple(overrides), digest)
            jobs.append(self.jobs[digest])
        if len(self.jobs) > known or not (self.path / MANIFEST).exists():
            self.write()
        return jobs

    def job_folder(self, job: Job) -> Path:
        """Where a job's run lies."""
        return self.path / str(job.number)

    def write(self, finished: bool = False) -> None:
        """Replace ``sweep.json``. ``finished``: nothing is missing.

        Raises:
            SubspecError: it cannot be written.
        """
        self.finished = finished
        jobs = [
            {"number": job.number, "overrides": list(job.overrides), "digest": job.digest}
            for job in self.jobs.values()
        ]
        content = {"command": self.command, "finished": finished, "jobs": jobs}
        try:
            write_json(self.path / MANIFEST, content)
        except OSError as error:
            raise write_error(error, self.path / MANIFEST, REMEDY) from error

    def close(self) -> None:
        """Let go of the lock. May be called twice. A folder made for jobs that never came to be goes again."""
        if self._made and not self.jobs:
            with contextlib.suppress(OSError):  # something lies in it
                if not any(entry.name != LOCK for entry in self.path.iterdir()):
                    (self.path / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._made = []
        self._lock.release()

    def _free_number(self) -> int:
        used = {job.number for job in self.jobs.values()}
        used |= {int(entry.name) for entry in self.path.iterdir() if entry.name.isdigit()}
        return max(used, default=-1) + 1

    def _read(self) -> None:
        manifest = read_manifest(self.path)
        if manifest is None:
            if (self.path / MANIFEST).exists():
                raise ConfigError(
                    f"{self.path / MANIFEST} cannot be read: mend it, or {REMEDY}FOLDER (the runs below it are whole)"
                )
            return
        for entry in manifest["jobs"]:
            job = Job(entry["number"], tuple(entry["overrides"]), entry["digest"])
            self.jobs[job.digest] = job


def read_manifest(path: Path) -> dict[str, Any] | None:
    """``sweep.json`` of a folder; None when there is none that can be read."""
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        [(entry["number"], entry["overrides"], entry["digest"]) for entry in found["jobs"]]
        found["command"], found["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def unfinished_sweep(command: Sequence[str], root: Path = Path(ROOT)) -> Path | None:
    """The newest folder below ``root`` in which the same sweep was stopped, and which nobody is writing."""
    wanted = sorted(command)
    for file in sorted(root.glob(f"*/*/{MANIFEST}"), reverse=True):
        manifest = read_manifest(file.parent)
        if manifest is None or sorted(manifest["command"]) != wanted:
            continue
        if manifest["finished"]:
            return None  # measured to the end: the same command measures anew
        lock = _lock(file.parent)
        if lock is not None:
            lock.release()
            return file.parent
    return None


def config_digest(config: Mapping[str, Any]) -> str:
    """Identifies what a run computes: its resolved configuration without the keys that change no record."""
    text = json.dumps(_without_free_keys(config), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _without_free_keys(config: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in config.items():
        key = f"{parent}{name}"
        if key not in FREE_KEYS:
            kept[name] = _without_free_keys(value, f"{key}.") if isinstance(value, Mapping) else value
    return kept


def _lock(path: Path) -> filelock.BaseFileLock | None:
    """The folder's lock, or None when another process holds it; it dies with its owner."""
    lock = filelock.FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    return lock
