"""Which tile shape each matrix of a batch-invariant pass runs with: measured on this card, once, and kept.

Every candidate is timed with 1, 64 and 320 rows, and the least sum wins: one shape serves every number of rows. The
times go to ``<cache>/kernels/<card>-<torch>-invariant-<hash of the kernels' source>.json``. Bits do not depend on the
choice, so that a file that was lost changes no text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from subspec.errors import SubspecError
from subspec.kernels.invariant_linear import CANDIDATES, REFERENCE, Tiling, multiply, split_k
from subspec.kernels.timing import graph_time, read_times, slug, source_hash, write_times
from subspec.utils.console import Note, print_note
from subspec.utils.disk import cache_root

ROWS = (1, 64, 320)
"""Plain decoding, a small tree, and the paper's tree."""

MOST_COLUMNS = 16384
"""Of a matrix that is timed: a larger one (an LM head) runs as many like it."""

PARTIAL_ROLES = ("qkv", "out", "down")
"""Matrices whose result is float32 parts of a sum (:class:`subspec.decoding.bitwise.BitwiseArithmetic`)."""

SOURCES = tuple(f"kernels/{name}.py" for name in ("invariant", "invariant_linear", "choose_tiling"))
"""Files whose change makes times out of date."""

Timer = Callable[[Tiling, str, int, int], float]


@dataclass(frozen=True)
class TilingChoice:
    """The shapes by role, and where they come from.

    Attributes:
        measured: roles measured in this run.
    """

    tilings: dict[str, Tiling]
    measured: int


def choose_tilings(
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    note: Note = print_note,
    folder: Path | None = None,
    timer: Timer | None = None,
) -> TilingChoice:
    """The fastest shape for every matrix.

    Args:
        shapes: outputs and inputs by role.
        folder: of the file; the cache's own when None.
        timer: seconds of a candidate; this device's when None.

    Raises:
        SubspecError: no candidate runs on this card.
    """
    if timer is None and device.type != "cuda":
        return TilingChoice(dict.fromkeys(shapes, REFERENCE), 0)
    timer = timer or (lambda tiling, role, n, k: tile_time(tiling, role, n, k, dtype, device))
    card = slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    folder = folder or cache_root() / "kernels"
    file = folder / f"{card}-{slug(torch.__version__)}-invariant-{source_hash(SOURCES)}.json"
    known = read_times(file, note)
    wanted = {role: (min(n, MOST_COLUMNS), k) for role, (n, k) in shapes.items()}
    keys = {role: f"{role} {n}x{k} {str(dtype).removeprefix('torch.')}" for role, (n, k) in wanted.items()}
    names = {str(tiling) for tiling in CANDIDATES}
    missing = [role for role in wanted if names.isdisjoint(known.get(keys[role], {}))]
    if missing:
        note("measuring the kernels of batch-invariant passes on this card, once: some seconds")
    failed: dict[str, str] = {}
    for role in missing:
        times = {}
        for tiling in CANDIDATES:
            try:
                times[str(tiling)] = timer(tiling, role, *wanted[role]) * 1e6
            except Exception as error:  # a card without the shared memory that it needs
                failed[str(tiling)] = (
                    str(error).strip().splitlines()[0] if str(error) else type(error).__name__
                )
        if times:  # where nothing ran, something else may have been in the way: tried again next time
            known[keys[role]] = times
    if missing:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_times(file, known, note)
    picked = {}
    for role, key in keys.items():
        kept = known.get(key, {})
        times = {tiling: kept[str(tiling)] for tiling in CANDIDATES if str(tiling) in kept}
        if not times:
            reasons = "; ".join(dict.fromkeys(failed.values()))
            raise SubspecError(f"decoding.bitwise: no tile shape runs on this card ({reasons})")
        picked[role] = min(times, key=lambda tiling: times[tiling])
    return TilingChoice(picked, len(missing))


@torch.inference_mode()
def tile_time(tiling: Tiling, role: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product for each of :data:`ROWS`, summed."""
    weight = torch.randn(n, k, dtype=dtype, device=device)
    total = 0.0
    for rows in ROWS:
        x = torch.randn(rows, k, dtype=dtype, device=device)
        if role in PARTIAL_ROLES:
            out = torch.empty(split_k(n, k).parts, rows, n, dtype=torch.float32, device=device)
        else:
            out = torch.empty(rows, n, dtype=dtype, device=device)
        total += graph_time(lambda x=x, out=out: multiply(x, (weight,), (None,), out, tiling))
    return total
