"""Ways to compute a draft level, side by side in one process (random weights).

    python scripts/level_variants_benchmark.py [--shape qwen2_5_7b] [--width 6] [--levels 48] [--json FILE]

First our 4-bit kernel is held against its reference in every setting, and timed; then whole trees are drafted by every
candidate over a prefix of 512 tokens: milliseconds per level, whether tree and cache are those of today's level bit for
bit (they are where sums are added in the same order: today's tiles and splits), and how far the logits of a first
level are off. PyTorch's profiler tells what one replayed level consists of, for today's level
and the fastest: how long every kernel takes, and by how much it delays the end of all before it (``critical``: with
overlapping launches a kernel's own time contains its waiting; this column and the gaps add up to the level's time).
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from kernel_benchmark import DEVICE, SHAPES, random_model, role_shapes
from torch import Tensor

from subspec.decoding.growth import Beam
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.drafts.fused import FusedSubstitute
from subspec.drafts.fused_model import FusedModel
from subspec.kernels import int4, launch
from subspec.kernels.formats import AffineFormat, random_codes
from subspec.kernels.ops import MmaInt4, Variant
from subspec.kernels.timing import graph_time, rotation

TODAY = {
    "qkv": Variant("int4_mma", 4, 3),
    "out": Variant("int4_mma", 2, 2),
    "gate_up": Variant("int4_mma", 2, 1),
    "down": Variant("int4_mma", 4, 4),
}
"""What the choice of kernels takes on an H200 for Qwen2.5-7B."""

STAGES = (3, 4, 6)
LENGTH = 512


@dataclass(frozen=True)
class Candidate:
    """A way to compute a level."""

    name: str
    variants: Mapping[str, Variant]
    options: Mapping[str, bool] = field(default_factory=dict)
    head: Variant | None = None


def ring(variants: Mapping[str, Variant], stages: int) -> dict[str, Variant]:
    """The same kernels with weights in shared memory."""
    return {role: replace(variant, stages=stages) for role, variant in variants.items()}


def check_kernels(shapes: Mapping[str, tuple[int, int]], overlap: bool) -> dict[str, float]:
    """Relative error against the reference by role and setting; the ring's bits must be the registers'."""
    errors = {}
    for role, (n, k) in shapes.items():
        codes = random_codes(min(n, 8192), k, DEVICE)
        for tiles in (2, 4):
            packed = int4.pack(codes.q, codes.scale, codes.zero, tiles=tiles, swiglu=role == "gate_up")
            for rows in (1, 6, 8):
                x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
                expected = int4.reference(packed, x)
                for splits in (1,) if role == "gate_up" else (1, 3):
                    plain = MmaInt4(packed, splits)(x)
                    y = plain.float() if role == "gate_up" else plain.sum(0)
                    error = ((y[:, : expected.shape[1]] - expected).norm() / expected.norm()).item()
                    name = f"{role} {tiles}x{splits}"
                    errors[name] = max(error, errors.get(name, 0.0))
                    if not error < (6e-3 if role == "gate_up" else 2e-3):
                        raise SystemExit(f"{name}, {rows} rows: relative error {error}")
                    for stages in (0, *STAGES):
                        with launch.overlapping(overlap):
                            got = MmaInt4(packed, splits, stages)(x)
                        if not torch.equal(got, plain):
                            worst = (got.float() - plain.float()).abs().max().item()
                            print(
                                f"NOT THE SAME: {name} ring {stages} {overlap=} {rows=}: {worst}", flush=True
                            )
                            errors[f"{name} ring {stages} {overlap=}"] = worst
    return errors


def call_each(linears: list[MmaInt4], x: Tensor) -> None:
    for linear in linears:
        linear(x)


def time_kernels(
    shapes: Mapping[str, tuple[int, int]], width: int, overlap: bool
) -> dict[str, dict[str, float]]:
    """Microseconds per call, weights not cached, one call behind the other."""
    times: dict[str, dict[str, float]] = {}
    format_ = AffineFormat()
    for role, (n, k) in shapes.items():
        times[role] = {}
        x = torch.randn(width, k, device=DEVICE, dtype=torch.bfloat16)
        for tiles in (2, 4):
            base = Variant("int4_mma", tiles, 1)
            linears = rotation(format_.random_linear(base, n, k, DEVICE, swiglu=role == "gate_up"), DEVICE)
            for variant in format_.variants("int4_mma", role, n, k):
                if variant.tiles != tiles or variant.stages:
                    continue
                for stages in (0, *STAGES):
                    for linear in linears:
                        linear.splits, linear.stages = variant.splits, stages
                    with launch.overlapping(overlap):
                        seconds = graph_time(partial(call_each, linears, x)) / len(linears)
                    times[role][str(replace(variant, stages=stages))] = seconds * 1e6
            del linears
    return times


def best_of(times: Mapping[str, Mapping[str, float]], ringed: bool) -> dict[str, Variant]:
    """The fastest of each role; of those within 2 % the one with the fewest slices."""
    best = {}
    for role, own in times.items():
        known = {parse(name): value for name, value in own.items() if ringed or "ring" not in name}
        limit = 1.02 * min(known.values())
        near = [variant for variant, value in known.items() if value <= limit]
        best[role] = min(near, key=lambda variant: (variant.splits, known[variant]))
    return best


def parse(name: str) -> Variant:
    """``int4_mma 4x3 ring 4`` as a variant."""
    kernel, size, *stages = name.split()
    tiles, splits = size.split("x")
    return Variant(kernel, int(tiles), int(splits), int(stages[1]) if stages else 0)


def with_variants(model: FusedModel, variants: Mapping[str, Variant]) -> FusedModel:
    """The same model by other settings of the kernels. Other tiles read the same words in another order."""

    def other(linear: MmaInt4, variant: Variant) -> MmaInt4:
        packed, tiles = linear.weight, variant.tiles
        groups = packed.words.shape[1]
        if packed.tiles != tiles:
            words = packed.words.view(-1, groups, tiles, 32, 4)
            meta = packed.meta.view(-1, groups, 8, 2 * tiles, 2)
            packed = replace(packed, words=words, meta=meta, tiles=tiles)
        return MmaInt4(packed, variant.splits, variant.stages)

    layers = [
        replace(layer, **{role: other(getattr(layer, role), variant) for role, variant in variants.items()})
        for layer in model.layers
    ]
    return replace(model, layers=layers)


@dataclass
class Drafted:
    """What a candidate drafted."""

    ms_per_level: float
    host_ms: float
    capture_s: float
    logits: Tensor
    tree: list[Tensor]
    rows: Tensor
    draft: FusedSubstitute
    grown: Tree


def draft_trees(
    model: FusedModel, cache: KVCache, growth: Beam, levels: int, options: Mapping[str, bool]
) -> Drafted:
    """Capture a tree's levels, then replay eight trees."""
    cache.rows[:, :, :, : cache.draft_rows].zero_()
    draft = FusedSubstitute(model, **options)
    draft.begin(cache)
    step = draft.level_step(growth)
    tree = Tree(growth.capacity, DEVICE)
    root = torch.tensor([17], device=DEVICE)

    def grow() -> None:
        tree.plant(root)
        while tree.levels < levels:
            step(tree)

    started = time.perf_counter()
    grow()
    draft.commit(tree, root, None)
    torch.cuda.synchronize()
    captured = time.perf_counter() - started
    for _ in range(2):
        grow()
    best, host = float("inf"), float("inf")
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        at = time.perf_counter()
        start.record()
        grow()
        grow()
        end.record()
        host = min(host, (time.perf_counter() - at) / 2)
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 2 / levels)
    parts = [part[: tree.size].clone() for part in (tree.tokens, tree.parents, tree.scores)]
    rows = cache.rows[:, :, :, : cache.draft_rows].clone()
    tree.plant(root)
    step(tree)
    logits = draft._logits_of(1).float().clone()
    return Drafted(best, host * 1e3 / levels, captured, logits, parts, rows, draft, tree)


