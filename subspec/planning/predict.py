"""Predicted speeds over tree depths, from a configuration, a machine and an acceptance."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from subspec.config.schema import AdaptiveTreeConfig, BeamTreeConfig, Config, StreamOffloadConfig
from subspec.errors import ConfigError
from subspec.planning.acceptance import Acceptance
from subspec.planning.plan import Plan, plan_run
from subspec.planning.predict_timing import Iteration, Machine, Sizes, level_seconds, plain, serial
from subspec.targets.layer_bytes import PlainCodec
from subspec.targets.model_spec import ModelSpec

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
        level_s: seconds of a draft level.
        plain: plain streaming in the same budget; None: it does not fit.
        depths: ascending tree depths that fit the budget. too_deep: those that do not.
        adaptive: whether the tree is adaptive; ``depth`` is then the most levels.
    """

    plan: Plan
    machine: Machine
    acceptance: Acceptance
    level_s: float
    plain: Iteration | None
    depths: tuple[Depth, ...]
    too_deep: tuple[int, ...]
    adaptive: bool

    @property
    def best(self) -> Depth:
        """The fastest depth."""
        return max(self.depths, key=lambda one: one.iteration.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Builtin types, for a file."""

        def iteration(one: Iteration | None) -> dict[str, Any] | None:
            return None if one is None else {**asdict(one), "tokens_per_s": one.tokens_per_s}

        return {
            "plan": self.plan.to_dict(),
            "machine": asdict(self.machine),
            "acceptance": asdict(self.acceptance),
            "level_s": self.level_s,
            "plain": iteration(self.plain),
            "depths": [{**asdict(one), "iteration": iteration(one.iteration)} for one in self.depths],
            "too_deep": list(self.too_deep),
        }


def predict(
    config: Config, model: PretrainedConfig, machine: Machine, acceptance: Acceptance, depths: Sequence[int] = DEPTHS
) -> Prediction:
    """Predict speeds; nothing is loaded.

    Args:
        config: a run with ``offload=stream`` and a draft; width and depth of its tree are used.
        model: the target's transformers configuration.
        machine: bandwidths; its link is used for the plan too.
        acceptance: measured with the tree's width.
        depths: predicted besides the configured depth.

    Raises:
        ConfigError: the configured run does not fit, or does not stream.
    """
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(f"offload={config.offload.name}: predictions are for offload=stream")
    configured = config.tree.depth
    weights = _weights(model, config)
    plan = _plan(config, model, machine, configured)
    if plan.disk_layers:
        raise ConfigError(
            f"offload.ram_gib={config.offload.ram_gib} leaves {len(plan.disk_layers)} layers to a disk, which is not "
            "predicted: raise it, or see the ceilings with plan_only=true and offload.disk_gb_per_s"
        )
    found, too_deep = [], []
    for depth in sorted({configured, *depths}):
        one = _depth(config, model, machine, acceptance, weights, depth)
        if one is None:
            too_deep.append(depth)
        else:
            found.append(one)
    sizes = Sizes.of(plan, *weights)
    return Prediction(
        plan=plan,
        machine=machine,
        acceptance=acceptance,
        level_s=level_seconds(sizes, machine),
        plain=_plain(plan, weights, machine, config.offload.ring_slots),
        depths=tuple(found),
        too_deep=tuple(too_deep),
        adaptive=isinstance(config.tree, AdaptiveTreeConfig),
    )


def _depth(
    config: Config,
    model: PretrainedConfig,
    machine: Machine,
    acceptance: Acceptance,
    weights: tuple[int, int],
    depth: int,
) -> Depth | None:
    try:
        plan = _plan(config, model, machine, depth)
    except ConfigError:
        return None
    return Depth(
        depth=depth,
        resident=len(plan.resident_layers),
        streamed_gb=plan.streamed_bytes_per_pass / 1e9,
        iteration=serial(Sizes.of(plan, *weights), machine, acceptance, depth),
        extrapolated=acceptance.extrapolated(depth),
    )


def _plan(config: Config, model: PretrainedConfig, machine: Machine, depth: int) -> Plan:
    width = getattr(config.tree, "width", 1)
    tree = BeamTreeConfig(name="beam", depth=depth, width=width)
    named = isinstance(config.offload, StreamOffloadConfig) and config.offload.card is not None
    return plan_run(
        replace(config, tree=tree),
        model,
        link_gb_per_s=None if named else machine.link_gb_per_s,  # the plan then names the GPU's own link
        host_free=None,
        device=None,
    )


def _weights(model: PretrainedConfig, config: Config) -> tuple[int, int]:
    """Bytes of all exact layers, and of the LM head."""
    shapes = ModelSpec.of(model)
    itemsize = 4 if config.target.dtype.value == "float32" else 2
    return shapes.layers * PlainCodec(itemsize).layer_bytes(shapes.layer), shapes.vocab * shapes.hidden * itemsize


def _plain(plan: Plan, weights: tuple[int, int], machine: Machine, slots: int) -> Iteration | None:
    if plan.plain_bytes_per_pass is None or plan.plain_resident is None:
        return None
    layers = len(plan.resident_layers) + len(plan.streamed_layers)
    streamed = layers - plan.plain_resident
    layer = plan.plain_bytes_per_pass // streamed if streamed else 0
    sizes = Sizes(plan.plain_bytes_per_pass, min(slots, streamed) * layer, 0, *weights, layers)
    return plain(sizes, replace(machine, level_s=None))
