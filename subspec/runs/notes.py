"""Lines that a run prints about itself."""

from collections.abc import Mapping
from typing import Any

from subspec.benchmarks import Benchmark
from subspec.config.enums import VramCounts
from subspec.memory.allocator import GIB
from subspec.planning.budget import Budget
from subspec.quant.quantize_model import QuantReport

ENOUGH_PASSES = 20
"""Passes without an accepted token that indicate a draft for another target."""


def prompts(benchmark: Benchmark) -> str:
    """Name, rows and source of a benchmark."""
    rows = f"{len(benchmark.samples)} of {benchmark.available} rows"
    text = f"benchmark {benchmark.name}: {rows}, {benchmark.source_detail}"
    return f"{text}; {benchmark.note}" if benchmark.note else text


def quantized(quant: QuantReport) -> str:
    """Size and origin (quantized in this run, or read from a cache) of a quantized draft."""
    cache, origin = quant.details.get("cache", {}), "quantized"
    if cache.get("read"):
        origin = f"{cache['read']} read from {cache['folder']} and {cache['quantized']} quantized"
    return (
        f"{quant.modules} Linears at {quant.bits_per_weight:.2f} bits per weight ({quant.quantizer}), "
        f"{quant.backend}, {origin} in {quant.seconds:.1f} s"
    )


def over_budget(vram: Budget | None, held_gib: float | None) -> str:
    """A warning if the process holds more of the device than a budget that counts all of it; empty otherwise."""
    held = held_gib or 0.0
    if vram is None or vram.counts is not VramCounts.device or held * GIB <= vram.bytes:
        return ""
    return (
        f"this run holds {held:.2f} GiB of the device, more than its budget of {vram.bytes / GIB:g}: CUDA took "
        "more than planned; lower offload.vram_gib by the difference"
    )


def over_plain(totals: Mapping[str, Any]) -> str:
    """The speed-up over plain decoding; empty if none was timed."""
    if not totals["speedup_over_plain"]:
        return ""
    passes, seconds = totals["plain_tokens"], totals["plain_s"]
    alone = totals["iterations"] - (totals["drafted_by_depth"] or [0])[0]
    paused = f"; {alone} of {totals['iterations']} passes drafted nothing" if alone else ""
    return (
        f"{totals['speedup_over_plain']:.2f} times as fast as plain decoding by the same target, timed behind the "
        f"texts: {passes} tokens at {passes / seconds:.2f} tokens/s{paused}"
    )


def never_accepted(totals: Mapping[str, Any]) -> str:
    """A note if no drafted token was accepted; empty otherwise."""
    passes = totals["iterations"]
    if not totals["drafted_nodes"] or passes < ENOUGH_PASSES or totals["verified_tokens"] > passes:
        return ""
    return f"no drafted token was accepted in {passes} passes: the draft was not made for this target"


def shortened(path: str, length: int = 40) -> str:
    """The end of a long path, for a table."""
    return path if len(path) <= length else f"...{path[3 - length :]}"
