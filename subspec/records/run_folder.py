"""The run folder: one JSON line per finished turn, safe against a kill at any byte.

A run on a slow link takes hours, so a finished turn must not be lost, repeated or mixed with another run. Each turn is
one ``write`` followed by ``fsync``. On resume, incomplete lines are moved to ``records.jsonl.damaged`` and reported. An
operating-system lock, released when its process ends, excludes a second process. A resumed run must have the
configuration of the first.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import filelock
import yaml

from subspec.config.effective import effective
from subspec.errors import ConfigError, SubspecError
from subspec.records.run_files import CONFIG, DAMAGED, ELSEWHERE, ENVIRONMENT, RECORDS, SUMMARY, read_json, take_lock
from subspec.records.same_run import config_differences
from subspec.utils.files import RESUME_HINT, json_line, plain, sync_folder, write_atomic, write_json, writing

Key = tuple[str, int]
Check = Callable[[Sequence[Mapping[str, Any]]], None]


class RunFolder:
    """A run's folder, held by one process. Create it with :meth:`open`; use it as a context manager.

    Attributes:
        path: the folder.
        notes: findings and repairs of opening it, one line each, for the console.
        resumed: whether it held records when it was opened.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock, config: Mapping[str, Any]) -> None:
        self.path = path
        self.notes: list[str] = []
        self.resumed = False
        self._lock = lock
        self._config = dict(config)
        self._records: dict[Key, dict[str, Any]] = {}
        self._file: int | None = None

    @classmethod
    def open(
        cls,
        run_dir: str | os.PathLike[str],
        *,
        resume: bool,
        config: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
        check: Check | None = None,
    ) -> Self:
        """Lock the folder, check that it belongs to this run, repair it, and write the run's description.

        Args:
            config: the resolved configuration as builtin types.
            environment: versions and hardware; those of a resumed session are appended to the first.
            check: raises ConfigError if a run of today's data, weights and device cannot continue these records.

        Raises:
            ConfigError: it holds records and ``resume`` is false, or the records are of another configuration, or
                ``check`` refuses them.
            SubspecError: it cannot be written, or another process is writing it.
        """
        path = Path(run_dir)
        with writing(path, ELSEWHERE):
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
        if lock is None:
            raise SubspecError(f"run_dir={path} is in use by another process: wait for it, or {ELSEWHERE}")
        folder = cls(path, lock, plain(config))
        with contextlib.ExitStack() as failed, writing(path, ELSEWHERE):
            failed.callback(folder.close)
            folder._load(resume, check)
            folder._describe(plain(environment))
            folder._file = os.open(path / RECORDS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            sync_folder(path)
            failed.pop_all()
        return folder

    def __len__(self) -> int:
        """Number of records; the position of the next one."""
        return len(self._records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, sample_id: str, turn: int = 0) -> dict[str, Any] | None:
        """The record of a finished or skipped turn, or None."""
        return self._records.get((str(sample_id), turn))

    def records(self) -> list[dict[str, Any]]:
        """All records in the order of writing, each turn once."""
        return list(self._records.values())

    def append(self, record: Mapping[str, Any]) -> bool:
        """Write a record and wait until it is on disk. Returns False and writes nothing if its turn is already there.

        Raises:
            SubspecError: the disk is full or broken. No part of the record remains in the file.
        """
        if self._file is None:
            raise RuntimeError(f"{self.path / RECORDS} is closed")
        line = json_line(record)
        # Keep the values that a reader would get back, so that a resumed run computes with the same ones.
        record = json.loads(line)
        key = _key(record)
        if key is None:
            raise ValueError("a record needs sample_id (str) and turn (int)")
        if key in self._records:
            return False
        start = os.fstat(self._file).st_size
        with writing(self.path / RECORDS, RESUME_HINT.format(run_dir=self.path)):
            try:
                written = os.write(self._file, line)
                if written != len(line):  # a full disk may accept a part; writing the rest raises the reason
                    os.write(self._file, line[written:])
                    raise OSError("only a part of a record was written")
                os.fsync(self._file)
            except BaseException:  # also an interrupt: the caller assumes that nothing was written
                with contextlib.suppress(OSError):  # if this fails, resuming repairs the file
                    os.ftruncate(self._file, start)
                raise
        self._records[key] = record
        return True

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder."""
        with writing(self.path / name, RESUME_HINT.format(run_dir=self.path)):
            write_json(self.path / name, content)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace ``summary.json``; adds the configuration and the environment to the figures."""
        environment = read_json(self.path / ENVIRONMENT)
        self.write(SUMMARY, {**summary, "config": self._config, "environment": environment})

    def close(self) -> None:
        """Close the file and release the lock. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.release()

    # ---------------------------------------------------------------------------------------- opening

    def _load(self, resume: bool, check: Check | None) -> None:
        file = self.path / RECORDS
        data = file.read_bytes() if file.exists() else b""
        if data and not resume:
            raise ConfigError(
                f"run_dir={self.path} already holds records: continue it with resume=true, or {ELSEWHERE}"
            )
        if data:
            scan = _Scan(data)
            self._check_same_run()
            if check is not None:
                check(list(scan.records.values()))
            self._repair(data, scan)
            self.resumed = bool(self._records)
        if self.resumed:
            self.notes.append(f"resuming: {len(self)} finished turn(s) in {file} are kept")
        elif resume:
            self.notes.append(f"resume=true, but {file} holds no finished turn: starting from the beginning")

    def _check_same_run(self) -> None:
        file = self.path / CONFIG
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
            before = None
        if not isinstance(before, dict):
            raise ConfigError(
                f"resume=true, but {file} is missing or unreadable, so nothing tells which run the records belong "
                f"to; {ELSEWHERE}"
            )
        differences = config_differences(effective(before), effective(self._config))
        if differences:
            raise ConfigError(
                f"resume=true, but the configuration differs from the one in {file}: {'; '.join(differences)}. "
                f"Use the same values, or {ELSEWHERE}"
            )

    def _repair(self, data: bytes, scan: "_Scan") -> None:
        self._records = scan.records
        if scan.damaged:
            # Save the fragments before replacing the file: a kill in between saves them twice instead of losing them.
            with (self.path / DAMAGED).open("ab") as file:
                file.write(b"".join(fragment + b"\n" for _, fragment in scan.damaged))
                file.flush()
                os.fsync(file.fileno())
            write_atomic(self.path / RECORDS, b"".join(line + b"\n" for line in scan.lines))
        elif not data.endswith(b"\n"):  # killed between a complete record and its newline
            write_atomic(self.path / RECORDS, data + b"\n")
        self.notes.extend(scan.notes(self.path))

    def _describe(self, environment: dict[str, Any] | None) -> None:
        """Write ``config.yaml`` (a resumed run may be extended), and append the session to ``environment.json``."""
        text = yaml.safe_dump(self._config, sort_keys=False, width=110)
        write_atomic(self.path / CONFIG, text.encode("utf-8"))
        if environment is None:
            return
        first = read_json(self.path / ENVIRONMENT) if self.resumed else None
        if first is None:
            write_json(self.path / ENVIRONMENT, environment)
            return
        before, now = (
            {part: facts.get(part) for part in ("versions", "hardware", "git")} for facts in (first, environment)
        )
        if changed := config_differences(before, now):
            self.notes.append(f"resumed in another environment, so times may not compare: {'; '.join(changed)}")
        sessions = [*first.get("resumed", []), environment]
        write_json(self.path / ENVIRONMENT, {**first, "resumed": sessions})


def read_records(run_dir: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the records of a run and notes about damage, without locking or changing anything.

    Raises:
        SubspecError: there is no ``records.jsonl`` that can be read.
    """
    path = Path(run_dir)
    try:
        data = (path / RECORDS).read_bytes()
    except OSError as error:
        raise SubspecError(f"cannot read {path / RECORDS}: {error.strerror}; give the folder of a run") from error
    scan = _Scan(data)
    return list(scan.records.values()), scan.notes(path, repaired=False)


# ------------------------------------------------------------------------------------------------ parts


class _Scan:
    """Content of a records file: ``records`` by key, complete ``lines``, ``damaged`` (line number, bytes)."""

    def __init__(self, data: bytes) -> None:
        self.records: dict[Key, dict[str, Any]] = {}
        self.lines: list[bytes] = []
        self.damaged: list[tuple[int, bytes]] = []
        self.duplicates = 0
        pieces = data.removesuffix(b"\n").split(b"\n")
        self.last = len(pieces)
        for number, piece in enumerate(pieces, start=1):
            if not piece.strip():
                continue
            record = _parse(piece)
            key = record and _key(record)
            if not record or not key:
                self.damaged.append((number, piece))
                continue
            self.lines.append(piece)
            self.duplicates += key in self.records
            self.records.setdefault(key, record)

    def notes(self, path: Path, repaired: bool = True) -> list[str]:
        notes = []
        done = f"moved to {path / DAMAGED}, its turn runs again" if repaired else "ignored"
        for number, fragment in self.damaged:
            what = "half-written last line" if number == self.last else "damaged line"
            notes.append(f"{path / RECORDS}: {what} {number} ({len(fragment)} bytes) {done}")
        if self.duplicates:
            notes.append(f"{path / RECORDS}: {self.duplicates} repeated record(s) ignored, the first one counts")
        return notes


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        return None
    return value if isinstance(value, dict) else None


def _key(record: Mapping[str, Any]) -> Key | None:
    sample_id, turn = record.get("sample_id"), record.get("turn")
    if not isinstance(sample_id, str) or not isinstance(turn, int) or isinstance(turn, bool):
        return None
    return sample_id, turn