def profile(drafted: Drafted, level: int, replays: int = 8) -> dict:
    """Kernels of one captured level, replayed on its own."""
    tree, draft = drafted.grown, drafted.draft
    graph = draft._graphs[(id(tree), level, True)][0]
    graph.replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in event.name
    )
    return kernel_table(spans, replays)


def kernel_table(spans: list[tuple[float, float, str]], replays: int) -> dict:
    """Per replay: kernels by name, and the time in which none ran (between replays too).

    Args:
        spans: start, end (microseconds) and name of every kernel, by start.
    """
    kernels: dict[str, dict[str, float]] = {}
    reached = spans[0][0]
    gaps = 0.0
    for start, end, name in spans:
        entry = kernels.setdefault(name, {"count": 0, "us": 0.0, "critical_us": 0.0})
        entry["count"] += 1 / replays
        entry["us"] += (end - start) / replays
        entry["critical_us"] += max(0.0, end - max(reached, start)) / replays
        gaps += max(0.0, start - reached) / replays
        reached = max(reached, end)
    total = (reached - spans[0][0]) / replays
    return {"level_us": total, "gaps_us": gaps, "kernels": kernels}


def print_table(title: str, table: dict) -> None:
    print(f"\n{title}: {table['level_us']:.0f} us, of which gaps {table['gaps_us']:.0f}")
    for name, entry in sorted(table["kernels"].items(), key=lambda item: -item[1]["critical_us"]):
        each = entry["us"] / entry["count"]
        print(
            f"  {entry['count']:6.1f} x {each:7.2f} us = {entry['us']:8.1f}, critical {entry['critical_us']:8.1f}"
            f"  {name[:60]}"
        )


