"""The peak of a captured draft level, traced on the meta device for any shape and width."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree_policy import Beam
from subspec.kernels import int4_wide
from subspec.levels.build import ROLES
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import LevelLayer, LevelModel
from subspec.memory.trace import LAYERS, META, draft_level_bytes, token_ids
from subspec.quant.level_linear import Dense, FewRowsLinear, LevelLinear
from subspec.targets.model_spec import ModelSpec

LINEAR_SPLITS = 4
"""Float32 partial sums of a quantized Linear of few rows (the kernel's choice for a 7B on 132 multiprocessors)."""

MULTIPROCESSORS = 132
"""Of the cards that read x in tiles (H100, H200): their number decides how many partial sums many rows have."""

Linear = tuple[str, int, int, bool]
"""Role, outputs and inputs of a fused Linear, and whether it is exact."""


@dataclass(frozen=True)
class LevelShape:
    """Shapes of a captured level.

    Attributes:
        vocab: of the draft. target_vocab: of the target, to which sampled logits are padded.
        own_head: whether the LM head is quantized. known: ids that it knows.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    target_vocab: int
    linears: tuple[Linear, ...]
    own_head: bool
    known: int

    @classmethod
    def of(
        cls, spec: ModelSpec, linears: tuple[Linear, ...], *, own_head: bool = False, known: int | None = None
    ) -> "LevelShape":
        """The level of a draft with the shapes of ``spec``."""
        vocab = spec.vocab
        heads = spec.heads, spec.kv_heads, spec.head_dim
        return cls(spec.hidden, *heads, vocab, vocab, linears, own_head, known or vocab)


def fused_linears(roles: Mapping[str, tuple[int, int]], *, exact: bool) -> tuple[Linear, ...]:
    """The Linears of a layer, from (outputs, inputs) by role."""
    return tuple((role, n, k, exact) for role, (n, k) in roles.items() if role in ROLES)


class _QuantizedShape(FewRowsLinear):
    """A quantized Linear's results on the meta device, where nothing is launched."""

    kind, reads = "shape", torch.float16  # as integers are multiplied; others read as many bits

    def __init__(self, outputs: int, inputs: int, *, splits: int, swiglu: bool) -> None:
        self.stride, self.inputs, self.splits, self.swiglu = outputs, inputs, splits, swiglu

    def tile(self, rows: int) -> int:
        return 0

    def slices(self, rows: int) -> int:
        if rows < int4_wide.FROM:
            return self.splits
        groups = -(-self.inputs // int4_wide.GROUP)
        grid = int4_wide.wide_grid(rows, self.stride, groups, MULTIPROCESSORS, whole=self.swiglu)
        return max(self.splits, grid.splits)


def captured_draft(shape: LevelShape) -> CapturedDraft:
    """A draft of :data:`~subspec.memory.trace.LAYERS` layers on the meta device."""

    def weight(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=META)

    linears: dict[str, LevelLinear] = {}
    for role, outputs, inputs, exact in shape.linears:
        swiglu = role == "gate_up"
        linears[role] = (
            Dense(weight(outputs, inputs), swiglu=swiglu, interleaved=False)
            if exact
            else _QuantizedShape(outputs, inputs, splits=LINEAR_SPLITS, swiglu=swiglu)
        )
    norm = weight(shape.hidden)
    layer = LevelLayer(**linears, qkv_bias=None, input_norm=norm, post_norm=norm)
    return CapturedDraft(
        LevelModel(
            layers=[layer] * LAYERS,
            embedding=weight(shape.vocab, shape.hidden),
            final_norm=norm,
            head=weight(shape.known, shape.hidden),
            draft_head=_QuantizedShape(shape.known, shape.hidden, splits=1, swiglu=False) if shape.own_head else None,
            inverse_frequency=weight(shape.head_dim // 2),
            attention_scaling=1.0,
            eps=1e-6,
            q_heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            hidden=shape.hidden,
            vocab_size=shape.vocab,
            ids=token_ids(shape.known) if shape.known < shape.vocab else None,
        )
    )


@functools.lru_cache(maxsize=256)
def captured_level_bytes(shape: LevelShape, width: int, sampling: Sampling, texts: int = 1) -> int:
    """Peak of a captured level of ``texts`` x ``width`` rows, with the logits' buffer that all levels share."""
    draft, policy = captured_draft(shape), Beam(2, width)
    cache = KVCache(
        layers=LAYERS,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_length=1,
        draft_rows=policy.draft_rows,
        target_rows=0,
        dtype=torch.bfloat16,
        device=META,
        texts=texts,
    )
    drafts = [draft, *(draft.fork() for _ in range(texts - 1))]
    for own, place in zip(drafts, cache.all(), strict=True):
        own.begin(place)
    return draft_level_bytes(draft, policy, sampling, shape.target_vocab, drafts[1:])
