"""The pieces of a run and where each of them goes, for any number of resident layers, prefill chunk and placement.

A :class:`Layout` holds what a configuration fixes; :meth:`Layout.items` lists every piece for one :class:`Choice`.
The planner looks for the best choice whose device items fit the budget; nothing here knows of budgets.
"""

import math
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from subspec.codec.coding import SubstituteCodec, codec_of, coded_head_bytes, decoding_only
from subspec.config.enums import Codec, Kernel
from subspec.config.schema import (
    Config,
    Device,
    Dtype,
    NoDraftConfig,
    Placement,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.audit import PROMPT_CHUNK
from subspec.decoding.bitwise import PassShapes, unsupported
from subspec.decoding.engine import ROW_MULTIPLE
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.errors import ConfigError
from subspec.levels.quantization import LevelQuantization, fused_quantization
from subspec.planning.draft_sizes import DraftSizes, Piece, Situation, draft_sizes, substitute_pieces
from subspec.planning.loading_sizes import head_loading_bytes, loading_bytes
from subspec.planning.sizes import (
    ALLOCATOR_BYTES,
    GIB,
    GRAPH_BYTES,
    LIBRARY_BYTES,
    kv_bytes,
    pass_bytes,
    rounding,
    substitute_sizes,
    tree_bytes,
    verify_bytes,
)
from subspec.targets.layer_bytes import LayerCodec, PlainCodec
from subspec.targets.model_spec import ModelSpec
from subspec.utils.rounding import round_up

CHUNK_STEP = 64
"""Prefill chunks are multiples of this."""

CHUNK_GOAL = 512
"""Prefill chunk whose workspace is reserved before any layer becomes resident.

A chunk is one sweep over all streamed weights. Going from 512 to 1024 tokens costs 0.08 GiB (7B), a fifth of a
resident layer, which every pass would feel, and saves one sweep of a prompt longer than that; most are shorter. The
chunk grows into half of what the layers leave over (the other half stays free: workspaces are estimates).
"""

LOADING_LAYERS = 3
"""Layers on their way through host memory while loading: one being read, one being quantized, one to spare."""

PROCESS_BYTES = GIB
"""Host memory that the CUDA context and its libraries still take after planning (an estimate)."""

LATER = ("resident layers", "ring", "decoded layer", "KV cache", "tree", "workspace", "draft level", "audit")
"""Pieces on the device that are not there before everything is loaded."""

DIGEST_BYTES = 160
"""Per id of the vocabulary: 64-bit copies of some rows of logits, whose digests an audit bit for bit compares."""

AUDIT_ROWS = 256
"""Tokens per pass of the losslessness audit, which has a cache of its own."""


@dataclass(frozen=True)
class Item:
    """One piece: ``bytes`` on ``place`` (device or host); ``note`` says what it is made of."""

    name: str
    bytes: int
    place: Placement
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What the planner decides: number of resident layers, tokens per prefill chunk, place of the embedding."""

    resident: int
    chunk: int
    embedding: Placement


class Layout:
    """A configuration's pieces.

    Attributes:
        draft: the draft's own sizes; None for plain decoding.
        forced: layers that must be resident because the draft needs them exact and on the device anyway
            (``quant.skip_layers`` of a substitute, layers that draft themselves): streaming them too would only cost
            link time.
        coded: whether exact weights are coded by their substitute.
        coded_head_bytes: of the exact LM head, coded by the draft's own; 0: it is on the device as it is, for the
            draft has none, or the embedding is tied to it and looked up there.
        head_loading_bytes: what making the coded head takes, before anything but the embedding is there; 0: none is.
        loading_bytes: what a layer in the making takes of the device while the substitute is loaded, before the pieces
            are there that come later; 0: nothing is quantized.
        packed_bytes: of a layer of the substitute, its quantized Linears alone.
        bitwise: shapes of a pass in batch-invariant arithmetic; None: the target's own modules run it.
        goal, least_chunk, most_chunk: prefill chunk in tokens: reserved first, never less, never more.
        nodes: most nodes of the tree. capacity: rows of its tensors, and pass_rows: most rows of a pass over it; both
            are rounded up as the engine does on a GPU. Without a draft the tree is its root, in one row.

    Raises:
        ConfigError: a draft or quantizer that has no plan, or keys that contradict the target.
    """

    def __init__(self, config: Config, model: PretrainedConfig) -> None:
        if not isinstance(config.offload, StreamOffloadConfig):
            raise ConfigError(f"offload={config.offload.name} has no plan: set offload=stream")
        self.config, self.offload = config, config.offload
        self.shapes = shapes = ModelSpec.of(model)
        self.itemsize = _itemsize(config)
        self.bitwise: PassShapes | None = None
        if config.decoding.bitwise is not False and self.itemsize == 2 and not unsupported(model):
            self.bitwise = PassShapes.of(model, self.itemsize)
        elif config.decoding.bitwise is True:
            reason = unsupported(model) or "it is for bfloat16 and float16, and this run computes in float32"
            raise ConfigError(f"decoding.bitwise=true: {reason}; set decoding.bitwise=auto")
        self.coded = codec_of(config) is Codec.substitute
        quantizes = self.coded or isinstance(config.draft, SubstituteDraftConfig)
        quantization = _quantization(config, shapes) if quantizes else None
        codec: LayerCodec = PlainCodec(self.itemsize)
        if self.coded and quantization is not None:
            codec = SubstituteCodec(quantization)
        self.layer_bytes = codec.layer_bytes(shapes.layer)
        self.exact_bytes = PlainCodec(self.itemsize).layer_bytes(shapes.layer)
        # A coded layer stays coded on the device, too: there is room for twice as many.
        self.resident_bytes = self.layer_bytes if self.coded else self.exact_bytes
        self.scratch_bytes = codec.scratch_bytes(shapes.layer)
        self.table_bytes = shapes.vocab * shapes.hidden * self.itemsize
        self.sampling = build_sampling(config)

        self.draft: DraftSizes | None = None
        self.forced: tuple[int, ...] = ()
        self.nodes = self.capacity = self.pass_rows = 1
        self.draft_rows, self.width, self.levels = 0, 0, 0
        if not isinstance(config.draft, NoDraftConfig):
            growth = build_tree_policy(config.tree)
            self.draft = draft = draft_sizes(Situation(config, shapes, self.itemsize, growth, self.sampling))
            assert draft is not None
            self.forced, self.draft_rows = draft.forced, draft.shared_rows
            self.nodes = growth.capacity
            self.capacity = round_up(growth.capacity, ROW_MULTIPLE)
            self.pass_rows = round_up(growth.pass_nodes, ROW_MULTIPLE)
            self.width, self.levels = getattr(growth, "width", 1), growth.max_depth
        length = config.decoding.max_length
        self.most_chunk = length
        self.least_chunk = min(config.decoding.prefill_chunk, length)
        self.goal = max(self.least_chunk, min(length, CHUNK_GOAL))
        # What decodes must be there even if nothing drafts with it.
        self._decoding: list[Piece] = []
        self.loading_bytes = self.packed_bytes = self.coded_head_bytes = self.head_loading_bytes = 0
        if quantization is not None:
            self._size_loading(quantization)
        if quantization is not None and self.draft is None:
            sizes = substitute_sizes(quantization, self.itemsize)
            self._decoding = substitute_pieces(sizes, shapes.layers, 0, f"decodes; {quantization.summary()}")
        self._check()

    def _size_loading(self, quantization: LevelQuantization) -> None:
        shapes, room = self.shapes, self.exact_bytes
        head, coded = (shapes.vocab, shapes.hidden), self.layer_bytes * self.coded
        # Where every layer is plain there is no buffer to decode the head into.
        if self.coded and not shapes.tied and len(self.forced) < shapes.layers:
            self.coded_head_bytes = own = coded_head_bytes(quantization, room)
            if own:
                self.head_loading_bytes = quantization.head_bytes + head_loading_bytes(
                    quantization, head, room, own
                )
        self.loading_bytes = loading_bytes(
            quantization, shapes.layer, head, self.itemsize, coded, head_is_coded=self.coded_head_bytes > 0
        )
        self.packed_bytes = quantization.layer_bytes

    def _check(self) -> None:
        offload, layers = self.offload, self.shapes.layers
        for key in ("vram_gib", "ring_slots", "link_gb_per_s", "ram_gib"):
            value = getattr(offload, key)
            if value is not None and value <= 0:
                raise ConfigError(f"offload.{key}={value} must be positive")
        wrong = [index for index in self.forced if not 0 <= index < layers]
        if wrong:
            raise ConfigError(
                f"quant.skip_layers: no layer {wrong[0]} in a target with layers 0..{layers - 1}"
            )
        pinned = offload.resident_layers
        if pinned is not None and not 0 <= pinned <= layers:
            raise ConfigError(f"offload.resident_layers={pinned}: the target has {layers} layers")
        if pinned is not None and pinned < len(self.forced):
            assert self.draft is not None
            raise ConfigError(
                f"offload.resident_layers={pinned}, but {self.draft.forced_by} {len(self.forced)} layers exact on "
                f"the device: set it to at least {len(self.forced)}, or to null"
            )
        if self.shapes.tied and offload.embedding is Placement.host:
            raise ConfigError(
                "offload.embedding=host, but the target ties its embedding to the LM head, which every draft level "
                "multiplies with: leave it at auto"
            )

    def placements(self) -> tuple[Placement, ...]:
        """Where the embedding table may go, the preferred place first."""
        if self.shapes.tied:
            return (Placement.device,)
        asked = self.offload.embedding
        return (Placement.device, Placement.host) if asked is Placement.auto else (asked,)

    def ring_slots(self, resident: int) -> int:
        """Slots of the ring: never more than there are streamed layers."""
        return min(self.offload.ring_slots, self.shapes.layers - resident)

    def device_bytes(self, choice: Choice) -> int:
        """Sum of the device items."""
        return sum(item.bytes for item in self.items(choice) if item.place is Placement.device)

    def items(self, choice: Choice) -> list[Item]:
        """Every piece of ``choice``, on the device and on the host; pieces of no size are left out."""
        device, host = self._device_items(choice), self._host_items(choice)
        pieces = [Item(name, size, Placement.device, note) for name, size, note in device]
        pieces += [Item(name, size, Placement.host, note) for name, size, note in host]
        return [piece for piece in pieces if piece.bytes]

    def _device_items(self, choice: Choice) -> list[tuple[str, int, str]]:
        shapes, itemsize, resident = self.shapes, self.itemsize, choice.resident
        layers, streamed = shapes.layers, shapes.layers - resident
        length = self.config.decoding.max_length
        slots = self.ring_slots(resident)
        coded = self.coded and resident > len(self.forced)
        scratch = self.scratch_bytes if streamed or coded else 0
        own_table = choice.embedding is Placement.device and not shapes.tied
        drafting = self.draft.device(resident) if self.draft is not None else self._decoding
        level = self.draft.level if self.draft is not None else 0
        captured = self.draft is not None and self.draft.captured
        rounded = sum(piece.rounding for piece in drafting)
        vectors = layers * shapes.vector_sizes(itemsize) + [shapes.hidden * itemsize]
        target_rows = max(self.pass_rows, choice.chunk)
        cache = kv_bytes(
            shapes,
            max_length=length,
            draft_rows=self.draft_rows,
            target_rows=target_rows,
            itemsize=itemsize,
        )
        tree = tree_bytes(self.capacity)
        largest, workspace = self._workspace(choice.chunk)
        audit = self._audit_bytes(workspace)
        head_bytes = self.coded_head_bytes or self.table_bytes
        buffers = [
            *vectors,
            head_bytes,
            *[self.table_bytes] * own_table,
            *[self.exact_bytes] * len(self.forced),
            *[self.resident_bytes] * (resident - len(self.forced)),
            *[self.layer_bytes] * slots,
            *[scratch, cache, tree, workspace, level, audit],
        ]
        head = "embedding and LM head" if shapes.tied else "LM head"
        pieces = [
            *_named(drafting),
            ("norms and biases", sum(vectors), ""),
            (head, head_bytes, f"{shapes.vocab} x {shapes.hidden}{', coded' * bool(self.coded_head_bytes)}"),
            ("embedding", self.table_bytes * own_table, f"{shapes.vocab} x {shapes.hidden}"),
            ("resident layers", self._resident_bytes(resident), self._resident_note(resident)),
            ("ring", slots * self.layer_bytes, f"{slots} layers in flight"),
            ("decoded layer", scratch, "one at a time, bfloat16"),
            ("KV cache", cache, f"{self.draft_rows} + {length} + {target_rows} rows"),
            ("tree", tree, _tree_note(self.nodes, self.capacity)),
            ("workspace", workspace, f"largest: {largest}"),
            (
                "draft level",
                level + GRAPH_BYTES * captured,
                f"width {self.width}{', CUDA graphs' * captured}",
            ),
            ("audit", audit, "its own cache and logits"),
            ("cuBLAS", LIBRARY_BYTES, "workspaces of two streams"),
            ("allocator", rounded + rounding(buffers) + ALLOCATOR_BYTES, "rounding, segments in part"),
        ]
        first = self.head_loading_bytes and self.head_loading_bytes + self.table_bytes * own_table
        more = max(0, first - sum(size for _, size, _ in pieces))
        return [*pieces, ("coding the LM head", more, "before the rest is there: what that takes beyond it")]

    def waiting_layers(self, choice: Choice) -> int:
        """Layers of the substitute that wait on the host while the others are made.

        The device holds them all when the last one is made, and beside it what that takes for a moment. Where the
        pieces that come later (:data:`LATER`) leave less room than that, as many as it takes come later, too.
        """
        room = sum(size for name, size, _ in self._device_items(choice) if name in LATER)
        short = self.loading_bytes - room
        return min(self.shapes.layers, math.ceil(max(0, short) / max(1, self.packed_bytes)))

    def _resident_bytes(self, resident: int) -> int:
        forced = len(self.forced)
        return forced * self.exact_bytes + (resident - forced) * self.resident_bytes

    def _resident_note(self, resident: int) -> str:
        forced = len(self.forced) if self.coded else resident
        return f"{resident} of {self.shapes.layers}, " + (
            "exact" if forced == resident else f"coded{f', {forced} plain' * bool(forced)}"
        )

    def _workspace(self, chunk: int) -> tuple[str, int]:
        """The most that one target pass holds at once, and which one: prefill, tree pass, or choosing tokens."""
        shapes, itemsize, rows = self.shapes, self.itemsize, self.pass_rows
        length = self.config.decoding.max_length
        passes = {
            f"prefill, {chunk} tokens": self._pass_bytes(chunk, length, length, is_tree=False),
            f"pass over {rows} rows": self._pass_bytes(rows, length, length + rows, is_tree=rows > 1),
            f"logits of {rows} rows": verify_bytes(shapes, rows, self.levels, self.sampling, itemsize),
        }
        if self.draft is not None:
            passes |= self.draft.workspaces
        return max(passes.items(), key=lambda named: named[1])

    def _pass_bytes(self, rows: int, length: int, visible: int, *, is_tree: bool) -> int:
        """Of a target pass over ``rows`` rows at positions below ``length``, which sees ``visible`` cache rows."""
        if self.bitwise is not None:
            return self.bitwise.pass_bytes(rows, length, is_tree=is_tree)
        return pass_bytes(self.shapes, rows, visible, self.itemsize)

    def _audit_bytes(self, workspace: int) -> int:
        if not self.config.audit:
            return 0
        shapes, length = self.shapes, self.config.decoding.max_length
        rows = judged = min(AUDIT_ROWS, length)
        if self.bitwise is not None:
            rows, judged = min(PROMPT_CHUNK, length), 1
        # The audit compares float32 logits; with top-p it filters twice, once with each sign of the slack.
        logits = verify_bytes(shapes, judged, judged, self.sampling, self.itemsize + 8)
        logits += DIGEST_BYTES * shapes.vocab * (self.bitwise is not None)
        cache = kv_bytes(shapes, max_length=length, draft_rows=0, target_rows=rows, itemsize=self.itemsize)
        return cache + max(0, logits - workspace)

    def _host_items(self, choice: Choice) -> list[tuple[str, int, str]]:
        streamed = self.shapes.layers - choice.resident
        table = self.table_bytes * (choice.embedding is Placement.host)
        waiting = self.waiting_layers(choice)
        # Resident ones too are coded to the host, and go to the device when nothing is quantized there any more.
        coded = (choice.resident - len(self.forced)) * self.coded
        loading = LOADING_LAYERS * self.exact_bytes + waiting * self.packed_bytes + PROCESS_BYTES
        loading += coded * self.layer_bytes
        return [
            ("streamed layers", streamed * self.layer_bytes, f"{streamed} layers, pinned"),
            *_named(self.draft.host() if self.draft is not None else []),
            ("embedding table", table, "pinned; only looked up"),
            (
                "loading and process",
                loading,
                f"{LOADING_LAYERS} layers, {f'{coded} coded, ' * bool(coded)}"
                f"{f'{waiting} of the substitute, ' * bool(waiting)}1 GiB for CUDA",
            ),
        ]

    def spread(self, resident: int) -> tuple[int, ...]:
        """Which layers are resident: the forced ones, and the others evenly over the depth.

        While the device computes a resident layer, the link fetches a streamed one. In one block at the start they
        would be computed while the full ring keeps the link waiting; in one block at the end the link would have
        nothing left to fetch. Spread evenly, with streamed layers at both ends, the link never pauses for more
        than a layer's computation, which matters most in prefill, where a layer computes as long as it streams.
        """
        others = [index for index in range(self.shapes.layers) if index not in self.forced]
        count = resident - len(self.forced)
        chosen = [others[(2 * i + 1) * len(others) // (2 * count)] for i in range(count)]
        return tuple(sorted([*self.forced, *chosen]))

    def without_draft(self, model: PretrainedConfig) -> "Layout":
        """The same budget with plain decoding, as many layers resident as fit.

        Streamed plainly, whatever the codec: one that leans on the substitute has none to lean on.
        """
        offload = replace(self.offload, resident_layers=None, codec=Codec.none)
        return Layout(replace(self.config, draft=NoDraftConfig(name="none"), offload=offload), model)


def _named(pieces: list[Piece]) -> list[tuple[str, int, str]]:
    return [(piece.name, piece.bytes, piece.note) for piece in pieces]


def _quantization(config: Config, shapes: ModelSpec) -> LevelQuantization:
    if isinstance(config.draft, NoDraftConfig):
        config = decoding_only(config)
    kernel = getattr(config.draft, "kernel", Kernel.auto).value
    return fused_quantization(config.quant, shapes.layer, (shapes.vocab, shapes.hidden), kernel=kernel)


def _tree_note(nodes: int, rows: int) -> str:
    count = "the root alone" if nodes == 1 else f"{nodes} nodes"
    return count if rows == nodes else f"{count} in {rows} rows"


def _itemsize(config: Config) -> int:
    """Bytes per weight. Streaming is for a GPU, where ``auto`` is bfloat16, also when planned without one."""
    dtype = config.target.dtype
    card = getattr(config.offload, "card", None)
    if dtype is Dtype.float32 or (dtype is Dtype.auto and config.device is Device.cpu and card is None):
        return 4
    return 2
