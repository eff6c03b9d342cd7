"""What a draft takes of the device and the host, from shapes alone: what the planner asks of each kind of draft.

Every kind of draft has a class here and an entry in :data:`SIZES`. What all drafts share (the tree, the target's own
workspaces, the norms and biases of the target) is :mod:`subspec.planning.layout`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from subspec.config.schema import (
    Config,
    DraftConfig,
    Eagle2DraftConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree_policy import TreePolicy
from subspec.errors import ConfigError
from subspec.levels.quantization import AUTO, fused_quantization
from subspec.planning.sizes import (
    SubstituteSizes,
    kv_bytes,
    level_bytes,
    pass_bytes,
    rounding,
    substitute_sizes,
)
from subspec.targets.layer_bytes import flat_bytes
from subspec.targets.model_spec import ModelSpec

DRAFT_ITEMSIZE = 2
"""Bytes per weight of a draft with weights of its own: fused levels compute in bfloat16."""


@dataclass(frozen=True)
class Piece:
    """A named part of a draft: ``bytes``, what the allocator adds to them (``rounding``), and what it is made of."""

    name: str
    bytes: int
    rounding: int = 0
    note: str = ""


@dataclass(frozen=True)
class Situation:
    """What sizes of a draft depend on besides its own settings.

    Attributes:
        shapes: of the target.
        itemsize: bytes per weight of the target.
    """

    config: Config
    shapes: ModelSpec
    itemsize: int
    growth: TreePolicy
    sampling: Sampling

    @property
    def width(self) -> int:
        """Rows of a draft level."""
        return getattr(self.growth, "width", 1)


class DraftSizes(Protocol):
    """A draft's sizes in bytes.

    Attributes:
        forced: the target's layers that must be resident. forced_by: why, before "N layers" in a message.
        shared_rows: rows in the draft region of the target's KV cache; 0 for a draft with a cache of its own.
        level: workspace of a draft level, logits included. captured: whether levels are captured as CUDA graphs.
        workspaces: what the draft holds while the target holds nothing (a pass over the prompt, for instance), by
            what it is; of these and the target's own passes only the largest counts.
    """

    forced: tuple[int, ...]
    forced_by: str
    shared_rows: int
    level: int
    captured: bool
    workspaces: Mapping[str, int]

    def device(self, resident: int) -> list[Piece]:
        """What lies on the device all the time, with ``resident`` of the target's layers on the device."""

    def host(self) -> list[Piece]:
        """What lies in host memory all the time."""

    def level_read(self, resident: int) -> int:
        """What one draft level reads of the device's memory: weights and LM head."""


class SubstitutePieces:
    """The quantized substitute: packed weights of every layer but the skipped ones, which are resident.

    What stays exact is fused too, and so a copy, whether the target's layer is resident or not.

    Raises:
        ConfigError: the quantizer is unknown here, or its settings do not fit the target.
    """

    workspaces: Mapping[str, int] = {}
    forced_by = "quant.skip_layers keeps"
    captured = True

    def __init__(self, situation: Situation) -> None:
        shapes, quant, draft = situation.shapes, situation.config.quant, situation.config.draft
        kernel = draft.kernel.value if isinstance(draft, SubstituteDraftConfig) else AUTO
        quantization = fused_quantization(quant, shapes.layer, (shapes.vocab, shapes.hidden), kernel=kernel)
        self.sizes = sizes = substitute_sizes(quantization, situation.itemsize)
        self.forced = tuple(sorted(set(getattr(quant, "skip_layers", ()))))
        self.shared_rows = situation.growth.draft_rows
        self.level = level_bytes(
            shapes, situation.width, situation.sampling, situation.itemsize, own_head=sizes.head > 0
        )
        self._layers = shapes.layers
        self._head = sizes.head or shapes.vocab * shapes.hidden * situation.itemsize
        self._note = quantization.summary()

    def device(self, resident: int) -> list[Piece]:
        return substitute_pieces(self.sizes, self._layers - len(self.forced), len(self.forced), self._note)

    def host(self) -> list[Piece]:
        return []

    def level_read(self, resident: int) -> int:
        return sum(piece.bytes for piece in self.device(resident)) - self.sizes.head + self._head


def substitute_pieces(sizes: SubstituteSizes, replaced: int, skipped: int, note: str) -> list[Piece]:
    """A fused substitute of ``replaced`` quantized layers and ``skipped`` exact ones."""
    return [
        Piece(
            "substitute",
            replaced * sizes.quantized + sizes.head,
            replaced * sizes.quantized_rounding + sizes.head_rounding,
            note,
        ),
        Piece(
            "exact substitute",
            replaced * sizes.exact + skipped * sizes.skipped,
            replaced * sizes.exact_rounding + skipped * sizes.skipped_rounding,
            "modules not quantized",
        ),
    ]


