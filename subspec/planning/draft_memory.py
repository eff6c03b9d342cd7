"""Memory of each kind of draft, from shapes and traces of its own code; :data:`DRAFTS` maps configurations to classes.

Memory that does not depend on the kind of draft (the tree, the target's passes, its norms and biases) belongs to
:mod:`subspec.planning.memory_layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from subspec.config.schema import (
    Config,
    DraftConfig,
    Eagle2DraftConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree_policy import TreePolicy
from subspec.errors import ConfigError
from subspec.levels.build import role_shapes
from subspec.levels.quantization import LevelQuantization
from subspec.planning.allocator import GRAPH_BYTES, Allocation, Tensors
from subspec.planning.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.planning.trace import (
    LEVELS,
    META,
    TargetTrace,
    draft_level_bytes,
    peak_bytes,
    target_trace,
    token_ids,
)
from subspec.targets.layer_bytes import flat_bytes
from subspec.targets.model_spec import ModelSpec
from subspec.utils.console import print_note

if TYPE_CHECKING:
    from subspec.drafts.eagle_head import EagleShape

CAPTURED_ITEMSIZE = 2
"""Bytes per weight of captured levels, which compute in bfloat16."""


@dataclass(frozen=True)
class SizingInputs:
    """Inputs of a draft's sizes.

    Attributes:
        model, spec: of the target. target: its traces.
        itemsize: bytes per weight of the target.
        quantization: of a substitute; None for other drafts.
    """

    config: Config
    model: PretrainedConfig
    spec: ModelSpec
    target: TargetTrace
    itemsize: int
    policy: TreePolicy
    sampling: Sampling
    quantization: LevelQuantization | None = None


class DraftMemory:
    """Memory of a draft, in bytes.

    Attributes:
        allocations: on the device for the whole run.
        required_resident: layers of the target that must be resident. required_by: the reason, before "N layers" in a
            message.
        shared_rows: rows in the draft region of the target's KV cache; 0 for a draft with a cache of its own.
        level: peak of a draft level, logits included. captured: whether levels are captured as CUDA graphs.
        workspaces: peaks of the draft's other work, by name. They do not coincide with each other or with the target's
            passes: the largest counts.
    """

    allocations: tuple[Allocation, ...] = ()
    required_resident: tuple[int, ...] = ()
    required_by = ""
    shared_rows = 0
    level = 0
    captured = True
    workspaces: Mapping[str, int] = {}
    read = 0

    def level_read(self, resident: int) -> int:
        """Bytes of weights, layers and LM head, that a draft level reads with ``resident`` resident layers."""
        return self.read

    @property
    def level_tensors(self) -> Tensors:
        """A level's peak, and the graphs' fragments."""
        return ((self.level, 1), (GRAPH_BYTES, int(self.captured)))


class SubstituteMemory(DraftMemory):
    """The quantized substitute: a copy of every layer, exact for those in ``quant.skip_layers``."""

    required_by = "quant.skip_layers keeps"

    def __init__(self, inputs: SizingInputs) -> None:
        spec, quantization = inputs.spec, inputs.quantization
        assert quantization is not None
        self.required_resident = tuple(sorted(set(getattr(inputs.config.quant, "skip_layers", ()))))
        skipped = len(self.required_resident)
        self.allocations = substitute_allocations(quantization, spec.layers - skipped, skipped)
        self.shared_rows = inputs.policy.draft_rows
        own_head = "head" in quantization.shapes
        linears = fused_linears(quantization.exact, exact=True) + fused_linears(
            quantization.shapes, exact=False
        )
        self.level = captured_level_bytes(
            LevelShape.of(spec, linears, own_head=own_head), inputs.policy.width, inputs.sampling
        )
        shared_head = 0 if own_head else spec.vocab * spec.hidden * inputs.itemsize
        self.read = sum(allocation.bytes for allocation in self.allocations) + shared_head


def substitute_allocations(
    quantization: LevelQuantization, replaced: int, skipped: int, note: str = ""
) -> tuple[Allocation, ...]:
    """A substitute of ``replaced`` quantized layers and ``skipped`` exact ones.

    The packed weights of a layer are one allocation, every exact fused Linear is one.
    """
    exact = [n * k * CAPTURED_ITEMSIZE for n, k in quantization.exact.values()]
    layer = [n * k * CAPTURED_ITEMSIZE for role, (n, k) in quantization.shapes.items() if role != "head"]
    kept = [(size, replaced) for size in exact] + [(size, skipped) for size in exact + layer]
    return (
        Allocation(
            "substitute",
            ((quantization.layer_bytes, replaced), (quantization.head_bytes, 1)),
            note + quantization.summary(),
        ),
        Allocation("exact substitute", tuple(kept), "bfloat16: what stays exact"),
    )


class SmallModelMemory(DraftMemory):
    """A model with a KV cache of its own; it runs the prompt itself."""

    def __init__(self, inputs: SizingInputs) -> None:
        # Imported here: the small model's module knows how to fetch and load, which other plans do not need.
        from subspec.drafts.separate_cache import prompt_rows
        from subspec.drafts.small_model import load_small_config, small_shapes

        config = load_small_config(inputs.config)
        model, target, policy = small_shapes(inputs.config), inputs.spec, inputs.policy
        known = min(model.vocab, target.vocab)
        table = max(model.vocab, target.vocab) * model.hidden * CAPTURED_ITEMSIZE
        head = known * model.hidden * CAPTURED_ITEMSIZE
        layer = flat_bytes(model.layer, CAPTURED_ITEMSIZE)
        length = inputs.config.decoding.max_length
        rows = prompt_rows(length)
        trace = target_trace(config, CAPTURED_ITEMSIZE, bitwise=False)
        cache = kv_bytes(model, length, policy.draft_rows, rows, CAPTURED_ITEMSIZE)
        self.allocations = (
            Allocation(
                "small model",
                (
                    (layer, model.layers),
                    (table, 1),
                    (head, int(not model.tied)),
                    (model.hidden * CAPTURED_ITEMSIZE, 1),
                ),
                f"{model.layers} layers, {model.vocab} tokens, bfloat16",
            ),
            Allocation("small model's KV", ((cache, 1),), f"{policy.draft_rows} + {length} + {rows} rows"),
        )
        self.read = layer * model.layers + head
        shape = LevelShape.of(
            replace(model, vocab=known), fused_linears(role_shapes(model.layer), exact=True)
        )
        self.level = captured_level_bytes(
            replace(shape, target_vocab=target.vocab), policy.width, inputs.sampling
        )
        self.workspaces = {f"the small model's prompt, {rows} tokens": trace.prefill_bytes(rows, length)}


class LayerSkipMemory(DraftMemory):
    """Resident layers of the target: a level's workspace is all it adds.

    Raises:
        ConfigError: the chosen layers are not the target's.
    """

    required_by = "draft=layer_skip drafts with"

    def __init__(self, inputs: SizingInputs) -> None:
        from subspec.drafts.layer_skip import chosen_layers, spread, usual_layers

        draft, spec = inputs.config.draft, inputs.spec
        assert isinstance(draft, LayerSkipDraftConfig)
        self._chosen = chosen_layers(draft, spec.layers)
        # Hardly any model drafts without its first and last layer.
        self.required_resident = self._chosen or spread(spec.layers, min(2, spec.layers))
        self.shared_rows = inputs.policy.draft_rows
        shape = LevelShape.of(spec, fused_linears(role_shapes(spec.layer), exact=True))
        self.level = captured_level_bytes(shape, inputs.policy.width, inputs.sampling)
        self._layers, self._usual = spec.layers, len(usual_layers(spec.layers))
        self._layer = flat_bytes(spec.layer, inputs.itemsize)
        self._head = spec.vocab * spec.hidden * inputs.itemsize

    def level_read(self, resident: int) -> int:
        drafting = self._usual if resident == self._layers else resident
        return (len(self._chosen) if self._chosen else drafting) * self._layer + self._head


class EagleMemory(DraftMemory):
    """An EAGLE head with its own KV cache and features; embedding and LM head are the target's.

    With ``plan_only`` a head that is not on disk is not fetched: the largest possible head is counted, one layer of the
    target with a KV head per query head and every bias.

    Raises:
        SubspecError: the head cannot be found or read, or belongs to another target.
    """

    captured = False

    def __init__(self, inputs: SizingInputs) -> None:
        from subspec.drafts.eagle import EagleDraft
        from subspec.drafts.eagle_head import EagleHead

        shape, note = _eagle_shape(inputs)
        policy, length, target = inputs.policy, inputs.config.decoding.max_length, inputs.target.model
        weights = {
            name: torch.empty(size, dtype=target.dtype, device=META) for name, size in shape.shapes().items()
        }
        sizes = [weight.nbytes for weight in weights.values()]
        cache = 2 * shape.kv_heads * shape.head_dim * (policy.draft_rows + length) * inputs.itemsize
        features = policy.capacity * shape.hidden * inputs.itemsize
        self.allocations = (
            Allocation("EAGLE head", tuple((size, 1) for size in sizes), note),
            Allocation("EAGLE KV cache", ((cache, 1),), f"{policy.draft_rows} + {length} rows, one layer"),
            Allocation("EAGLE features", ((features, 1),), f"{policy.capacity} nodes"),
        )
        self.read = sum(sizes) + inputs.spec.vocab * inputs.spec.hidden * inputs.itemsize

        key = (shape.kv_heads, *shape.shapes().items())

        def begun(past: int) -> EagleDraft:
            draft = EagleDraft(EagleHead.from_tensors(weights, shape.config()), target, policy)
            draft.begin(target.new_cache(max_length=length + policy.draft_rows, draft_rows=0, target_rows=1))
            draft.observe(token_ids(1), inputs.target.hidden(1))
            draft.cache.length = past
            return draft

        def level() -> int:
            used = 1 + (min(LEVELS, policy.max_depth) - 1) * policy.width
            draft = begun(length + policy.draft_rows - used)  # as many visible rows as the deepest level has
            return draft_level_bytes(draft, policy, inputs.sampling, target.vocab_size)

        def prompt() -> int:
            draft = begun(0)
            return peak_bytes(lambda: draft.observe(token_ids(length), inputs.target.hidden(length)))

        self.level = inputs.target.cached(
            ("EAGLE level", key, policy.width, policy.draft_rows, length, inputs.sampling), level
        )
        self.workspaces = {
            "EAGLE rows of a prompt": inputs.target.cached(("EAGLE prompt", key, length), prompt)
        }


DRAFTS: dict[type[DraftConfig], type[DraftMemory]] = {
    SubstituteDraftConfig: SubstituteMemory,
    SmallModelDraftConfig: SmallModelMemory,
    LayerSkipDraftConfig: LayerSkipMemory,
    Eagle2DraftConfig: EagleMemory,
}
"""By the class of ``draft``'s configuration."""


