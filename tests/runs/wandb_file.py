"""Reads a ``.wandb`` file: protobuf records in LevelDB's log format (32 KiB blocks of checksummed chunks)."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def read(path: Path) -> list[Any]:
    """The records of a run file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), HEADER, b"", []  # a seven-byte file header comes first
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # a block's end too small for a header is padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def items(updates: Any) -> dict[str, Any]:
    """Key and JSON value pairs of a config, history or summary message."""
    return {".".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The rows of the run's series."""
    return [items(r.history.item) for r in records if r.HasField("history")]


def config(records: list[Any]) -> dict[str, Any]:
    """The run's configuration, as given to ``wandb.init``."""
    run = next(r.run for r in records if r.HasField("run"))
    return items(run.config.update)


def summary(records: list[Any]) -> dict[str, Any]:
    """The run's summary after all updates."""
    merged: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            merged |= items(record.summary.update)
    return merged
