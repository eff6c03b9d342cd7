"""Times of small kernels: measured inside a CUDA graph, and kept in a file per card and version of the kernels."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path

import torch

from subspec.utils.capture import capturing
from subspec.utils.console import Note
from subspec.utils.disk import replace_file

ROUNDS = 3
"""Measurements of which the fastest counts: what disturbs a kernel only ever makes it slower."""

FORMAT = 1
"""Of the file."""


def graph_time(call: Callable[[], object], repeats: int = 20) -> float:
    """Seconds per call of ``call``, which may launch several kernels."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        call()
    graph.replay()
    best = float("inf")
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / repeats)
    return best


def slug(text: str) -> str:
    """Lower case, everything but letters, digits, dots and pluses a dash: part of a file name."""
    return "-".join(
        "".join(c if c.isascii() and (c.isalnum() or c in ".+") else " " for c in text.lower()).split()
    )


def source_hash(sources: Iterable[str]) -> str:
    """Twelve hex digits of the source that times belong to.

    Args:
        sources: files of the package, as ``kernels/int4.py``.
    """
    digest = hashlib.sha256()
    for name in sources:
        digest.update(resources.files("subspec").joinpath(name).read_bytes())
    return digest.hexdigest()[:12]


def read_times(file: Path, note: Note) -> dict[str, dict[str, float]]:
    """Microseconds by ``role shape format rows`` and candidate; empty, and said, when the file is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["for"] != file.stem:
            note(f"{file} belongs to other kernels or another card: measuring again")
            return {}
        times = {
            key: {name: float(value) for name, value in entry.items()}
            for key, entry in content["microseconds"].items()
        }
        if not all(value > 0 for entry in times.values() for value in entry.values()):
            raise ValueError
        return times
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        note(f"{file} cannot be read ({type(error).__name__}): measuring again")
        return {}


def write_times(file: Path, times: Mapping[str, Mapping[str, float]], note: Note) -> None:
    """Keep ``times`` together with what another process has written meanwhile; a failure is only said."""
    merged = {**read_times(file, lambda text: None), **times}
    content = {"format": FORMAT, "for": file.stem, "microseconds": merged}
    try:
        replace_file(file, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        note(f"the kernels' times are not kept: cannot write {file} ({error.strerror})")
