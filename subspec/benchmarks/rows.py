"""Rows of a data set: reading them from JSON-lines files, and access to their fields.

A local file needs the columns of the data set on the hub and nothing else.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from subspec.errors import ConfigError


class Row:
    """One row of a data set. Errors say where the row is and which fields it has.

    Accessors take several names because data sets of the same content differ in column names. The first name that is
    present is used.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def error(self, problem: str) -> ConfigError:
        """An error about this row."""
        found = ", ".join(sorted(map(str, self._data))) or "none"
        return ConfigError(f"{self._where}: {problem} (fields found: {found})")

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
        return tuple(
            self._field(
                names,
                lambda value: isinstance(value, list | tuple) and value and all(map(_is_text, value)),
                "a list of non-empty strings",
            )
        )

    def scalar(self, *names: str) -> str:
        """A string or a whole number (data sets differ), as a string."""
        value = self._field(names, _is_scalar, "a string or a whole number")
        return str(int(value) if isinstance(value, float) else value).strip()

    def optional(self, name: str) -> str | None:
        """A string, or None if the field is absent, null or empty."""
        value = self._data.get(name)
        return value if _is_text(value) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_scalar(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def read_rows(
    path: Path, shown: str, columns: tuple[str, ...] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers (from 1) and rows of a JSON-lines file; blank lines are skipped.

    Args:
        path: the file.
        shown: its name in error messages, e.g. ``benchmark.path=rows.jsonl``.
        columns: keys to keep (files of some data sets hold gigabytes of test cases); None keeps all.

    Raises:
        ConfigError: the file or one of its lines is not readable as JSON objects.
    """
    if path.is_dir():
        raise ConfigError(f"{shown} is a folder; give a .jsonl file with one JSON object per line")
    try:
        # utf-8-sig: some editors write a byte order mark.
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{shown} line {number}", columns)
    except FileNotFoundError:
        raise ConfigError(f"{shown} does not exist; give the path of a .jsonl file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text ({error.reason}); give a .jsonl file") from None
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror or error}") from None


def _parse(line: str, where: str, columns: tuple[str, ...] | None) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(f"{where} is not JSON ({reason}); one JSON object per line is expected") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a JSON object; one object per line is expected")
    return row if columns is None else {key: row[key] for key in columns if key in row}
