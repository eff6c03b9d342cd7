"""Predicted speeds over tree depths, from a configuration, a machine and an acceptance."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from subspec.codec.coding import draft_head
from subspec.config.enums import Codec, Proposer
from subspec.config.quant_checks import HEAD, bits_by_linear, module_entries
from subspec.config.schema import (
    AdaptiveTreeConfig,
    BeamTreeConfig,
    Config,
    Dtype,
    HqqConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.from_config import build_tree_policy
from subspec.decoding.text_loop import ROW_MULTIPLE
from subspec.drafts.cascade import SHARE
from subspec.drafts.cascade_spec import passes_of, proposer_of
from subspec.drafts.vocabulary import known_tokens
from subspec.errors import ConfigError
from subspec.planning.acceptance import Acceptance
from subspec.planning.plan import Plan, plan_run
from subspec.planning.predict_timing import (
    EIGHT_BITS,
    RESTORE_RATE,
    Iteration,
    Machine,
    Sizes,
    level_seconds,
    plain,
    proposals_seconds,
    serial,
)
from subspec.targets.layer_bytes import PlainCodec
from subspec.targets.model_spec import ModelSpec
from subspec.utils.rounding import round_up

DEPTHS = (4, 8, 16, 24, 32, 48, 64)
"""Tree depths predicted besides the configured one."""


@dataclass(frozen=True)
class Depth:
    """The prediction for one tree depth.

    Attributes:
        depth: levels of the tree.
        resident: number of resident layers in its plan. streamed_gb: GB over the link per pass.
        extrapolated: deeper than the acceptance was measured.
    """

    depth: int
    resident: int
    streamed_gb: float
    iteration: Iteration
    extrapolated: bool


@dataclass(frozen=True)
class Prediction:
    """Predictions for one configuration.

    Attributes:
        plan: of the configured depth.
        machine, acceptance: the assumptions.
        level_s: seconds of a draft level, or of a pass of a cascade without its proposals.
        plain: plain streaming in the same budget; None: it does not fit.
        depths: ascending tree depths that fit the budget. too_deep: those that do not.
        adaptive: whether the tree is adaptive; ``depth`` is then the most levels.
        rows: of a draft level, or of a pass of a cascade. proposals_s: seconds of its proposals.
    """

    plan: Plan
    machine: Machine
    acceptance: Acceptance
    level_s: float
    plain: Iteration | None
    depths: tuple[Depth, ...]
    too_deep: tuple[int, ...]
    adaptive: bool
    rows: int
    proposals_s: float

    @property
    def best(self) -> Depth:
        return max(self.depths, key=lambda one: one.iteration.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        def iteration(one: Iteration | None) -> dict[str, Any] | None:
            return None if one is None else {**asdict(one), "tokens_per_s": one.tokens_per_s}

        return {
            "plan": self.plan.to_dict(),
            "machine": asdict(self.machine),
            "acceptance": asdict(self.acceptance),
            "level_s": self.level_s,
            "rows": self.rows,
            "proposals_s": self.proposals_s,
            "plain": iteration(self.plain),
            "depths": [{**asdict(one), "iteration": iteration(one.iteration)} for one in self.depths],
            "too_deep": list(self.too_deep),
        }


def predict(
    config: Config, model: PretrainedConfig, machine: Machine, acceptance: Acceptance, depths: Sequence[int] = DEPTHS
) -> Prediction:
    """Predict speeds; nothing is loaded.

    Args:
        config: a run with ``offload=stream`` and a draft; width and depth of its tree are used. Layers that it leaves
            to a disk are read at ``offload.disk_gb_per_s``.
        model: the target's transformers configuration.
        machine: bandwidths; its link is used for the plan too.
        acceptance: measured with the tree's width.
        depths: predicted besides the configured depth.

    Raises:
        ConfigError: the configured run does not fit or does not stream, or a speed that it needs is not known.
    """
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(f"offload={config.offload.name}: predictions are for offload=stream")
    configured = config.tree.depth
    plan = _plan(config, model, machine, configured)
    if plan.disk_layers and plan.disk is None:
        raise ConfigError(
            f"offload.ram_gib={config.offload.ram_gib} leaves {len(plan.disk_layers)} layers to a disk: set "
            "offload.disk_gb_per_s to its bandwidth"
        )
    machine = replace(machine, disk_gb_per_s=plan.disk.gb_per_s if plan.disk else None)
    planned = {depth: _try_plan(config, model, machine, depth) for depth in depths} | {configured: plan}
    drafting = _drafting(config, model, machine, plan)
    found = []
    for depth, own in sorted(planned.items()):
        if own is not None:
            sizes = replace(_sizes(config, model, own, acceptance.levels(depth)), **drafting)
            iteration = serial(sizes, machine, acceptance, depth)
            resident, streamed = len(own.resident_layers), own.streamed_bytes_per_pass / 1e9
            found.append(Depth(depth, resident, streamed, iteration, acceptance.extrapolated(depth)))
    sizes = replace(_sizes(config, model, plan, configured), **drafting)
    return Prediction(
        plan=plan,
        machine=machine,
        acceptance=acceptance,
        level_s=level_seconds(sizes, machine),
        plain=_plain(plan, sizes, machine, config.offload.ring_slots),
        depths=tuple(found),
        too_deep=tuple(depth for depth, own in sorted(planned.items()) if own is None),
        adaptive=isinstance(config.tree, AdaptiveTreeConfig),
        rows=sizes.rows,
        proposals_s=proposals_seconds(sizes, machine),
    )


def _try_plan(config: Config, model: PretrainedConfig, machine: Machine, depth: int) -> Plan | None:
    try:
        return _plan(config, model, machine, depth)
    except ConfigError:
        return None


def _plan(config: Config, model: PretrainedConfig, machine: Machine, depth: int) -> Plan:
    tree = BeamTreeConfig(name="beam", depth=depth, width=_width(config))
    named = isinstance(config.offload, StreamOffloadConfig) and config.offload.card is not None
    return plan_run(
        replace(config, tree=tree),
        model,
        link_gb_per_s=None if named else machine.link_gb_per_s,  # the plan then names the GPU's own link
        host_free=None,
        device=None,
    )


def _width(config: Config) -> int:
    return getattr(config.tree, "width", 1)


def _sizes(config: Config, model: PretrainedConfig, plan: Plan, levels: float) -> Sizes:
    """Sizes of a run whose trees have ``levels`` levels on average, and of levels without a proposer."""
    spec, itemsize = ModelSpec.of(model), 4 if config.target.dtype is Dtype.float32 else 2
    nodes = round_up(math.ceil(levels * _width(config)) + 1, ROW_MULTIPLE)
    coded, rate = plan.codec is Codec.substitute, RESTORE_RATE.get(config.quant.name, 1.0)
    return Sizes(
        streamed=plan.streamed_bytes_per_pass,
        ring=plan.ring_slots * plan.layer_bytes,
        disk=plan.disk_bytes_per_pass,
        level=plan.level_read_bytes,
        target=spec.layers * PlainCodec(itemsize).layer_bytes(spec.layer),
        head=spec.vocab * spec.hidden * itemsize,
        layers=spec.layers,
        operations=2 * nodes * _linear_weights(spec),
        restored=_linear_weights(spec) * coded,
        restored_head=spec.vocab * spec.hidden * bool(plan.coded_head_bytes),
        restore_rate=rate * _share(getattr(config.quant, "bits", None)),
        head_rate=rate * _share(_head_bits(config, plan)),
    )


def _share(bits: int | None) -> float:
    """Of the rate at which weights are restored beside 4 bits."""
    return EIGHT_BITS if bits == 8 else 1.0


def _head_bits(config: Config, plan: Plan) -> int | None:
    """Bits of the draft's own LM head of HQQ, by which the exact one is coded."""
    quant = draft_head(config, codes=True, texts=plan.texts).quant
    return bits_by_linear(quant.bits, quant.bits_by, quant.modules).get(HEAD) if isinstance(quant, HqqConfig) else None