def draft_memory(inputs: SizingInputs) -> DraftMemory | None:
    """Memory of the configured draft; None without one.

    Raises:
        ConfigError: the draft has no plan, or its settings contradict the target.
    """
    draft = inputs.config.draft
    if isinstance(draft, NoDraftConfig):
        return None
    if type(draft) not in DRAFTS:
        raise ConfigError(f"offload=stream has no plan for draft={draft.name}: set offload=none")
    return DRAFTS[type(draft)](inputs)  # type: ignore[call-arg]


def kv_bytes(spec: ModelSpec, max_length: int, draft_rows: int, target_rows: int, itemsize: int) -> int:
    """Bytes of a KV cache of all layers."""
    return KVCache(
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_length=max_length,
        draft_rows=draft_rows,
        target_rows=target_rows,
        dtype={2: torch.bfloat16, 4: torch.float32}[itemsize],
        device=META,
    ).nbytes


def _eagle_shape(inputs: SizingInputs) -> "tuple[EagleShape, str]":
    from subspec.drafts.eagle_checkpoint import head_shape, is_at_hand, locate_for
    from subspec.drafts.eagle_head import OPTIONAL, EagleShape
    from subspec.drafts.planted_head import PLANTED

    config, spec = inputs.config, inputs.spec
    draft = config.draft
    assert isinstance(draft, Eagle2DraftConfig)
    path = draft.path
    if config.plan_only and path not in (None, PLANTED) and not is_at_hand(path):
        largest = EagleShape(
            spec.hidden, spec.heads, spec.heads, spec.head_dim, spec.intermediate, frozenset(OPTIONAL)
        )
        return largest, "not fetched for a plan: counted as the largest"
    shape = head_shape(locate_for(draft, config.target, print_note), spec.hidden, config.target.name)
    random = ", random weights" if path == PLANTED else ""
    return shape, f"one layer, {shape.kv_heads} KV heads{random}"
