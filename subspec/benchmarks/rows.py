"""Rows of a data set: reading them from files, and access to their fields.

A local file needs the columns of the data set on the hub and nothing else.
"""

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from subspec.errors import ConfigError, SubspecError

FORMATS = "JSON Lines, a JSON array, CSV, TSV (each also as .gz, .bz2 or .xz) or Parquet"


class RowError(ConfigError):
    """One unusable row. ``short``: the message without the name of the data and the row's fields."""

    def __init__(self, message: str, short: str) -> None:
        super().__init__(message)
        self.short = short


class DataUnavailableError(SubspecError):
    """The data set cannot be had from here: no network, no permission, or published without its texts.

    ``source=auto`` then uses packaged prompts. ``reason`` says why.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class Row:
    """One row of a data set. Errors say where the row is and which fields it has.

    Accessors take several names because data sets of the same content differ in column names. The first name that is
    present is used.
    """

    def __init__(self, data: Mapping[str, Any], source: str, place: str) -> None:
        """``source``: the data, as named in messages; ``place``: e.g. ``line 7``."""
        self._data = data
        self._place = place
        self.where = f"{source} {place}"

    def error(self, problem: str) -> RowError:
        """An error about this row."""
        found = ", ".join(sorted(map(str, self._data))) or "none"
        return RowError(f"{self.where}: {problem} (fields found: {found})", f"{self._place}: {problem}")

    def _field(self, names: tuple[str, ...], valid: Callable[[Any], bool], expected: str) -> Any:
        name = next((name for name in names if self._data.get(name) is not None), None)
        if name is None:
            wanted = " or ".join(f"'{name}'" for name in names)
            raise self.error(f"the row has no field {wanted}; rename the column or point to the right data")
        value = self._data[name]
        if not valid(value):
            shown = repr(value)
            shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
            raise self.error(f"field '{name}' must be {expected}, not {shown}")
        return value

    def text(self, *names: str) -> str:
        """A non-empty string."""
        return self._field(names, _is_text, "a non-empty string")

    def texts(self, *names: str) -> tuple[str, ...]:
        """A non-empty list of non-empty strings."""
        return tuple(self._field(names, _is_texts, "a list of non-empty strings"))

    def user_messages(self, name: str) -> tuple[str, ...] | None:
        """Texts of the user messages of a conversation; None if the field is absent or null.

        Assistant messages are left out: the model's own answers take their place.
        """
        if self._data.get(name) is None:
            return None
        expected = "a list of messages, each with role (user or assistant) and content (text)"
        messages = self._field((name,), _is_conversation, expected)
        return tuple(message["content"] for message in messages if message["role"] == "user")

    def scalar(self, *names: str) -> str:
        """A string or a number (data sets differ), as a string."""
        value = self._field(names, _is_scalar, "a string or a number")
        return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()

    def optional(self, name: str) -> str | None:
        """A string, or None if the field is absent, null or empty."""
        value = self._data.get(name)
        return value if _is_text(value) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))


def _is_conversation(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return False
    users = [message.get("content") for message in value if message.get("role") == "user"]
    return _is_texts(users) and all(message.get("role") in ("user", "assistant") for message in value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) < float("inf")
    return _is_text(value)


@dataclass(frozen=True)
class Table:
    """All rows of a data set, which may be decoded only when they are read.

    Attributes:
        rows: a list, or a data set of the library ``datasets``.
        shown: name of the data in messages.
        places: where the rows stand in their file, e.g. ``line 7``; None: rows of the hub, counted from 0.
    """

    rows: Sequence[dict[str, Any]]
    shown: str
    places: list[str] | None = None

    @classmethod
    def read(cls, path: Path, shown: str) -> "Table":
        """All rows of a file, see :func:`read_rows`."""
        read = list(read_rows(path, shown))
        return cls([row for _, row in read], shown, [place for place, _ in read])

    def column(self, name: str) -> list[Any]:
        """All values of a column; None where it is absent."""
        if isinstance(self.rows, list):
            return [row.get(name) for row in self.rows]
        return list(self.rows[name]) if name in self.rows.column_names else [None] * len(self.rows)

    def row(self, index: int) -> Row:
        """One row, with its place in messages."""
        return Row(self.rows[index], self.shown, self.places[index] if self.places else f"row {index}")


# --------------------------------------------------------------------------------------------------- files

_PARQUET = b"PAR1"
_COMPRESSED: dict[bytes, Callable[..., TextIO]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or spreadsheet: unpack or export it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"ARROW1": "an Arrow file: convert it to Parquet",
    b"\xff\xff\xff\xff": "an Arrow file: convert it to Parquet",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"version ": "a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"<": "an HTML or XML page: download the raw file",
}
"""Contents that are recognized by their first bytes and not read."""


def read_rows(path: Path, shown: str, columns: tuple[str, ...] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``line N`` or ``row N`` (from 1) and the row, for every row of a file in one of :data:`FORMATS`.

    Args:
        path: the file.
        shown: its name in error messages, e.g. ``benchmark.path=rows.jsonl``.
        columns: keys to keep (files of some data sets hold gigabytes of test cases); None keeps all.

    Raises:
        ConfigError: the file is in none of the formats or damaged.
    """
    if path.is_dir():
        raise ConfigError(
            f"{shown} is a folder; give a file, or benchmark.source=hub benchmark.hub.path=FOLDER for a folder of them"
        )
    try:
        with path.open("rb") as file:
            head = file.read(8)
        foreign = next((text for magic, text in _FOREIGN.items() if head.startswith(magic)), None)
        if foreign:
            raise ConfigError(f"{shown} is {foreign}; readable: {FORMATS}")
        rows = _parquet(path, columns) if head.startswith(_PARQUET) else _text(path, head, shown)
        for where, row in rows:
            yield where, row if columns is None else {key: row[key] for key in columns if key in row}
    except FileNotFoundError:
        raise ConfigError(f"{shown} does not exist; give the path of a file: {FORMATS}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text ({error.reason}); give a file: {FORMATS}") from None
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error, lzma.LZMAError, csv.Error, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"{shown} is damaged ({reason}); readable: {FORMATS}") from None


def _parquet(path: Path, columns: tuple[str, ...] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        kept = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
        rows = (row for batch in file.iter_batches(1024, columns=kept) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _text(path: Path, head: bytes, shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of JSON Lines, a JSON array, CSV or TSV, compressed or not."""
    opener = next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), open)
    name = path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".xz") else path
    separator = {".csv": ",", ".tsv": "\t"}.get(name.suffix.lower())
    # utf-8-sig: some editors write a byte order mark.
    with opener(path, "rt", encoding="utf-8-sig", newline="" if separator else None) as lines:
        if separator:
            csv.field_size_limit(2**31 - 1)  # articles and test cases exceed its 128 KiB
            table = csv.DictReader(lines, delimiter=separator)
            for number, row in enumerate(table, start=1):
                yield f"row {number}", {key: value for key, value in row.items() if key is not None}
            return
        first = True
        for number, line in enumerate(lines, start=1):
            if first and line.lstrip().startswith("["):
                for place, row in enumerate(_parse(line + "".join(lines), shown), start=1):
                    yield f"row {place}", _object(row, f"{shown} row {place}")
            elif line.strip():
                yield (f"line {number}", _object(_parse(line, f"{shown} line {number}"), f"{shown} line {number}"))
            first = first and not line.strip()


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(f"{where} is not JSON ({reason}); readable: {FORMATS}") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a JSON object; every row must be one")
    return row