def _linear_weights(spec: ModelSpec) -> int:
    return spec.layers * sum(shape.numel() for shape in spec.layer.values() if len(shape) > 1)


def _drafting(config: Config, model: PretrainedConfig, machine: Machine, plan: Plan) -> dict[str, int]:
    """The fields of :class:`Sizes` that say what a substitute's level, or a cascade's pass, computes and reads."""
    spec, width, draft = ModelSpec.of(model), _width(config), config.draft
    if not isinstance(draft, SubstituteDraftConfig):
        return {}
    row = 2 * (_linear_weights(spec) + known_tokens(draft, spec.vocab) * spec.hidden)
    if proposer_of(config) is None:
        return {"rows": width, "row_operations": row}
    if machine.tensor is None and machine.level_s is None:
        raise ConfigError(
            "draft.proposer: the time of a pass of many rows is not known of this GPU: give level_ms, of a pass"
        )
    own = draft_head(config, codes=plan.coded_head_bytes > 0, texts=plan.texts).quant  # with the head that the plan has
    quant = replace(own, modules=module_entries(own.modules))
    alone = replace(config, draft=replace(draft, proposer=Proposer.none), quant=quant)
    level = _plan(alone, model, machine, config.tree.depth).level_read_bytes
    return {
        "rows": passes_of(build_tree_policy(config.tree), draft.proposed).width,
        "row_operations": row,
        "level": level,
        "proposals": guessed_levels(width, draft.proposed) * (plan.level_read_bytes - level),
    }


def guessed_levels(width: int, proposed: int) -> int:
    """Most levels that a proposer guesses for a pass: one pass of the proposer each."""
    levels = 0
    while proposed > 0:
        proposed -= max(width, int(proposed * SHARE))
        levels += 1
    return levels


def _plain(plan: Plan, sizes: Sizes, machine: Machine, slots: int) -> Iteration | None:
    """Plain decoding, whose weights stream as they are."""
    if plan.plain_bytes_per_pass is None or plan.plain_resident is None:
        return None
    streamed = sizes.layers - plan.plain_resident
    layer = plan.plain_bytes_per_pass // streamed if streamed else 0
    exact = replace(
        sizes,
        streamed=plan.plain_bytes_per_pass,
        ring=min(slots, streamed) * layer,
        disk=plan.plain_disk_bytes,
        operations=0,
        restored=0,
        restored_head=0,
    )
    return plain(exact, machine)
