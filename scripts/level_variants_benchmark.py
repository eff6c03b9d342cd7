"""Ways to compute a draft level, side by side in one process (random weights).

    python scripts/level_variants_benchmark.py [--shape qwen2_5_7b] [--width 6] [--levels 48] [--json FILE]

Everything that exists is held against its reference and timed first, then whole trees are drafted over a prefix of 512
tokens: milliseconds per level, whether tree and cache are those of today's level bit for bit (they are where sums are
added in the same order: the same tiles and slices), and how far the logits of a first level are off (with other tiles
the made-up weights are others: compare nothing there). Then the settings of attention, by themselves and in a level.
PyTorch's profiler tells what one replayed level consists of, for today's level and the fastest: how long every kernel
takes, and by how much it delays the end of all before it (``critical``: with overlapping launches a kernel's own time
contains its waiting; this column and the gaps add up to the level's time).
"""

import argparse
import faulthandler
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from kernel_benchmark import DEVICE, SHAPES, random_model, role_shapes
from level_kernels import LENGTHS, best_attention, best_of, check_kernels, time_attention, time_kernels
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.kernels import launch
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention, LevelModel
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import Int4Linear
from subspec.quant.level_linear import Variant

TODAY = {
    "qkv": Variant("int4_mma", 4, 3),
    "out": Variant("int4_mma", 4, 4),
    "gate_up": Variant("int4_mma", 4, 1, 4),
    "down": Variant("int4_mma", 4, 4),
}
"""What the choice of kernels takes on an H200 for Qwen2.5-7B, launches overlapping."""

LENGTH = 512
WATCHDOG_S = 90
"""Most that one step may take before the process ends, with a trace: a kernel may wait for ever."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute a level."""

    name: str
    variants: Mapping[str, Variant]
    options: Mapping[str, Any] = field(default_factory=dict)
    head: Variant | None = None


def with_variants(model: LevelModel, variants: Mapping[str, Variant]) -> LevelModel:
    """The same model by other settings of the kernels. Other tiles read the same words in another order."""

    def other(linear: Int4Linear, variant: Variant) -> Int4Linear:
        packed, tiles = linear.weight, variant.tiles
        groups = packed.words.shape[1]
        if packed.tiles != tiles:
            words = packed.words.view(-1, groups, tiles, 32, 4)
            meta = packed.meta.view(-1, groups, 8, 2 * tiles, 2)
            packed = replace(packed, words=words, meta=meta, tiles=tiles)
        return Int4Linear(packed, variant.splits, variant.warps)

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
    draft: CapturedDraft
    grown: Tree


def draft_trees(
    model: LevelModel, cache: KVCache, policy: Beam, levels: int, options: Mapping[str, Any]
) -> Drafted:
    """Capture a tree's levels, then replay eight trees."""
    cache.rows[:, :, :, : cache.draft_rows].zero_()
    draft = CapturedDraft(model, **options)
    draft.begin(cache)
    tree = Tree(policy.capacity, DEVICE)
    root = torch.tensor([17], device=DEVICE)

    def grow() -> None:
        tree.plant(root)
        while tree.levels < levels:
            draft.extend(tree, tree.last_level, policy)

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
    draft.extend(tree, tree.last_level, policy)
    logits = draft._logits_of(1).float().clone()
    return Drafted(best, host * 1e3 / levels, captured, logits, parts, rows, draft, tree)


def profile(drafted: Drafted, level: int, replays: int = 8) -> dict:
    """Kernels of one captured level, replayed on its own."""
    tree, draft = drafted.grown, drafted.draft
    graph = draft._state.graphs[(id(tree), 1, level, True)][0]
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


