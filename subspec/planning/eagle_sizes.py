"""What an EAGLE head takes of the device, for the planner."""

from collections.abc import Mapping

import torch

from subspec.config.schema import Eagle2DraftConfig
from subspec.decoding.kv_cache import KVCache
from subspec.drafts.eagle import SETTLE_ROWS
from subspec.drafts.eagle_checkpoint import cached_head, head_shape, is_local, locate_for
from subspec.drafts.eagle_head import OPTIONAL, EagleShape
from subspec.drafts.planted_head import PLANTED
from subspec.planning.draft_sizes import Piece, Situation
from subspec.planning.sizes import META, growing_bytes, rounding
from subspec.utils.console import print_note


class EaglePieces:
    """The head, its own KV cache and the features it predicts, all on the device; the embedding and LM head are the
    target's.

    With ``plan_only`` a head that would have to be fetched is not: it then counts as one layer of the target with as
    many KV heads as heads and every bias, the largest there is, and the piece's note says so.

    Raises:
        SubspecError: the head cannot be found or read, or is another target's.
    """

    forced: tuple[int, ...] = ()
    forced_by = ""
    captured = False
    shared_rows = 0

    def __init__(self, situation: Situation) -> None:
        self.shape, note = _shape(situation)
        self._itemsize, self._situation = situation.itemsize, situation
        shape, itemsize = self.shape, self._itemsize
        sizes = [size.numel() * itemsize for size in shape.shapes().values()]
        length, growth = situation.config.decoding.max_length, situation.growth
        cache = KVCache(
            layers=1,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_length=length,
            draft_rows=growth.draft_rows,
            target_rows=0,
            dtype={2: torch.bfloat16, 4: torch.float32}[itemsize],
            device=META,
        ).nbytes
        features = growth.capacity * shape.hidden * itemsize
        self._weights = sum(sizes)
        self._pieces = [
            Piece("EAGLE head", sum(sizes), rounding(sizes), note),
            Piece(
                "EAGLE KV cache", cache, rounding([cache]), f"{growth.draft_rows} + {length} rows, one layer"
            ),
            Piece("EAGLE features", features, rounding([features]), f"{growth.capacity} nodes"),
        ]
        self.level = level_bytes(situation, shape)
        self.workspaces: Mapping[str, int] = {"EAGLE rows of a prompt": settle_bytes(shape, length, itemsize)}

    def device(self, resident: int) -> list[Piece]:
        return self._pieces

    def host(self) -> list[Piece]:
        return []

    def level_read(self, resident: int) -> int:
        shapes = self._situation.shapes
        return self._weights + shapes.vocab * shapes.hidden * self._itemsize


def _shape(situation: Situation) -> tuple[EagleShape, str]:
    config, shapes = situation.config, situation.shapes
    draft = config.draft
    assert isinstance(draft, Eagle2DraftConfig)
    if (
        config.plan_only
        and draft.path not in (None, PLANTED)
        and not is_local(draft.path)
        and cached_head(draft.path) is None
    ):
        largest = EagleShape(
            shapes.hidden,
            shapes.heads,
            shapes.heads,
            shapes.head_dim,
            shapes.intermediate,
            frozenset(OPTIONAL),
        )
        return largest, "not fetched for a plan: counted as the largest"
    shape = head_shape(locate_for(draft, config.target, print_note), shapes.hidden, config.target.name)
    made_up = ", random weights" if draft.path == PLANTED else ""
    return shape, f"one layer, {shape.kv_heads} KV heads{made_up}"


def settle_bytes(shape: EagleShape, chunk: int, itemsize: int) -> int:
    """A prefill chunk's features beside the rows of :data:`~subspec.drafts.eagle.SETTLE_ROWS` of its tokens.

    itemsize * (2 * chunk * hidden + rows * (4 * hidden + 6 * kv heads * head dim)) + 8 * rows * head dim: features
    with their shifted copy; embedding, both side by side and fc's output; keys and values, rotated; rotary tables.
    """
    rows, kv_width = min(SETTLE_ROWS, chunk), shape.kv_heads * shape.head_dim
    tables = rows * shape.head_dim * (8 + 2 * itemsize)
    return itemsize * (2 * chunk * shape.hidden + rows * (4 * shape.hidden + 6 * kv_width)) + tables


def level_bytes(situation: Situation, shape: EagleShape) -> int:
    """Most that one level holds: the head over ``width`` rows, or the LM head's logits and what growing takes.

    * activations: itemsize * width * (6 * hidden + 5 * heads * head dim + 4 * kv heads * head dim + 3 * intermediate),
      float32 copies of the norm: 8 * width * hidden, masks: width * visible * (2 * itemsize + 2 + groups * itemsize);
    * growing: see :func:`subspec.planning.sizes.growing_bytes`.
    """
    rows, itemsize = situation.width, situation.itemsize
    visible = situation.config.decoding.max_length + situation.growth.draft_rows
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    activations = itemsize * (6 * shape.hidden + 5 * width + 4 * kv_width + 3 * shape.intermediate)
    mask = visible * (2 * itemsize + 2 + shape.heads // shape.kv_heads * itemsize)
    head = rows * (activations + 8 * shape.hidden + mask)
    return head + growing_bytes(situation.shapes, rows, situation.sampling, itemsize)