class SmallModelPieces:
    """A small model in bfloat16 with a KV cache of its own; its prompt passes are another workspace."""

    forced: tuple[int, ...] = ()
    forced_by = ""
    captured = True
    shared_rows = 0

    def __init__(self, situation: Situation) -> None:
        # Imported here: the small model's file knows how to fetch and load, which no plan needs otherwise.
        from subspec.drafts.separate_cache import prompt_rows
        from subspec.drafts.small_model import small_shapes

        model = small_shapes(situation.config)
        target, width = situation.shapes, situation.width
        known = min(model.vocab, target.vocab)
        table = max(model.vocab, target.vocab) * model.hidden * DRAFT_ITEMSIZE
        head = 0 if model.tied else known * model.hidden * DRAFT_ITEMSIZE
        layer = flat_bytes(model.layer, DRAFT_ITEMSIZE)
        length, growth = situation.config.decoding.max_length, situation.growth
        rows = prompt_rows(length)
        self._weights = [*[layer] * model.layers, table, head, model.hidden * DRAFT_ITEMSIZE]
        self._cache = kv_bytes(
            model,
            max_length=length,
            draft_rows=growth.draft_rows,
            target_rows=rows,
            itemsize=DRAFT_ITEMSIZE,
        )
        self._note = f"{model.layers} layers, {model.vocab} tokens, bfloat16"
        self._cache_note = f"{growth.draft_rows} + {length} + {rows} rows"
        self._read = layer * model.layers + known * model.hidden * DRAFT_ITEMSIZE
        self.level = level_bytes(replace(model, vocab=known), width, situation.sampling, DRAFT_ITEMSIZE)
        if not situation.sampling.greedy and known < target.vocab:
            self.level += width * target.vocab * DRAFT_ITEMSIZE  # logits padded to the target's vocabulary
        self.workspaces: Mapping[str, int] = {
            f"the small model's prompt, {rows} tokens": pass_bytes(model, rows, length, DRAFT_ITEMSIZE)
        }

    def device(self, resident: int) -> list[Piece]:
        return [
            Piece("small model", sum(self._weights), rounding(self._weights), self._note),
            Piece("small model's KV", self._cache, rounding([self._cache]), self._cache_note),
        ]

    def host(self) -> list[Piece]:
        return []

    def level_read(self, resident: int) -> int:
        return self._read


class LayerSkipPieces:
    """The target's resident layers draft: nothing but a level's workspace is added.

    Raises:
        ConfigError: the layers that were chosen are not the target's.
    """

    workspaces: Mapping[str, int] = {}
    forced_by = "draft=layer_skip drafts with"
    captured = True

    def __init__(self, situation: Situation) -> None:
        from subspec.drafts.layer_skip import chosen_layers, spread, usual_layers

        draft, shapes = situation.config.draft, situation.shapes
        assert isinstance(draft, LayerSkipDraftConfig)
        self._chosen = chosen_layers(draft, shapes.layers)
        # Without its first and last layer hardly any model says anything of use.
        self.forced = self._chosen or spread(shapes.layers, min(2, shapes.layers))
        self.shared_rows = situation.growth.draft_rows
        self.level = level_bytes(shapes, situation.width, situation.sampling, situation.itemsize)
        self._layers, self._usual = shapes.layers, len(usual_layers(shapes.layers))
        self._layer = flat_bytes(shapes.layer, situation.itemsize)
        self._head = shapes.vocab * shapes.hidden * situation.itemsize

    def device(self, resident: int) -> list[Piece]:
        return []

    def host(self) -> list[Piece]:
        return []

    def level_read(self, resident: int) -> int:
        drafting = self._usual if resident == self._layers else resident
        return (len(self._chosen) if self._chosen else drafting) * self._layer + self._head


SIZES: dict[type[DraftConfig], type] = {
    SubstituteDraftConfig: SubstitutePieces,
    SmallModelDraftConfig: SmallModelPieces,
    LayerSkipDraftConfig: LayerSkipPieces,
}
"""By the class of ``draft``'s configuration."""


def draft_sizes(situation: Situation) -> DraftSizes | None:
    """The sizes of a configuration's draft; None without one.

    Raises:
        ConfigError: such a draft has no plan, or its settings contradict the target.
    """
    draft = situation.config.draft
    if isinstance(draft, NoDraftConfig):
        return None
    if isinstance(draft, Eagle2DraftConfig):
        # Imported here: a head's sizes are in a file of their own, which needs the types of this one.
        from subspec.planning.eagle_sizes import EaglePieces

        return EaglePieces(situation)
    if type(draft) not in SIZES:
        raise ConfigError(f"offload=stream has no plan for draft={draft.name}: set offload=none")
    return SIZES[type(draft)](situation)
