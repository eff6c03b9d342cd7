"""A beam whose depth adapts to the draft's confidence and to measured times.

A further level is worth drafting while its expected tokens per second of cost exceed the run's average tokens per
second (the marginal-value rule; for a ratio of sums it is Dinkelbach's condition for the optimum). The expectation is
the draft's cumulative probability of the level, calibrated against the target's acceptance, since a draft sharpened
with a low temperature is overconfident.

With a least depth of 0 it also compares drafting with plain decoding, and drafts nothing while that is faster. What a
plain pass takes less than one over a tree is the price of the tree's rows, which then counts as a part of a level's.
"""

import math
from collections import deque
from dataclasses import replace
from statistics import median

from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, IterationOutcome, level_masses


class Calibration:
    """Maps the draft's probability of a level to the observed share of accepted levels.

    Counts in bins of -log(mass), starting from a few pseudo-observations that trust the draft.
    """

    BINS = 12
    WIDTH = 0.25
    PRIOR = 2.0

    def __init__(self) -> None:
        self._seen = [self.PRIOR] * self.BINS
        self._accepted = [self.PRIOR * math.exp(-(i + 0.5) * self.WIDTH) for i in range(self.BINS)]

    def _bin(self, cost: float) -> int:
        return min(int(cost / self.WIDTH), self.BINS - 1)

    def observe(self, cost: float, accepted: bool) -> None:
        """Count a level with -log(mass) ``cost``, and whether it held an accepted node."""
        self._seen[self._bin(cost)] += 1
        self._accepted[self._bin(cost)] += accepted

    def probability(self, cost: float) -> float:
        """Probability that a level with -log(mass) ``cost`` holds an accepted node."""
        return self._accepted[self._bin(cost)] / self._seen[self._bin(cost)]


class PlainComparison:
    """Compares drafting with plain decoding by the tokens per second of whole iterations.

    After every few trials a tree of the root alone tells what plain decoding takes. Where that is faster, a pause
    follows, twice as long as the last one. Times are medians, because other processes stretch some of them.

    Attributes:
        drafting: whether the next tree has levels.
        row_s: seconds that a further row adds to a verification pass.
    """

    TRIAL = 8  # iterations with a draft that are compared
    PROBE = 2  # iterations without, between trials: about 2 % of all
    TRIALS = 10  # between two probes
    PAUSE, LONGEST = 8, 256  # iterations

    def __init__(self) -> None:
        self.drafting, self.row_s = True, 0.0
        self._plain: deque[float] = deque(maxlen=self.TRIAL)
        self._trial: deque[IterationOutcome] = deque(maxlen=self.TRIAL)
        self._trials, self._pause, self._left = 0, self.PAUSE, self.PROBE

    def learn(self, outcome: IterationOutcome) -> None:
        """Take note of an iteration, whose times may have any unit."""
        if outcome.levels:
            self._trial.append(outcome)
        else:
            self._plain.append(outcome.verify_s)
        pays = self._compare()
        self._left -= outcome.levels == 0 or self.drafting
        if self._left > 0:
            return
        if not self.drafting:
            self.drafting, self._left = True, self.TRIAL
        elif not pays:
            self.drafting, self._left = False, self._pause
            self._pause = min(2 * self._pause, self.LONGEST)
        else:
            self.drafting = self._trials % self.TRIALS > 0
            self._left = self.TRIAL if self.drafting else self.PROBE
            self._trials, self._pause = self._trials + 1, self.PAUSE

    def _compare(self) -> bool:
        """Whether drafting pays, as far as is known."""
        if not self._plain or not self._trial:
            return True
        plain, verify = median(self._plain), median(own.verify_s for own in self._trial)
        rows = sum(own.nodes - len(own.accepted) for own in self._trial) / len(self._trial)
        self.row_s = max(0.0, verify - plain) / max(rows, 1)
        level = median(own.draft_s / own.levels for own in self._trial)
        seconds = sum(own.levels for own in self._trial) * level + len(self._trial) * verify
        # Of a text: one more than its accepted level in a pass, or one in a plain pass.
        return sum(1 + sum(own.accepted) / len(own.accepted) for own in self._trial) * plain > seconds


