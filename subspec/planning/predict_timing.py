"""Seconds of an iteration, from bytes and bandwidths.

    draft level   layers * LEVEL_LAYER_S + (substitute + LM head) / (memory bandwidth * EFFICIENCY)
    target pass   the larger of: streamed bytes / link, less the bytes that filled the ring during drafting;
                  and all of the target's weights / (memory bandwidth * EFFICIENCY)
    end of a pass LM head / (memory bandwidth * EFFICIENCY) + OTHER_S, while the link continues to fill the ring
    iteration     depth * draft level + target pass + end

During drafting the link is idle once the ring's slots are full. Restoring coded layers, which overlaps with the link,
and a coded LM head, which does not, is left out.

The two constants of a draft level are fitted to two measurements on one H200 (single levels of 7B and 32B, width 6);
the check in ``experiments/predict`` repeats the fit and states the errors on whole runs, which are not part of it.
"""

from dataclasses import dataclass

from subspec.planning.acceptance import Acceptance
from subspec.planning.plan import Plan

EFFICIENCY = 0.64
"""Share of the data-sheet memory bandwidth that long kernels reach (fitted)."""

LEVEL_LAYER_S = 7.4e-6
"""Seconds per layer of a draft level, independent of its bytes: launches, norms, attention (fitted)."""

OTHER_S = 0.4e-3
"""Seconds of bookkeeping per iteration outside the timed phases: measured 0.3 to 0.6 ms."""


@dataclass(frozen=True)
class Machine:
    """Speeds of a machine.

    Attributes:
        link_gb_per_s, memory_gb_per_s: host-to-device and device-memory bandwidth, GB/s (1e9 bytes).
        level_s: measured seconds of a draft level; None: computed.
    """

    link_gb_per_s: float
    memory_gb_per_s: float
    level_s: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of a planned run: ``streamed`` per pass, ``ring`` of all slots, ``level`` read by a draft level,
    ``target``: all layers, ``head``: the LM head; and the number of ``layers``."""

    streamed: int
    ring: int
    level: int
    target: int
    head: int
    layers: int

    @classmethod
    def of(cls, plan: Plan, target: int, head: int) -> "Sizes":
        """From a plan; ``target`` and ``head`` are bytes of the exact weights."""
        layers = len(plan.resident_layers) + len(plan.streamed_layers)
        ring = plan.ring_slots * plan.layer_bytes
        return cls(plan.streamed_bytes_per_pass, ring, plan.level_read_bytes, target, head, layers)


@dataclass(frozen=True)
class Iteration:
    """A predicted iteration.

    Attributes:
        draft_s, pass_s: seconds of drafting, and of the target's pass with its end.
        tau: emitted tokens.
        ceiling: tokens/s at this tau if only streaming took time; None: nothing is streamed.
    """

    draft_s: float
    pass_s: float
    tau: float
    ceiling: float | None

    @property
    def seconds(self) -> float:
        """Seconds of the iteration."""
        return self.draft_s + self.pass_s

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed."""
        return self.tau / self.seconds


def level_seconds(sizes: Sizes, machine: Machine) -> float:
    """Seconds of one draft level; 0 without a draft."""
    if machine.level_s is not None:
        return machine.level_s
    if not sizes.level:
        return 0.0
    return sizes.layers * LEVEL_LAYER_S + _read(sizes.level, machine)


def pass_seconds(sizes: Sizes, machine: Machine, draft_s: float) -> float:
    """Seconds of the target's pass and its end, after ``draft_s`` seconds in which the link filled the ring."""
    link = machine.link_gb_per_s * 1e9
    end = _read(sizes.head, machine) + OTHER_S
    ahead = min(sizes.ring / link, draft_s + end)
    return max(sizes.streamed / link - ahead, _read(sizes.target, machine)) + end


def plain(sizes: Sizes, machine: Machine) -> Iteration:
    """Plain decoding: one token a pass."""
    return Iteration(0.0, pass_seconds(sizes, machine, 0.0), 1.0, _ceiling(sizes, machine, 1.0))


def serial(sizes: Sizes, machine: Machine, acceptance: Acceptance, depth: int) -> Iteration:
    """Draft at most ``depth`` levels, then verify them."""
    draft = acceptance.levels(depth) * level_seconds(sizes, machine)
    tau = acceptance.tau(depth)
    return Iteration(draft, pass_seconds(sizes, machine, draft), tau, _ceiling(sizes, machine, tau))


def _read(size: int, machine: Machine) -> float:
    return size / (machine.memory_gb_per_s * 1e9 * EFFICIENCY)


def _ceiling(sizes: Sizes, machine: Machine, tau: float) -> float | None:
    return tau * machine.link_gb_per_s * 1e9 / sizes.streamed if sizes.streamed else None
