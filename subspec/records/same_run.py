"""Whether a run continues the records of another: keys that may differ, and resolved values that may not."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from subspec.config.enums import AUTO
from subspec.errors import ConfigError
from subspec.records.run_files import ELSEWHERE, RECORDS

FREE_KEYS = frozenset(
    {
        *("resume", "run_dir", "logger", "experiment", "hparams_search"),
        *("optimise", "study", "baseline", "benchmark.max_samples"),
    }
)
"""Keys that may differ when a run is resumed, because they change no record.

``experiment`` names values that are compared themselves. Fewer samples are a prefix of more, so a run may be extended.
All other keys must match: ``audit`` changes records, ``device`` and ``warmup`` change times.
"""

CHOSEN = {"source": "benchmark.source", "device": "device", "bitwise": "decoding.bitwise", "texts": "decoding.texts"}
"""Keys that may be ``auto``, by the record field that holds the resolved value.

A hub that answers again or a missing GPU changes the resolved value under the same configuration. The value resolved
now is compared with the records, so a resumed run may also name the earlier value explicitly.
"""

GONE = {"tree.ahead": 0}
"""Keys of earlier versions, with the value at which they had no effect."""

NEW = {"decoding.texts": 1}
"""Keys that older folders lack, with the value of their runs."""

BEFORE = {"bitwise": False, "texts": 1}
"""Resolved value in records older than the field."""

_ABSENT = object()


def check_chosen(run_dir: Path, records: Iterable[Mapping[str, Any]], chosen: Mapping[str, str]) -> None:
    """Refuse to mix records of another data source, device or arithmetic with ``records``, by a ConfigError.

    Args:
        chosen: values that the keys of :data:`CHOSEN` have now, by record field.
    """
    records = list(records)
    for field, now in chosen.items():
        values = [record.get(field, BEFORE.get(field)) for record in records]
        before = {str(value).lower() for value in values if value is not None}
        if before <= {now}:
            continue
        key, found = CHOSEN[field], " and ".join(sorted(before))
        remedy = f"set {key}={found}, or " if len(before) == 1 else ""
        raise ConfigError(
            f"resume=true, but {key} comes to {now} now, and the records in {run_dir / RECORDS} are of {found}: "
            f"{remedy}{ELSEWHERE}"
        )


def config_differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ, as ``key: old -> new``.

    :data:`FREE_KEYS` are not compared, nor ``auto`` of :data:`CHOSEN` keys.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        paths = {name: f"{key}.{name}" if key else str(name) for name in {**before, **now}}
        return [
            line
            for name, path in paths.items()
            if path not in FREE_KEYS
            for line in config_differences(before.get(name, _ABSENT), now.get(name, _ABSENT), path)
        ]
    if before == now and isinstance(before, bool) == isinstance(now, bool):
        return []
    if key in CHOSEN.values() and AUTO in (before, now):
        return []
    if now is _ABSENT and before == GONE.get(key, _ABSENT):
        return []
    if before is _ABSENT and now == NEW.get(key):  # a key that is newer than the folder and not used
        return []
    return [f"{key}: {_shown(before)} -> {_shown(now)}"]


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, default=str)