def candidates(times: Mapping[bool, Mapping[str, Mapping[str, float]]]) -> list[Candidate]:
    """Today's level first: the others are compared with it. A control at the end."""
    off, on = {"overlap": False}, {"overlap": True}
    found = [Candidate("today", TODAY, off), Candidate("ring 4", ring(TODAY, 4), off)]
    if True in times:
        overlapping = best_of(times[True], ringed=True)
        found += [
            Candidate("overlap", TODAY, on),
            *(Candidate(f"overlap, ring {n}", ring(TODAY, n), on) for n in STAGES),
            Candidate("overlap, fastest with a 4-bit head", overlapping, on, Variant("int4_mma", 4, 1, 4)),
            Candidate("overlap, fastest", overlapping, on),
        ]
    return [*found, replace(found[-1], name=f"{found[-1].name}, again")]


class Benchmark:
    """The measurements, and where they are kept: rewritten after each, because an error on the device ends all."""

    def __init__(self, shape: str, width: int, levels: int, file: str | None) -> None:
        self.hidden, inter, self.heads, self.kv, self.dim, self.vocab, layers = SHAPES[shape]
        self.shapes = {role: sizes for role, sizes in role_shapes(shape).items() if role != "head"}
        self.width, self.levels, self.file = width, levels, file
        self.started = time.perf_counter()
        self.overlaps = (False,) if launch.problem(DEVICE) else (False, True)
        self.result: dict = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": shape,
            "width": width,
            "levels": levels,
            "prefix": LENGTH,
            "errors": {},
            "us": {},
            "candidates": {},
            "profiles": {},
        }
        self.model = random_model(
            self.hidden, inter, self.heads, self.kv, self.dim, self.vocab, layers, shapes=self.shapes,
            formats=dict.fromkeys(self.shapes, AffineFormat()), width=width, variants=TODAY,
        )  # fmt: skip
        self.growth = Beam(levels, width)
        self.cache = KVCache(
            layers=layers, kv_heads=self.kv, head_dim=self.dim, max_length=2048, dtype=torch.bfloat16,
            draft_rows=self.growth.draft_rows, target_rows=self.growth.capacity, device=DEVICE,
        )  # fmt: skip
        self.cache.rows.normal_()
        self.cache.extend(LENGTH)
        self.today: Drafted | None = None
        self.say(f"{self.result['device']}, torch {torch.__version__}, {launch.problem(DEVICE) or 'overlap'}")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.1f} s] {text}", flush=True)

    def keep(self) -> None:
        if self.file:
            with open(self.file, "w", encoding="utf-8") as file:
                json.dump(self.result, file, indent=1)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of ``call``; None, said and kept, when it fails."""
        try:
            outcome = call()
            torch.cuda.synchronize()
        except Exception as error:
            self.say(f"{name} FAILED: {type(error).__name__}: {str(error)[:400]}")
            self.result.setdefault("failed", {})[name] = str(error)[:2000]
            outcome = None
        self.keep()
        return outcome

    def check(self, what: str, call: Callable[..., dict[str, float]], *arguments: Any) -> None:
        for overlap in self.overlaps:
            name = f"{what}{', overlapping' if overlap else ''}"
            errors = self.attempt(name, partial(call, *arguments, overlap))
            if errors is not None:
                self.result["errors"][name] = errors
                self.say(f"{name} checked, largest relative error {max(errors.values()):.1e}")

    def time_all(self) -> dict[bool, dict[str, dict[str, float]]]:
        times = {}
        for overlap in self.overlaps:
            name = "overlapping" if overlap else "alone"
            own = self.attempt(name, partial(time_kernels, self.shapes, self.width, overlap))
            if own is None:
                continue
            times[overlap] = self.result["us"][name] = own
            for role, values in own.items():
                shown = sorted(values.items(), key=lambda item: item[1])[:4]
                line = ", ".join(
                    f"{variant.removeprefix('int4_mma ')} {value:.1f}" for variant, value in shown
                )
                today_us = values.get(str(TODAY[role]), float("nan"))
                self.say(f"{role} {name}: {line}; today {today_us:.1f} us")
        return times

    def measure(self, candidate: Candidate) -> Drafted:
        model = with_variants(self.model, candidate.variants)
        if candidate.head is not None:
            head = AffineFormat().random_linear(candidate.head, self.vocab, self.hidden, DEVICE, swiglu=False)
            model = replace(model, draft_head=head)
        own = draft_trees(model, self.cache, self.growth, self.levels, candidate.options)
        self.today = today = self.today or own
        same = all(torch.equal(a, b) for a, b in zip(own.tree, today.tree, strict=True))
        same_rows = torch.equal(own.rows, today.rows)
        off = ((own.logits - today.logits).norm() / today.logits.norm()).item()
        self.result["candidates"][candidate.name] = {
            "ms_per_level": own.ms_per_level,
            "host_ms": own.host_ms,
            "capture_s": own.capture_s,
            "same_tree": same,
            "same_cache": same_rows,
            "logits_off": off,
            "variants": {role: str(variant) for role, variant in candidate.variants.items()},
            "options": dict(candidate.options),
        }
        kernels = ", ".join(str(own).removeprefix("int4_mma ") for own in candidate.variants.values())
        self.say(
            f"{candidate.name:34} {own.ms_per_level:.3f} ms a level (host {own.host_ms:.3f}, capture "
            f"{own.capture_s:.1f} s)  same tree {same}, cache {same_rows}, logits off {off:.1e}  [{kernels}]"
        )
        return own

    def measure_all(self, wanted: Sequence[Candidate]) -> None:
        """Measure, then take profiles of the fastest and of today's level."""
        profiles: dict[str, Drafted] = {}
        fastest: Drafted | None = None
        for candidate in wanted:
            own = self.attempt(candidate.name, partial(self.measure, candidate))
            if own is None:
                continue
            if candidate.name == "today":
                profiles["today"] = own
            if candidate.head is None and (fastest is None or own.ms_per_level < fastest.ms_per_level):
                fastest = own
                profiles = {name: drafted for name, drafted in profiles.items() if name == "today"}
                profiles[candidate.name] = own
        for name, drafted in profiles.items():
            table = self.attempt(f"profile of {name}", partial(profile, drafted, self.levels // 2))
            if table is not None:
                self.result["profiles"][name] = table
                print_table(name, table)
                self.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2_5_7b")
    parser.add_argument("--width", type=int, default=6)
    parser.add_argument("--levels", type=int, default=48)
    parser.add_argument("--json", help="rewritten after every measurement")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        benchmark = Benchmark(options.shape, options.width, options.levels, options.json)
        benchmark.check("kernels", check_kernels, benchmark.shapes)
        benchmark.measure_all(candidates(benchmark.time_all()))
    benchmark.say("done")


if __name__ == "__main__":
    main()
