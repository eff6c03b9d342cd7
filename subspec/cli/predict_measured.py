"""Measurements of finished runs that a prediction uses: acceptance by depth, and the time of a draft level."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from subspec.config.effective import may_add_head
from subspec.config.quant_checks import USUAL_MODULES
from subspec.config.schema import Config
from subspec.errors import ConfigError, SubspecError
from subspec.planning.acceptance import Acceptance
from subspec.planning.gpu_specs import GpuSpec, find_gpu
from subspec.records.method import config_group, is_quantized, method_label
from subspec.records.metrics import summarise
from subspec.report.run_data import RunData, collect


@dataclass(frozen=True)
class Measured:
    """Measurements of the runs of one method.

    Attributes:
        acceptance: survival by depth.
        level_s: seconds of a draft level, with ``draft.proposer`` of a pass and its proposals; None: nothing was
            drafted on a GPU.
        target, device: recorded names, for which ``level_s`` holds.
        tree: its name.
        planted: whether the weights are planted.
        settings: that change acceptance and a level's time, by key (:func:`_settings`).
    """

    acceptance: Acceptance
    level_s: float | None
    target: str
    device: str
    tree: str
    planted: bool
    settings: Mapping[str, Any]

    def differences(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """(of the runs, of ``config``) by key, where settings differ."""
        wanted = _settings(asdict(config))
        return {key: (own, wanted[key]) for key, own in self.settings.items() if own != wanted[key]}

    def check(self, config: Config) -> list[str]:
        """Lines for people about the differences.

        Raises:
            ConfigError: the runs are of another kind of draft.
        """
        found = self.differences(config)
        if "draft.name" in found:
            theirs, ours = found["draft.name"]
            raise ConfigError(
                f"--from: that run has draft={theirs}, and this prediction is for draft={ours}: set draft={theirs}, "
                f"or give a run with draft={ours}"
            )
        now = config.tree.name
        if "adaptive" in (self.tree, now):  # of the others, levels survive alike
            found |= {"tree": (self.tree, now)} if self.tree != now else {}
        return [f"acceptance was measured with {key}={a}, and this prediction has {b}" for key, (a, b) in found.items()]

    def fits(self, config: Config, card: GpuSpec | None) -> bool:
        """Whether ``level_s`` holds for ``config`` on ``card``; planted and real targets take the same time."""
        if card is None or _card_name(self.device) != _card_name(card.name):
            return False
        return _shape(self.target) == _shape(config.target.name) and not self.differences(config)


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
    tree, settings = str(config_group(first.config, "tree").get("name")), _settings(first.config)
    if not is_quantized(first.config, first.facts):
        settings = {key: value for key, value in settings.items() if not key.startswith("quant.")}
    levels = sum(totals["drafted_by_depth"])
    passes = (settings["draft.proposer"] and totals.get("draft_passes")) or levels
    cuda = summary["context"]["device"] == "cuda"
    gpu = ((first.environment.get("hardware") or {}).get("gpu") or {}) if cuda else {}
    ((method, target),) = methods
    source = f"measured by depth, of {method} of {target}: {len(runs)} run(s) in {place} (tau {totals['tau']:.2f})"
    acceptance = Acceptance.from_counts(
        totals["drafted_by_depth"], totals["accepted_by_depth"], source, adaptive=tree == "adaptive"
    )
    return Measured(
        replace(acceptance, passes=passes / levels),
        totals["draft_s"] / passes if cuda and totals["draft_s"] else None,
        target,
        str(gpu.get("name") or "unknown"),
        tree,
        summary["context"]["planted"] is True,
        settings,
    )


def _target(run: RunData) -> str:
    return str(run.summary["context"]["target"])


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that select the drafting model, the bytes that its levels read, and their rows."""
    draft, quant, tree = (config_group(config, group) for group in ("draft", "quant", "tree"))
    found = {f"draft.{key}": draft.get(key) or None for key in ("name", "path", "layers", "keep", "quantize")}
    proposer = draft.get("proposer")
    proposer = getattr(proposer, "value", proposer)
    proposes = proposer not in (None, "none")
    found["draft.proposer"] = proposer if proposes else None
    found |= {f"draft.{key}": draft.get(key) if proposes else None for key in ("proposer_path", "proposed")}
    found |= {f"quant.{key}": quant.get(key) for key in ("name", "bits")}
    found["quant.bits_by"] = {key: bits for key, bits in config_group(quant, "bits_by").items() if bits is not None}
    modules = quant.get("modules")
    if modules is None:
        modules = ["as planned"] if may_add_head(config) else USUAL_MODULES
    found["quant.modules"] = sorted(modules)
    return found | {"tree.width": tree.get("width", 1 if tree.get("name") == "chain" else None)}


def _card_name(name: str) -> str:
    """The table's name of a GPU, given the driver's or a user's; unchanged if the table lacks it."""
    try:
        return find_gpu(name).name
    except ConfigError:
        return name


def _shape(target: str) -> str:
    return target.removeprefix("planted_")
