"""Tile shapes of the matrices of a batch-invariant pass: measured on this card, once, and kept.

Every candidate is timed with 1, 64 and 320 rows, and the least sum wins: one shape serves every number of rows. Times
are kept in a :class:`~subspec.kernels.timing.TimesFile`. Bits do not depend on the choice: a lost file changes no text.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from subspec.errors import SubspecError
from subspec.kernels.invariant_linear import CANDIDATES, REFERENCE, Tiling, multiply, split_k
from subspec.kernels.timing import TimesFile, graph_time
from subspec.utils.console import Note, print_note

ROWS = (1, 64, 320)
"""Plain decoding, a small tree, and the paper's tree."""

MOST_COLUMNS = 16384
"""Columns of a matrix that is timed: a larger one (an LM head) repeats the same work."""

PARTIAL_ROLES = ("qkv", "out", "down")
"""Matrices whose result is float32 parts of a sum (:class:`subspec.decoding.bitwise.BitwiseArithmetic`)."""

Timer = Callable[[Tiling, str, int, int], float]


def choose_tilings(
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    note: Note = print_note,
    folder: Path | None = None,
    timer: Timer | None = None,
) -> dict[str, Tiling]:
    """The fastest shape for every matrix, by role.

    Args:
        shapes: outputs and inputs by role.
        folder: of the file; the cache's own when None.
        timer: seconds of a candidate; this device's when None.

    Raises:
        SubspecError: no candidate runs on this card.
    """
    if timer is None and device.type != "cuda":
        return dict.fromkeys(shapes, REFERENCE)
    timer = timer or (lambda tiling, role, n, k: tile_time(tiling, role, n, k, dtype, device))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    file = TimesFile(card, ["kernels"], note, folder, "invariant")
    wanted = {role: (min(n, MOST_COLUMNS), k) for role, (n, k) in shapes.items()}
    keys = {role: f"{role} {n}x{k} {str(dtype).removeprefix('torch.')}" for role, (n, k) in wanted.items()}
    by_name = {str(tiling): tiling for tiling in CANDIDATES}
    missing = [role for role in wanted if not file.times.get(keys[role])]
    failed: dict[str, str] = {}
    if missing:
        note("measuring the kernels of batch-invariant passes on this card, once: some seconds")
        for role in missing:  # a candidate may need more shared memory than the card has
            calls = {name: partial(timer, tiling, role, *wanted[role]) for name, tiling in by_name.items()}
            failed |= file.measure(keys[role], calls)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        file.write()
    picked = {}
    for role, key in keys.items():
        times = {name: value for name, value in file.times[key].items() if name in by_name}
        if not times:
            reasons = "; ".join(dict.fromkeys(failed.values()))
            raise SubspecError(f"decoding.bitwise: no tile shape runs on this card ({reasons})")
        picked[role] = by_name[min(times, key=times.__getitem__)]
    return picked


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
