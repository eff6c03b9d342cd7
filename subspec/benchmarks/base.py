"""Data types of the benchmarks: a sample, a loaded benchmark, a row of a data set, a task.

A *task* knows how one row in the hub's schema becomes a :class:`Sample`; the same converter serves every
source, so a local file needs the hub's column names and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from subspec.config.schema import Source
from subspec.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """One prompt of a benchmark.

    Attributes:
        id: stable across runs and sources, e.g. ``gsm8k/17`` or the data set's own id.
        turns: user messages, in order.
        answer: the reference answer in canonical form, when one can be checked.
    """

    id: str
    turns: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """The prompts of a run and where they came from.

    Attributes:
        name: the benchmark's registered name.
        source: what was actually used; never ``auto``.
        source_detail: hub coordinates, the file path as configured, or "packaged sample prompts".
        note: what ``source=auto`` chose and why, in one line; None for an explicit source.
        samples: shuffled with the seed and cut to ``max_samples``.
        available: number of rows before the cut.
    """

    name: str
    source: Source
    source_detail: str
    note: str | None
    samples: list[Sample]
    available: int


class Row:
    """One row of a data set, with field access that explains what is wrong with it.

    Every accessor takes several names: data sets that carry the same content do not always agree on a
    column's name, and the first name that is present wins.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def error(self, problem: str) -> ConfigError:
        """An error that says where the row is and which fields it has."""
        found = ", ".join(sorted(map(str, self._data))) or "none"
        return ConfigError(f"{self._where}: {problem} (fields found: {found})")

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if self._data.get(name) is not None:
                return name, self._data[name]
        wanted = " or ".join(f"'{name}'" for name in names)
        raise self.error(f"the row has no field {wanted}; rename the column or point to the right data")

    def text(self, *names: str) -> str:
        """A field that must hold a non-empty string."""
        name, value = self._find(names)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field '{name}' must be a non-empty string, not {_describe(value)}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """A field that must hold a non-empty list of non-empty strings."""
        name, value = self._find(names)
        if (
            not isinstance(value, list | tuple)
            or not value
            or not all(isinstance(item, str) and item.strip() for item in value)
        ):
            raise self.error(f"field '{name}' must be a list of non-empty strings, not {_describe(value)}")
        return tuple(value)

    def scalar(self, *names: str) -> str:
        """A field that may be a string or a whole number (data sets differ), as a string."""
        name, value = self._find(names)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise self.error(f"field '{name}' must be a string or a whole number, not {_describe(value)}")
        return str(value).strip()

    def optional(self, name: str) -> str | None:
        """A field that may be absent, null or empty."""
        value = self._data.get(name)
        return value if isinstance(value, str) and value.strip() else None


def _describe(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


@dataclass(frozen=True)
class Checker:
    """How an answer is found in a model's text, and when it equals the reference."""

    extract: Callable[[str], str | None]
    matches: Callable[[str, str], bool]


@dataclass(frozen=True)
class Prompt:
    """What a converter makes of a row: the user messages and the reference answer, if any."""

    turns: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Task:
    """One benchmark: how a row becomes a prompt and how its answer is checked.

    Attributes:
        convert: ``(row, sample id, seed) -> Prompt``; raises through :meth:`Row.error` for an unusable row.
        columns: every column ``convert`` reads; others are dropped while reading very large files.
        id_columns: columns that may hold the data set's own id, first match wins; else the row number is it.
        own_ids: the data set's ids already name the benchmark and are used as they are.
        checker: how answers are checked, or None when that would mean running code or judging prose.
    """

    convert: Callable[[Row, str, int], Prompt]
    columns: tuple[str, ...]
    id_columns: tuple[str, ...] = ("id",)
    own_ids: bool = False
    checker: Checker | None = None
