"""What a finished run says about the next one: acceptance by depth, and the time of a draft level."""

from dataclasses import dataclass
from pathlib import Path

from subspec.errors import ConfigError, SubspecError
from subspec.offload.cards import Card, find_card
from subspec.predict.acceptance import Acceptance
from subspec.report.collect import RunData, collect
from subspec.tracking.method import config_group, method_label
from subspec.tracking.metrics import summarise


@dataclass(frozen=True)
class Measured:
    """Of one method's runs.

    Attributes:
        acceptance: survival by depth.
        level_s: seconds of a draft level; None without one (nothing drafted, or levels drafted ahead).
        target, device: where ``level_s`` holds: names as recorded.
        width: of the tree.
        planted: whether the weights were planted.
    """

    acceptance: Acceptance
    level_s: float | None
    target: str
    device: str
    width: int | None
    planted: bool

    def fits(self, target: str, width: int, card: Card | None) -> bool:
        """Whether a level of this run takes as long as one of a target's (planted or not) on a card."""
        if card is None or self.width != width or _shape(self.target) != _shape(target):
            return False
        try:
            return find_card(self.device) is card
        except ConfigError:
            return False


def read_measured(place: Path) -> Measured:
    """Read a run's folder, a folder above runs of one method, or a ``records.jsonl``.

    Raises:
        ConfigError: nothing in it drafts, or several methods do.
    """
    folder = place.parent if place.is_file() else place
    try:
        runs = [run for run in collect([folder]) if run.summary["totals"]["drafted_by_depth"]]
    except SubspecError as error:
        raise ConfigError(f"--from {error}") from error
    if not runs:
        raise ConfigError(f"--from {place}: no run there drafts; take one with draft=subspec")
    methods = {(method_label(run.config, run.facts), _target(run)) for run in runs}
    if len(methods) > 1:
        names = "; ".join(sorted(f"{method} of {target}" for method, target in methods))
        raise ConfigError(f"--from {place} holds runs of several methods ({names}): give the folder of one")
    first = runs[0]
    summary = summarise([record for run in runs for record in run.records])
    totals = summary["totals"]
    tree = config_group(first.config, "tree")
    levels = sum(totals["drafted_by_depth"])
    cuda = summary["context"]["device"] == "cuda"
    serial = not tree.get("ahead") and cuda
    gpu = ((first.environment.get("hardware") or {}).get("gpu") or {}) if cuda else {}
    ((method, target),) = methods
    source = f"by depth, of {method} of {target}: {len(runs)} run(s) in {place} (tau {totals['tau']:.2f})"
    return Measured(
        Acceptance.from_counts(totals["drafted_by_depth"], totals["accepted_by_depth"], source),
        totals["draft_s"] / levels if serial and levels and totals["draft_s"] else None,
        _target(first),
        str(gpu.get("name") or "unknown"),
        tree.get("width", 1 if tree.get("name") == "chain" else None),
        summary["context"]["planted"] is True,
    )


def _target(run: RunData) -> str:
    return str(run.summary["context"]["target"])


def _shape(target: str) -> str:
    """Planted and real targets of a shape take the same time."""
    return target.removeprefix("planted_")
