"""``draft=layer_skip``: self-speculation without training, with some of the target's own layers.

The draft is the target's module graph with a part of its decoder layers (Zhang et al., Draft & Verify, arXiv
2309.08168, section 3, without the search for the best part): residual streams make a model survive missing layers.
Embeddings, final norm, head and KV cache are the target's; every kept layer writes and reads the cache rows of its
own number, so the committed prefix holds exact keys and values for it.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from subspec.config.schema import Config, LayerSkipDraftConfig
from subspec.decoding.draft import LevelDraft
from subspec.decoding.target_model import TargetModel
from subspec.drafts.spec import BuiltDraft, DraftSpec, capture, check_target_levels
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.levels.build import role_shapes
from subspec.levels.dense import dense_levels
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.targets.layer_bytes import flat_bytes
from subspec.utils.rounding import evenly


def chosen_layers(draft: LayerSkipDraftConfig, layers: int) -> tuple[int, ...] | None:
    """The ones of a target's ``layers`` that ``draft`` names, ascending; None if it names none."""
    if draft.layers is not None and draft.keep is not None:
        raise ConfigError("draft.layers and draft.keep both choose the layers: set one of them to null")
    if draft.keep is not None:
        if not 1 <= draft.keep <= layers:
            raise ConfigError(
                f"draft.keep={draft.keep}: the target has {layers} layers, so keep between 1 and {layers}"
            )
        return evenly(layers, draft.keep)
    if draft.layers is None:
        return None
    if not draft.layers:
        raise ConfigError("draft.layers is empty: a draft needs at least one layer, for instance [0]")
    for index in draft.layers:
        if not 0 <= index < layers:
            raise ConfigError(f"draft.layers: no layer {index} in a target with layers 0..{layers - 1}")
    if len(set(draft.layers)) < len(draft.layers):
        raise ConfigError(f"draft.layers={draft.layers} names a layer twice: give each once")
    return tuple(sorted(draft.layers))


def usual_layers(layers: int) -> tuple[int, ...]:
    """The default layers: half of them, rounded up, spread evenly."""
    return evenly(layers, max(1, -(-layers // 2)))


def drafting_layers(draft: LayerSkipDraftConfig, resident: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers that draft: the chosen ones, else the resident ones of a target's ``layers``.

    If every layer is resident, half of them: all of them would be the target itself.
    """
    chosen = chosen_layers(draft, layers)
    if chosen is not None:
        return chosen
    return tuple(sorted(resident)) if len(resident) < layers else usual_layers(layers)


def skip_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A second graph over ``model``'s parameters with only the decoder layers ``layers``; ``model`` stays as it is."""
    skipping = share_parameters(model)
    base = skipping.get_decoder()
    # A layer knows its own number, by which it finds its rows of the cache.
    base.layers = nn.ModuleList([base.layers[index] for index in layers])
    return skipping


class LayerSkipMemory(DraftMemory):
    """Resident layers of the target: a level's workspace is all it adds."""

    required_by = "draft=layer_skip drafts with"
    library = False

    def __init__(self, inputs: SizingInputs) -> None:
        draft, spec = inputs.config.draft, inputs.spec
        self._chosen = chosen_layers(draft, spec.layers)
        # Hardly any model drafts without its first and last layer.
        self.required_resident = self._chosen or evenly(spec.layers, min(2, spec.layers))
        self.shared_rows = inputs.policy.draft_rows
        shape = LevelShape.of(spec, fused_linears(role_shapes(spec.layer), exact=True))
        self.level = captured_level_bytes(shape, inputs.policy.width, inputs.sampling, inputs.texts)
        self._layers, self._usual = spec.layers, len(usual_layers(spec.layers))
        self._layer = flat_bytes(spec.layer, inputs.itemsize)
        self._head = spec.vocab * spec.hidden * inputs.itemsize

    def level_read(self, resident: int) -> int:
        drafting = self._usual if resident == self._layers else resident
        return (len(self._chosen) if self._chosen else drafting) * self._layer + self._head


class LayerSkipSpec(DraftSpec):
    """``draft=layer_skip``: the layers as modules, or the resident ones of a streamed target as captured levels."""

    from_disk = False
    memory = LayerSkipMemory

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        chosen_layers(config.draft, model.num_hidden_layers)
        check_target_levels(config, model)

    def prepare(self) -> None:
        draft, count, plan = self.context.config.draft, self.context.model.num_hidden_layers, self.context.plan
        # Without a plan all layers are on the device.
        self._layers = drafting_layers(draft, range(count) if plan is None else plan.resident_layers, count)

    def build(self, target: TargetModel) -> BuiltDraft:
        config, layers, count = self.context.config.draft, self._layers, target.num_layers
        draft: LevelDraft
        if self.context.plan is None:
            levels = "modules"
            draft = SubstituteDraft(skip_layers(target.model, layers), config.temperature)
        else:
            levels = "fused, bfloat16"
            draft = capture(dense_levels(target.model, layers), config)
        listed = ", ".join(map(str, layers))
        return BuiltDraft(
            draft,
            facts={"layers": list(layers), "target_layers": count, "levels": levels},
            summary=f"{len(layers)} of the target's {count} layers ({listed}), {levels}",
        )