class Adaptive(Beam):
    """Beam of at most ``depth`` levels.

    Args:
        level_cost: time of a draft level in verification passes; None: both are measured while running (depths then
            depend on the machine's load, the output does not).
        check_every: levels between two checks of the level's probability, each of which reads one number back.
        min_depth: levels drafted without a check; 0: one, or none while plain decoding is faster.
    """

    DECAY = 0.9  # of the running averages, per iteration
    SUDDEN = 4.0  # where drafting pays, a deep tree and a pass take less than this many times a pass alone

    def __init__(
        self, depth: int, width: int, *, level_cost: float | None = None, check_every: int = 1, min_depth: int = 1
    ) -> None:
        super().__init__(depth, width)
        if check_every < 1 or not 0 <= min_depth <= depth:
            raise ValueError(
                f"tree.check_every must be at least 1 and tree.min_depth in 0..{depth}, not {check_every} "
                f"and {min_depth}"
            )
        self.level_cost = level_cost
        self.check_every = check_every
        self.min_depth = min_depth
        self._calibration = Calibration()
        self._costs: dict[int, list[float]] = {}
        self._level_s = 0.0
        self._tokens, self._seconds = 0.0, 0.0
        self._plain = PlainComparison() if min_depth == 0 else None

    def begin_tree(self, texts: int = 1) -> None:
        super().begin_tree(texts)
        self._costs.clear()

    def sharpened(self, temperature: float) -> float:
        # A chain's tokens do not depend on the temperature, and its probabilities tell more unsharpened.
        return 1.0 if self.width == 1 else temperature

    def wants_level(self, *trees: Tree) -> bool:
        level = max(tree.levels for tree in trees)
        if level >= self.max_depth or (self._plain is not None and not self._plain.drafting):
            return False
        if level < max(self.min_depth, 1) or level % self.check_every:
            return True
        # One read, on the check levels only. NaN counts as no probability.
        costs = self._costs[level] = [max(0.0, -math.log(max(1e-30, mass))) for mass in level_masses(trees)]
        if self._seconds == 0:
            return True  # nothing measured yet
        # The next levels lose mass at this tree's own rate so far.
        gain = sum(
            self._calibration.probability(cost * (level + step) / level)
            for cost in costs
            for step in range(1, self.check_every + 1)
        )
        row_s = 0.0 if self._plain is None else self._plain.row_s
        price = (self._level_seconds() + len(trees) * self.breadth * row_s) * self.check_every
        return gain * self._seconds >= self._tokens * len(trees) * price

    def _level_seconds(self) -> float:
        return self._level_s if self.level_cost is None else self.level_cost

    def learn(self, outcome: IterationOutcome) -> None:
        for level, costs in self._costs.items():
            for cost, accepted in zip(costs, outcome.accepted, strict=True):
                self._calibration.observe(cost, accepted >= level)
        if self.level_cost is None:
            level_s = outcome.draft_s / outcome.levels if outcome.levels else self._level_s
            verify_s = outcome.verify_s
        else:
            level_s, verify_s = self.level_cost, 1.0
        seconds = outcome.levels * level_s + verify_s
        if self._plain is not None:
            self._plain.learn(replace(outcome, draft_s=outcome.levels * level_s, verify_s=verify_s))
        if not outcome.levels:
            return  # tells nothing of drafting
        # The first iterations compile and load kernels: a far faster one restarts the averages.
        first = self._seconds == 0 or seconds < self._seconds / self.SUDDEN
        keep = 0.0 if first else self.DECAY
        self._level_s = keep * self._level_s + (1 - keep) * level_s
        tokens = 1 + sum(outcome.accepted) / len(outcome.accepted)  # of a text: their number changes
        self._tokens = keep * self._tokens + (1 - keep) * tokens
        self._seconds = keep * self._seconds + (1 - keep) * seconds
