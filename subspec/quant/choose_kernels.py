"""Which kernel computes which Linear of a draft level: measured on this card, once, and remembered.

Every candidate is timed as it will run (in a CUDA graph, weights not cached) on weights of the target's shapes and
as many rows as the tree is wide, and the fastest is taken for each of a layer's four fused Linears and for a quantized
LM head. The times go to ``<cache>/kernels/<card>-<torch>-<hash of the kernels' source>.json``, so a second start
measures nothing; whatever a file lacks (another shape, format or width, a kernel installed since) is measured when it
is asked for.

Example::

    choice = choose_kernels({"out": (3584, 3584)}, rows=6, device=torch.device("cuda"))
    choice.variants["out"], choice.summary()
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subspec.errors import ConfigError
from subspec.kernels.launch import OVERLAPPING
from subspec.kernels.timing import read_times, slug, source_hash, write_times
from subspec.quant.affine_format import AffineFormat, Format, describe
from subspec.quant.bench import Bench, CudaBench
from subspec.quant.level_linear import GemLite, Variant, gemlite_version
from subspec.utils.console import Note, print_note
from subspec.utils.disk import cache_root

AUTO = "auto"

MARGIN = 1.02
"""A variant this close to the fastest is as fast: of those, the one with the fewest slices leaves its reader the
least to add up, which the measurement does not see."""


@dataclass(frozen=True)
class Picked:
    """What computes one Linear.

    Attributes:
        variant: the kernel and its settings.
        shape: outputs and inputs of the weight.
        format: how it is kept.
        microseconds: per call; None where nothing is measured (a CPU).
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
    """What computes the substitute's Linears, and why.

    Attributes:
        asked: ``draft.kernel``.
        rows: the tree's width, which it is the best for.
        picked: by role: ``qkv``, ``out``, ``gate_up``, ``down``, ``head``.
        unavailable: why a kernel did not take part.
        seconds: that choosing took.
        file: where the times are kept; empty where nothing is measured.
        launches: how kernels were launched to be measured (:func:`subspec.kernels.launch.how`).
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
        if not self.file:
            how = "reference"
        else:
            how = f"measured in {self.seconds:.1f} s" if self.measured else "from the cache"
        line = f"{', '.join(parts)} for {self.rows} rows, {how}"
        return line + "".join(f"; {kernel}: {reason}" for kernel, reason in self.unavailable.items())

    def to_dict(self) -> dict[str, Any]:
        """Builtin types, for the record."""
        roles = {
            role: {
                "kernel": picked.variant.kernel,
                "tiles": picked.variant.tiles,
                "splits": picked.variant.splits,
                "warps": picked.variant.warps,
                "shape": list(picked.shape),
                "format": picked.format,
                "microseconds": picked.microseconds,
                "origin": "reference" if not self.file else "measured" if picked.measured else "cached",
                "candidates": picked.others,
            }
            for role, picked in self.picked.items()
        }
        return {
            "asked": self.asked,
            "rows": self.rows,
            "roles": roles,
            "unavailable": self.unavailable,
            "seconds": self.seconds,
            "file": self.file,
            "launches": self.launches,
        }


def choose_kernels(
    shapes: Mapping[str, tuple[int, int]],
    rows: int,
    device: torch.device,
    *,
    formats: Mapping[str, Format] | None = None,
    kernel: str = AUTO,
    allowed: Collection[str] | None = None,
    overlap: bool | None = None,
    note: Note = print_note,
    bench: Bench | None = None,
    folder: Path | None = None,
) -> KernelChoice:
    """Choose by measurement, before anything else is on the device: it takes a few hundred MB, and frees them.

    Args:
        shapes: outputs and inputs of every quantized Linear by its role.
        formats: by role; 4 bits in groups of 64 where none is named.
        rows: of a level: the tree's width.
        kernel: ``auto``, or the one to use, whose settings alone are then measured.
        allowed: kernels that ``auto`` may take; None: all.
        overlap: whether launches overlap; None: where the device can. Times of one are not times of the other.
        note: told what takes long, and what is wrong with the file.
        bench: the device; this machine's when None.
        folder: of the file; the cache's own when None.

    Raises:
        ConfigError: the kernel that was asked for cannot run here, or none can.
    """
    started = time.perf_counter()
    formats = {role: (formats or {}).get(role, AffineFormat()) for role in shapes}
    if bench is None and device.type != "cuda":
        return _reference(shapes, formats, rows, device, kernel)
    bench = bench or CudaBench(device, overlap)
    folder = folder or cache_root() / "kernels"
    problems, taking_part = {}, []
    known_kernels = dict.fromkeys(name for format_ in formats.values() for name in format_.kernels)
    if allowed is not None:
        known_kernels = {name: None for name in known_kernels if name in allowed}
    for name in known_kernels if kernel == AUTO else (kernel,):
        if reason := bench.unavailable(name):
            problems[name] = reason
        else:
            taking_part.append(name)
    if shapes and not taking_part:
        raise _refusal(kernel, problems)
    bench.begin(taking_part, folder, note)
    file = folder / f"{slug(bench.name)}-{slug(torch.__version__)}-{source_hash(SOURCES)}.json"
    known = read_times(file, note)
    wanted = {
        role: candidates(formats[role], role, *shape, taking_part, problems) for role, shape in shapes.items()
    }
    times = {
        role: known.setdefault(_key(formats[role], role, shape, rows, bench.launches), {})
        for role, shape in shapes.items()
    }
    missing = {role for role in wanted if any(_name(variant) not in times[role] for variant in wanted[role])}
    if missing:
        slow = ", and gemlite tunes itself for about 10 s per shape" if GemLite.kind in taking_part else ""
        note(f"measuring kernels on this card for {rows} rows, once: a few seconds{slow}")
    picked = {}
    for role, variants in wanted.items():
        failed = _measure(bench, formats[role], role, shapes[role], rows, variants, times[role])
        problems |= {f"{name} ({role})": reason for name, reason in failed.items()}
        best = _pick(formats[role], shapes[role], variants, times[role], role in missing)
        if best is None:
            raise _refusal(kernel, problems)
        picked[role] = best
    won = {
        role: (formats[role], best.shape)
        for role, best in picked.items()
        if best.variant.kernel == GemLite.kind
    }
    bench.finish(won, rows, bool(missing), folder, note)
    if missing:
        write_times(file, known, note)
    seconds = time.perf_counter() - started
    return KernelChoice(kernel, rows, picked, problems, seconds, str(file), bench.launches)


SOURCES = (
    *(f"kernels/csrc/{name}" for name in ("few_rows.cu", "int4.cu", "lut.cu")),
    *(
        f"kernels/{name}.py"
        for name in ("int4", "wq", "wq_kernel", "lut_triton", "activation", "launch", "timing")
    ),
    *(f"quant/{name}.py" for name in ("level_linear", "affine_format", "kernel_timing", "codebook_linear")),
    *(f"quant/{name}.py" for name in ("codebook", "codebook_format", "hadamard_transform")),
)
"""Files whose change makes times out of date."""


def candidates(
    format_: Format, role: str, n: int, k: int, kernels: list[str], problems: dict[str, str]
) -> list[Variant]:
    """What can compute a weight [n, k]; why a kernel that has its format cannot goes to ``problems``."""
    found = []
    for kernel in kernels:
        if reason := format_.unfit(kernel, n, k):
            if kernel in format_.kernels or len(kernels) == 1:
                problems[f"{kernel} ({role})"] = reason
        else:
            found += format_.variants(kernel, role, n, k)
    return found


def _reference(
    shapes: Mapping[str, tuple[int, int]],
    formats: Mapping[str, Format],
    rows: int,
    device: torch.device,
    kernel: str,
) -> KernelChoice:
    """On a CPU our kernels' references stand in: slow, and there for tests only."""
    picked = {
        role: Picked(formats[role].reference(role, *shape), shape, describe(formats[role]))
        for role, shape in shapes.items()
    }
    missing = {name: "no CUDA device" for format_ in formats.values() for name in format_.kernels}
    for chosen in picked.values():
        missing.pop(chosen.variant.kernel, None)
        if kernel not in (AUTO, chosen.variant.kernel):
            raise _refusal(kernel, {kernel: f"no CUDA device (this run is on the {device.type})"})
    return KernelChoice(kernel, rows, picked, missing if kernel == AUTO else {}, 0.0)


