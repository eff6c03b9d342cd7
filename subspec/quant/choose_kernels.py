"""The choice of a kernel for every Linear of a draft level: measured on this card, once, and remembered.

Every candidate is timed as it will run (in a CUDA graph, weights not cached) on weights of the target's shapes and with
the tree's width of rows; the fastest is taken for each of a layer's four fused Linears and for a quantized LM head.
Times are kept in a :class:`~subspec.kernels.timing.TimesFile`, so a second start measures nothing; times that a file
lacks (another shape, format or width, a kernel installed since) are measured when they are needed.

Example::

    choice = choose_kernels({"out": (3584, 3584)}, 6, torch.device("cuda"), formats={"out": HqqFormat()})
    choice.variants["out"], choice.summary()
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from subspec.config.enums import AUTO
from subspec.errors import ConfigError
from subspec.kernels import int4_wide
from subspec.kernels.launch import OVERLAPPING
from subspec.kernels.timing import TimesFile
from subspec.quant import gemlite
from subspec.quant.gemlite import GemLite
from subspec.quant.kernel_times import CpuBench, CudaBench
from subspec.quant.level_linear import Variant
from subspec.quant.weight_format import WeightFormat
from subspec.utils.console import Note, print_note

MARGIN = 1.02
"""Variants within this factor of the fastest count as equal. Of those the one with the fewest slices wins: its reader
adds up the least, which the measurement does not include."""


@dataclass(frozen=True)
class Picked:
    """The kernel of one Linear.

    Attributes:
        shape: outputs and inputs of the weight.
        microseconds: per call; None if nothing is measured (a CPU).
        measured: in this run; False: read from the file.
        others: microseconds of every candidate by its name.
    """

    variant: Variant
    shape: tuple[int, int]
    format: str = ""
    microseconds: float | None = None
    measured: bool = False
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelChoice:
    """The kernels of the substitute's Linears, and the reasons.

    Attributes:
        asked: ``draft.kernel``.
        rows: the tree's width, for which they are the fastest.
        picked: by role: ``qkv``, ``out``, ``gate_up``, ``down``, ``head``.
        unavailable: reasons of the kernels that did not take part.
        file: of the times; empty if nothing is measured.
        launches: how kernels were launched when measured (:func:`subspec.kernels.launch.how`).
    """

    asked: str
    rows: int
    picked: dict[str, Picked]
    unavailable: dict[str, str]
    seconds: float
    file: str = ""
    launches: str = ""

    @property
    def variants(self) -> dict[str, Variant]:
        """The kernel of each role."""
        return {role: picked.variant for role, picked in self.picked.items()}

    @property
    def measured(self) -> int:
        """Roles for which something was measured in this run."""
        return sum(picked.measured for picked in self.picked.values())

    def summary(self) -> str:
        """One line for people: ``int4_mma 2x4 (qkv, 6.1 us), ... for 6 rows, from the cache``."""
        if not self.picked:
            return "no quantized Linears"
        parts = []
        for role, picked in self.picked.items():
            time_ = "" if picked.microseconds is None else f", {picked.microseconds:.1f} us"
            parts.append(f"{picked.variant} ({role}{time_})")
        how = f"measured in {self.seconds:.1f} s" if self.measured else "from the cache"
        line = f"{', '.join(parts)} for {self.rows} rows, {how if self.file else 'reference'}"
        return line + "".join(f"; {kernel}: {reason}" for kernel, reason in self.unavailable.items())

    def to_dict(self) -> dict[str, Any]:
        """Builtin types, for the record."""
        roles = {
            role: {
                **asdict(picked.variant),
                "shape": list(picked.shape),
                "format": picked.format,
                "microseconds": picked.microseconds,
                "origin": "reference" if not self.file else "measured" if picked.measured else "cached",
                "candidates": picked.others,
            }
            for role, picked in self.picked.items()
        }
        return {name: value for name, value in vars(self).items() if name != "picked"} | {"roles": roles}


def choose_kernels(
    shapes: Mapping[str, tuple[int, int]],
    rows: int,
    device: torch.device,
    *,
    formats: Mapping[str, WeightFormat],
    kernel: str = AUTO,
    allowed: Collection[str] | None = None,
    overlap: bool | None = None,
    note: Note = print_note,
    bench: CudaBench | CpuBench | None = None,
    folder: Path | None = None,
) -> KernelChoice:
    """Choose by measurement, before anything else is on the device: it takes a few hundred MB, and frees them.

    Args:
        shapes: outputs and inputs of every quantized Linear by its role.
        rows: of a level: the tree's width.
        formats: by role.
        kernel: ``auto``, or the one to use, whose settings alone are then measured.
        allowed: kernels that ``auto`` may take; None: all.
        overlap: whether launches overlap; None: where the device can. Their times are kept apart.
        note: receives messages about long measurements and about problems with the file.
        bench: the device; this machine's if None.
        folder: of the file; that of the cache if None.

    Raises:
        ConfigError: the kernel that was asked for cannot run here, or none can.
    """
    started = time.perf_counter()
    if bench is None and device.type != "cuda":
        return _reference(shapes, formats, rows, device, kernel)
    bench = bench or CudaBench(device, overlap)
    of_kernel = {name: format_ for format_ in formats.values() for name in format_.kernels}
    names = [name for name in of_kernel if allowed is None or name in allowed] if kernel == AUTO else [kernel]
    names = names if shapes else []
    reasons = {name: bench.unavailable(name, of_kernel.get(name) or next(iter(formats.values()))) for name in names}
    problems = {name: reason for name, reason in reasons.items() if reason}
    taking_part = [name for name in names if name not in problems]
    if shapes and not taking_part:
        raise _refusal(kernel, problems)
    file = TimesFile(bench.name, ["kernels", "quant"], note, folder)
    bench.begin(taking_part, file.path.parent, note)
    wanted = {role: candidates(formats[role], role, *shape, taking_part, problems) for role, shape in shapes.items()}
    keys = {role: _key(formats[role], role, shape, rows, bench.launches) for role, shape in shapes.items()}
    missing = {role for role, own in wanted.items() if not own.keys() <= file.times.get(keys[role], {}).keys()}
    if missing:
        slow = ", and gemlite tunes itself for about 10 s per shape" if GemLite.kind in taking_part else ""
        note(f"measuring kernels here for {rows} rows, once: a few seconds{slow}")
    picked = {}
    for role, variants in wanted.items():
        about = formats[role], role, *shapes[role], rows
        calls = {name: partial(bench.seconds, variant, *about) for name, variant in variants.items()}
        failed = file.measure(keys[role], calls)
        problems |= {f"{variants[name].kernel} ({role})": reason for name, reason in failed.items()}
        times = {name: value for name, value in file.times[keys[role]].items() if name in variants}
        if not times:
            raise _refusal(kernel, problems)
        best = fastest(times, variants)
        rounded = {name: round(times[name], 3) for name in variants if name in times}
        picked[role] = Picked(variants[best], shapes[role], str(formats[role]), times[best], role in missing, rounded)
    won = {role: (formats[role], own.shape) for role, own in picked.items() if own.variant.kernel == GemLite.kind}
    bench.finish(won, rows, bool(missing), file.path.parent, note)
    if missing:
        file.write()
    seconds = time.perf_counter() - started
    return KernelChoice(kernel, rows, picked, problems, seconds, str(file.path), bench.launches)


def settings_rows(rows: int, width: int, formats: Iterable[WeightFormat], device: torch.device) -> int:
    """Rows for which kernels are chosen, where texts of ``width`` rows make levels of ``rows`` rows.

    Levels that read x in tiles take no settings, so those of a text that runs alone are chosen then.
    """
    if rows < int4_wide.FROM or device.type != "cuda" or not int4_wide.runs_on(device.index or 0):
        return rows
    return min(width, int4_wide.FROM - 1) if all(own.reads_tiles for own in formats) else rows


def candidates(
    format_: WeightFormat, role: str, n: int, k: int, kernels: list[str], problems: dict[str, str]
) -> dict[str, Variant]:
    """Variants for a weight [n, k] by their names in the file; reasons against a kernel go to ``problems``."""
    found = {}
    for kernel in kernels:
        if reason := format_.unfit(kernel, n, k):
            if kernel in format_.kernels or len(kernels) == 1:
                problems[f"{kernel} ({role})"] = reason
            continue
        version = f" {gemlite.version()}" if kernel == GemLite.kind else ""  # versions differ in their times
        found |= {f"{variant}{version}": variant for variant in format_.variants(kernel, role, n, k)}
    return found


def fastest(times: Mapping[str, float], variants: Mapping[str, Variant]) -> str:
    """Name of the variant with the fewest slices among the fastest (:data:`MARGIN`)."""
    limit = min(times.values()) * MARGIN
    near = [name for name, value in times.items() if value <= limit]
    return min(near, key=lambda name: (max(variants[name].splits, 1), times[name]))


def _reference(
    shapes: Mapping[str, tuple[int, int]],
    formats: Mapping[str, WeightFormat],
    rows: int,
    device: torch.device,
    kernel: str,
) -> KernelChoice:
    """On a CPU the torch references of our kernels compute: slow, and there for tests only."""
    picked, problems = {}, {}
    for role, shape in shapes.items():
        variant = formats[role].reference(role)
        if kernel not in (AUTO, variant.kernel):
            raise _refusal(kernel, {kernel: f"no CUDA device (this run is on the {device.type})"})
        if reason := formats[role].unfit(variant.kernel, *shape):
            raise _refusal(kernel, {f"{variant.kernel} ({role})": reason})
        picked[role] = Picked(variant, shape, str(formats[role]))
        problems |= dict.fromkeys(formats[role].kernels[1:], "no CUDA device")
    return KernelChoice(kernel, rows, picked, problems if kernel == AUTO else {}, 0.0)


def _refusal(kernel: str, problems: Mapping[str, str]) -> ConfigError:
    named = problems.values() if len(problems) == 1 else (f"{name}: {why}" for name, why in problems.items())
    reasons = "; ".join(dict.fromkeys(named))
    if kernel == AUTO:
        return ConfigError(
            f"draft.kernel=auto finds no kernel that runs here: {reasons}; try quant.group_size=64, or offload=none"
        )
    return ConfigError(f"draft.kernel={kernel} cannot run here: {reasons}; set draft.kernel=auto")


def _key(format_: WeightFormat, role: str, shape: tuple[int, int], rows: int, launches: str) -> str:
    how = " overlapping" if launches == OVERLAPPING else ""
    return f"{role} {shape[0]}x{shape[1]} {format_.key} rows {rows}{how}"