class Benchmark:
    """The measurements, and where they are kept: rewritten after each, because an error on the device ends all."""

    def __init__(self, shape: str, width: int, levels: int, file: str | None) -> None:
        self.hidden, inter, self.heads, self.kv, self.dim, self.vocab, layers = SHAPES[shape]
        self.shapes = {role: sizes for role, sizes in role_shapes(shape).items() if role != "head"}
        self.width, self.levels, self.file = width, levels, file
        self.started = time.perf_counter()
        self.overlap = launch.problem(DEVICE) is None
        self.result: dict = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": shape,
            "width": width,
            "levels": levels,
            "prefix": LENGTH,
            "errors": {},
            "us": {},
            "attention": {},
            "candidates": {},
            "profiles": {},
        }
        self.model = random_model(
            self.hidden, inter, self.heads, self.kv, self.dim, self.vocab, layers, shapes=self.shapes,
            formats=dict.fromkeys(self.shapes, HqqFormat()), width=width, variants=TODAY,
        )  # fmt: skip
        self.policy = Beam(levels, width)
        self.cache = KVCache(
            layers=layers, kv_heads=self.kv, head_dim=self.dim, max_length=2048, dtype=torch.bfloat16,
            draft_rows=self.policy.draft_rows, target_rows=self.policy.capacity, device=DEVICE,
        )  # fmt: skip
        self.cache.rows.normal_()
        self.cache.extend(LENGTH)
        self.today: Drafted | None = None
        self.kept: dict[str, Drafted] = {}
        self.say(f"{self.result['device']}, torch {torch.__version__}, {launch.problem(DEVICE) or 'overlap'}")

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.1f} s] {text}", flush=True)

    def keep(self) -> None:
        if self.file:
            with open(self.file, "w", encoding="utf-8") as file:
                json.dump(self.result, file, indent=1)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of ``call``; None, said and kept, when it fails."""
        faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
        try:
            outcome = call()
            torch.cuda.synchronize()
        except Exception as error:
            self.say(f"{name} FAILED: {type(error).__name__}: {str(error)[:400]}")
            self.result.setdefault("failed", {})[name] = str(error)[:2000]
            outcome = None
        faulthandler.cancel_dump_traceback_later()
        self.keep()
        return outcome

    def check(self) -> None:
        """Whether all kernels are right."""
        errors = self.attempt("kernels", partial(check_kernels, self.shapes, self.overlap))
        if errors is not None:
            self.result["errors"] = errors
            self.say(f"{len(errors)} kernels checked, largest relative error {max(errors.values()):.1e}")

    def time(self) -> dict[str, dict[Variant, float]] | None:
        times = self.attempt("times of kernels", partial(time_kernels, self.shapes, self.width, self.overlap))
        for role, own in (times or {}).items():
            self.result["us"][role] = {str(variant): us for variant, us in own.items()}
            n, k = self.shapes[role]
            shown = sorted(own.items(), key=lambda item: item[1])[:8]
            line = ", ".join(f"{str(variant).removeprefix('int4_mma ')} {us:.2f}" for variant, us in shown)
            bytes_ = HqqFormat().device_bytes(n, k)
            self.say(f"{role}: {line} us; the first moves {bytes_ / shown[0][1] / 1e6:.2f} TB/s")
        return times

    def time_attention(self) -> Attention:
        times = time_attention(self.model, self.width, self.overlap, self.say)
        self.result["attention"] = {str(how): own for how, own in times.items()}
        best = best_attention(times)
        for how, own in sorted(times.items(), key=lambda item: item[1][0]):
            mark = "  <- taken" if how == best else "  (today)" if how == Attention() else ""
            print(f"    {how!s:44} {'  '.join(f'{us:6.2f}' for us in own)} us at {LENGTHS}{mark}", flush=True)
        self.say(f"attention of a layer, with rotary embedding and merge: {best} {times[best][0]:.2f} us")
        return best

    def measure(self, candidate: Candidate) -> Drafted:
        model = with_variants(self.model, candidate.variants)
        if candidate.head is not None:
            head = HqqFormat().random_linear(candidate.head, self.vocab, self.hidden, DEVICE, swiglu=False)
            model = replace(model, draft_head=head)
        own = draft_trees(model, self.cache, self.policy, self.levels, candidate.options)
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
            "options": {key: str(value) for key, value in candidate.options.items()},
        }
        kernels = ", ".join(str(own).removeprefix("int4_mma ") for own in candidate.variants.values())
        self.say(
            f"{candidate.name:34} {own.ms_per_level:.3f} ms a level (host {own.host_ms:.3f}, capture "
            f"{own.capture_s:.1f} s)  same tree {same}, cache {same_rows}, logits off {off:.1e}  [{kernels}]"
        )
        return own

    def measure_all(self, *wanted: Candidate) -> None:
        """Measure; the fastest so far is kept, and today's."""
        for candidate in wanted:
            own = self.attempt(candidate.name, partial(self.measure, candidate))
            if own is None:
                continue
            if candidate.name == "today":
                self.kept["today"] = own
            others = [drafted for name, drafted in self.kept.items() if name != "today"]
            if candidate.head is None and all(own.ms_per_level < other.ms_per_level for other in others):
                self.kept = {name: drafted for name, drafted in self.kept.items() if name == "today"}
                self.kept[candidate.name] = own

    def profile_all(self) -> None:
        """Kernels of what was kept."""
        for name, drafted in self.kept.items():
            table = self.attempt(f"profile of {name}", partial(profile, drafted, self.levels // 2))
            if table is not None:
                self.result["profiles"][name] = table
                print_table(name, table)
                self.keep()

    def run(self) -> None:
        """Everything, the surest first."""
        overlap, options = self.overlap, {"overlap": self.overlap}
        self.check()
        times = self.time()
        fastest = TODAY if times is None else best_of(times)
        self.measure_all(
            Candidate("today", TODAY, options),
            Candidate("in order", TODAY, {"overlap": False}),
            Candidate("fastest kernels", fastest, options),
            *(
                Candidate(f"fastest {role} alone", {**TODAY, role: fastest[role]}, options)
                for role in self.shapes
            ),
        )
        attention = self.attempt("attention", self.time_attention)
        if attention is not None:
            self.measure_all(
                Candidate("its attention changed", fastest, {"overlap": overlap, "attention": attention}),
                Candidate("fastest with a 4-bit head", fastest, options, Variant("int4_mma", 4, 1, 4)),
            )
        self.profile_all()


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
        benchmark.run()
    benchmark.say("done")


if __name__ == "__main__":
    main()