def _measure(
    bench: Bench,
    format_: Format,
    role: str,
    shape: tuple[int, int],
    rows: int,
    variants: list[Variant],
    times: dict[str, float],
) -> dict[str, str]:
    """Add what ``times`` lacks; returns why a kernel failed."""
    failed: dict[str, str] = {}
    for variant in variants:
        if _name(variant) in times or variant.kernel in failed:
            continue
        try:
            times[_name(variant)] = bench.seconds(variant, format_, role, *shape, rows) * 1e6
        except Exception as error:
            text = str(error).strip()
            failed[variant.kernel] = text.splitlines()[0] if text else type(error).__name__
    return failed


def _pick(
    format_: Format,
    shape: tuple[int, int],
    variants: list[Variant],
    times: Mapping[str, float],
    measured: bool,
) -> Picked | None:
    by_variant = {variant: times[_name(variant)] for variant in variants if _name(variant) in times}
    if not by_variant:
        return None
    limit = min(by_variant.values()) * MARGIN
    near = [variant for variant, value in by_variant.items() if value <= limit]
    best = min(near, key=lambda variant: (max(variant.splits, 1), by_variant[variant]))
    others = {_name(variant): round(value, 3) for variant, value in by_variant.items()}
    return Picked(best, shape, describe(format_), by_variant[best], measured, others)


def _refusal(kernel: str, problems: Mapping[str, str]) -> ConfigError:
    reasons = "; ".join(dict.fromkeys(problems.values() if len(problems) == 1 else
                                      (f"{name}: {reason}" for name, reason in problems.items())))  # fmt: skip
    if kernel == AUTO:
        return ConfigError(f"draft.kernel=auto finds no kernel that runs here: {reasons}")
    return ConfigError(f"draft.kernel={kernel} cannot run here: {reasons}; set draft.kernel=auto")


def _name(variant: Variant) -> str:
    """As the file has it: times of another gemlite are not this one's."""
    return f"{variant} {gemlite_version()}" if variant.kernel == GemLite.kind else str(variant)


def _key(format_: Format, role: str, shape: tuple[int, int], rows: int, launches: str) -> str:
    how = " overlapping" if launches == OVERLAPPING else ""
    return f"{role} {shape[0]}x{shape[1]} {format_.key} rows {rows}{how}"
