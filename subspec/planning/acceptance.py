"""Accepted tokens per pass for trees of any depth, from one measurement.

The survival s(d) is the share of passes that accept at least d draft tokens. A beam's first d levels do not depend on
the number of further levels, so one deep run determines tau of every shallower tree:

    tau(D) = 1 + s(1) + ... + s(D)        (1: the target's own bonus token)

If only a tau is known, every level is assumed to survive with the same probability p, independently, so that
tau = 1 + p + ... + p^D; p follows by bisection. The same p extends a measured curve below its deepest level; such
figures are marked as extrapolated.

An adaptive tree stops where it is unsure. Of its runs, s(d) is of all passes, and the share of passes that draft d is
known: a tree of at most D levels drafts the sum of these shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from subspec.errors import ConfigError

THIN = 0.5
"""A level drafted by a smaller share of the passes is no evidence about the passes that stopped before it."""


@dataclass(frozen=True)
class Acceptance:
    """The survival of drafted levels.

    Attributes:
        measured: s(1), s(2), ... as measured; empty when only a tau is known.
        per_level: p, the survival of one level given its parent's, used below the measured depths.
        depth: deepest level that ``measured`` or the known tau covers.
        source: origin of the figures, for people.
        notes: limitations, one line each.
        drafted: shares of passes that draft level 1, 2, ... of an adaptive tree; empty: all do.
        passes: of the substitute for a drafted level: 1, or fewer with ``draft.proposer``.
    """

    measured: tuple[float, ...]
    per_level: float
    depth: int
    source: str
    notes: tuple[str, ...] = ()
    drafted: tuple[float, ...] = ()
    passes: float = 1.0

    @classmethod
    def from_tau(cls, tau: float, depth: int) -> "Acceptance":
        """From a tau measured with a tree of ``depth`` levels.

        Raises:
            ConfigError: no tree of this depth has such a tau.
        """
        p = constant_survival(tau, depth)
        source = f"tau {tau:g} at depth {depth}, set by hand; the same survival {p:.4f} at every level"
        return cls((), p, depth, source)

    @classmethod
    def from_counts(
        cls, drafted: Sequence[int], accepted: Sequence[int], source: str, *, adaptive: bool = False
    ) -> "Acceptance":
        """From iterations that drafted and accepted each depth. ``adaptive``: they stopped where they were unsure.

        Raises:
            ConfigError: nothing was drafted.
        """
        counts = [(tried, hit) for tried, hit in zip(drafted, accepted, strict=False) if tried > 0]
        if not counts:
            raise ConfigError(f"{source}: no draft tree in these records; take a run with draft=subspec")
        survival: list[float] = []
        passes = counts[0][0]
        for tried, hit in counts:  # a level is accepted only below an accepted one: a rise is noise
            survival.append(min(hit / (passes if adaptive else tried), survival[-1] if survival else 1.0))
        tau = 1 + sum(survival)
        notes = ()
        if not adaptive and counts[-1][0] < THIN * passes:
            notes = (
                f"{source}: only {counts[-1][0]} of {passes} passes drafted depth {len(counts)}, so its deep levels "
                "look better than they are",
            )
        shares = tuple(tried / passes for tried, _ in counts) if adaptive else ()
        p = constant_survival(min(tau, len(survival) + 1), len(survival))
        return cls(tuple(survival), p, len(survival), source, notes, shares)

    def survival(self, depth: int) -> float:
        """s(depth): share of passes that accept at least ``depth`` draft tokens; s(0) = 1."""
        if depth <= 0:
            return 1.0
        known = len(self.measured)
        if depth <= known:
            return self.measured[depth - 1]
        start = self.measured[-1] if known else 1.0
        return start * self.per_level ** (depth - known)

    def tau(self, depth: int) -> float:
        """Tokens per pass of a tree with ``depth`` levels."""
        return 1 + sum(self.survival(level) for level in range(1, depth + 1))

    def levels(self, depth: int) -> float:
        """Levels that a tree of at most ``depth`` levels drafts, on average."""
        shares = self.drafted or (1.0,)
        return sum(shares[:depth]) + shares[-1] * max(0, depth - len(shares))

    def extrapolated(self, depth: int) -> bool:
        return depth > self.depth


def constant_survival(tau: float, depth: int) -> float:
    """p in [0, 1] with 1 + p + ... + p^depth = tau.

    Raises:
        ConfigError: tau lies outside [1, depth + 1].
    """
    if depth < 1 or not 1 <= tau <= depth + 1:
        raise ConfigError(
            f"tau={tau:g}: a tree of depth {depth} gives 1 to {depth + 1} tokens a pass; set tau_depth to the depth "
            "that tau was measured at"
        )
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if sum(middle**level for level in range(depth + 1)) < tau:
            low = middle
        else:
            high = middle
    return (low + high) / 2
