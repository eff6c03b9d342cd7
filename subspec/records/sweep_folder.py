"""A sweep's folder: its lock, and ``sweep.json``, which maps jobs to folders.

A job is identified by the digest of its resolved configuration without keys that change no record and groups that have
no effect. Another spelling or order of overrides finds the same job, another configuration makes a new one, and more
samples extend the old one.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import filelock

from subspec.config.effective import effective
from subspec.errors import ConfigError, SubspecError
from subspec.records.run_files import LOCK, RECORDS, read_json, take_lock
from subspec.records.same_run import FREE_KEYS
from subspec.utils.files import write_json, writing

MANIFEST = "sweep.json"
ROOT = "multirun"
"""Root of sweeps without a given folder (``conf/hydra/default.yaml``)."""

REMEDY = "choose another folder with sweep_dir="


@dataclass(frozen=True)
class Job:
    """A job of a sweep: the name of its folder, its overrides as given, and the digest of its configuration."""

    number: int
    overrides: tuple[str, ...]
    digest: str


class SweepFolder:
    """A sweep's folder, held by one process. Create it with :meth:`open`; use it as a context manager."""

    def __init__(
        self, path: Path, lock: filelock.BaseFileLock, command: Sequence[str], made: Sequence[Path] = ()
    ) -> None:
        self.path = path
        self.command = list(command)
        self.jobs: dict[str, Job] = {}
        self.finished = False
        self._lock = lock
        self._made = list(made)  # new folders, the innermost first

    @classmethod
    def open(cls, path: str | os.PathLike[str], command: Sequence[str]) -> Self:
        """Lock the folder and read its jobs.

        Args:
            command: overrides of the whole sweep, by which it is found again.

        Raises:
            SubspecError: another process holds it, or it cannot be written.
            ConfigError: it holds a single run, or an unreadable manifest.
        """
        path = Path(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with writing(path, REMEDY):
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
        if lock is None:
            raise SubspecError(f"sweep_dir={path} is in use by another process: wait for it, or {REMEDY}FOLDER")
        with contextlib.ExitStack() as failed:
            folder = failed.enter_context(cls(path, lock, command, made))
            if (path / RECORDS).exists():
                raise ConfigError(f"sweep_dir={path} holds the records of a single run: {REMEDY}FOLDER")
            folder._read()
            failed.pop_all()
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def assign(self, wanted: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[Job]:
        """Jobs of a list of (overrides, resolved configuration); new ones get the next numbers.

        Equal configurations are one job.
        """
        jobs, known = [], len(self.jobs)
        for overrides, config in wanted:
            digest = config_digest(config)
            if digest not in self.jobs:  # as earlier versions identified it
                digest = config_digest(effective(config))
            if digest not in self.jobs:
                self.jobs[digest] = Job(self._free_number(), tuple(overrides), digest)
            jobs.append(self.jobs[digest])
        if len(self.jobs) > known or not (self.path / MANIFEST).exists():
            self.write()
        return jobs

    def job_folder(self, job: Job) -> Path:
        """Run folder of a job."""
        return self.path / str(job.number)

    def write(self, finished: bool = False) -> None:
        """Replace ``sweep.json``. ``finished``: no job is missing."""
        self.finished = finished
        content = {"command": self.command, "finished": finished, "jobs": [asdict(job) for job in self.jobs.values()]}
        with writing(self.path / MANIFEST, REMEDY):
            write_json(self.path / MANIFEST, content)

    def close(self) -> None:
        """Release the lock and remove a new folder without jobs. May be called twice."""
        if self._made and not self.jobs:
            with contextlib.suppress(OSError):  # the folder is not empty
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
    """``sweep.json`` of a folder; None if there is no readable one."""
    found = read_json(path / MANIFEST)
    try:
        if found is not None:
            found["command"], found["finished"]
            [(entry["number"], entry["overrides"], entry["digest"]) for entry in found["jobs"]]
    except (KeyError, TypeError):
        return None
    return found


def unfinished_sweep(command: Sequence[str], root: Path = Path(ROOT)) -> Path | None:
    """Newest folder below ``root`` in which the same sweep was stopped and which no process holds."""
    wanted = sorted(command)
    for file in sorted(root.glob(f"*/*/{MANIFEST}"), reverse=True):
        manifest = read_manifest(file.parent)
        if manifest is None or sorted(manifest["command"]) != wanted:
            continue
        if manifest["finished"]:
            return None  # complete: the same command measures anew
        lock = take_lock(file.parent)
        if lock is not None:
            lock.release()
            return file.parent
    return None


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest of a resolved configuration without the keys that change no record."""
    text = json.dumps(_without_free_keys(config), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _without_free_keys(config: Mapping[str, Any], parent: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in config.items():
        key = f"{parent}{name}"
        if key not in FREE_KEYS:
            kept[name] = _without_free_keys(value, f"{key}.") if isinstance(value, Mapping) else value
    return kept
