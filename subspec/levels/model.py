"""The model that a captured level runs: its layers, tensors shared with the target, and settings of attention."""

from dataclasses import dataclass

from torch import Tensor

from subspec.quant.level_linear import LevelLinear

NEVER = -1e30
"""Logit of an id that a draft's LM head does not know; finite, so that sums over a block of such ids are numbers."""


@dataclass
class LevelLayer:
    """One decoder layer of the draft; Linears as :class:`~subspec.quant.level_linear.LevelLinear`.

    ``cache_layer``: the layer of the KV cache it writes and reads; None: its place among the draft's layers.
    """

    qkv: LevelLinear
    out: LevelLinear
    gate_up: LevelLinear
    down: LevelLinear
    qkv_bias: Tensor | None
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    cache_layer: int | None = None

    @property
    def linears(self) -> tuple[LevelLinear, ...]:
        """The fused Linears, in the order of use."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class LevelModel:
    """A draft's layers and the tensors that it shares with the target.

    Attributes:
        embedding: [vocabulary, hidden], on the device or in pinned host memory.
        head: LM head [vocabulary, hidden], the target's own, or its rows ``ids``; None: it is coded by ``draft_head``.
        draft_head: the draft's own quantized LM head; None: ``head``.
        ids: int64 [v], the ids that the draft's LM head (``draft_head``, or ``head``) has rows for; None: all.
        inverse_frequency: float32 [head_dim / 2] of the rotary embedding, scaling included.
        attention_scaling: factor of the rotary tables (1 except for YaRN and the like).
    """

    layers: list[LevelLayer]
    embedding: Tensor
    final_norm: Tensor
    head: Tensor | None
    inverse_frequency: Tensor
    attention_scaling: float
    eps: float
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    draft_head: LevelLinear | None = None
    ids: Tensor | None = None


@dataclass(frozen=True)
class Attention:
    """Settings of a level's attention (``kernels/level.py``: ``tree_attention``); the best ones depend on the prefix.

    Attributes:
        splits: slices of the keys at most, processed in parallel; a power of two.
        block: keys per step.
        chunk: rows times heads of a KV head per program, a power of two of at least 16; 0: all.
        warps: of a program.
        stages: blocks of keys loaded ahead.
        masks_prefix: apply the tree's mask to blocks of the prefix too, instead of a branch around it.
    """

    splits: int = 32
    block: int = 32
    chunk: int = 16
    warps: int = 4
    stages: int = 2
    masks_prefix: bool = False

    def __str__(self) -> str:
        chunk = f" chunk {self.chunk}" if self.chunk else ""
        branch = "" if self.masks_prefix else " branch"
        return f"{self.splits}x{self.block}{chunk} warps {self.warps} stages {self.stages}{branch}"
