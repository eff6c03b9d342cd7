"""Times of small kernels: measured inside a CUDA graph, and kept in a file per card and version of the kernels."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch

from subspec.utils.capture import capturing
from subspec.utils.console import Note
from subspec.utils.disk import cache_root
from subspec.utils.files import write_atomic

ROUNDS = 3
"""Measurements of which the fastest counts: disturbances only ever make a kernel slower."""

FORMAT = 1
"""Of the file."""


EventLog = list[tuple[int, torch.cuda.Event, torch.cuda.Event]]
"""Number of a layer, and the events around its work."""


@contextmanager
def logged(log: EventLog | None, layer: int) -> Iterator[None]:
    """Append the work of a layer to ``log``; None: record nothing."""
    if log is None:
        yield
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    yield
    end.record()
    log.append((layer, begin, end))


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
    """Part of a file name: lower case, with a dash for everything but letters, digits, dots and pluses."""
    return "-".join("".join(c if c.isascii() and (c.isalnum() or c in ".+") else " " for c in text.lower()).split())


def source_hash(packages: Iterable[str]) -> str:
    """Twelve hex digits of the sources that times belong to: every ``.py`` and ``.cu`` of these packages."""
    digest = hashlib.sha256()
    for package in packages:
        folder = Path(str(resources.files("subspec").joinpath(package)))
        for file in sorted(file for suffix in ("py", "cu") for file in folder.rglob(f"*.{suffix}")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class TimesFile:
    """Microseconds by key and candidate (``times``), in ``<card>-<torch>-<hash of the sources>.json``.

    Args:
        packages: of the kernels and of everything that launches them (:func:`source_hash`).
        note: receives a message if the file cannot be read or written.
        folder: of the file; that of the cache if None.
        subject: part of the file's name.
    """

    def __init__(
        self, card: str, packages: Iterable[str], note: Note, folder: Path | None = None, subject: str = ""
    ) -> None:
        name = "-".join([slug(card), slug(torch.__version__), *filter(None, [subject]), source_hash(packages)])
        self.path = (folder or cache_root() / "kernels") / f"{name}.json"
        self._note = note
        self.times = self._read(note)

    def measure(self, key: str, candidates: Mapping[str, Callable[[], float]]) -> dict[str, str]:
        """Add the times of the candidates that ``key`` lacks: calls that return seconds.

        Returns:
            First line of the error of every candidate that failed; any exception means that it does not run here.
        """
        times, failed = self.times.setdefault(key, {}), {}
        for name, seconds in candidates.items():
            if name not in times:
                try:
                    times[name] = seconds() * 1e6
                except Exception as error:
                    failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return failed

    def write(self) -> None:
        """Keep the times together with those that another process has written in the meantime."""
        merged = {**self._read(lambda text: None), **self.times}
        content = {"format": FORMAT, "for": self.path.stem, "microseconds": merged}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            self._note(f"the kernels' times are not kept: cannot write {self.path} ({error.strerror})")

    def _read(self, note: Note) -> dict[str, dict[str, float]]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["for"] != self.path.stem:
                note(f"{self.path} belongs to other kernels or another card: measuring again")
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
            note(f"{self.path} cannot be read ({type(error).__name__}): measuring again")
            return {}
