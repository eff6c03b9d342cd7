"""Block heads, which draft a whole block in one forward: DFlash, JetSpec (arXiv 2602.06036, 2606.18394) and DSpark.

A few decoder layers run over a block of slots, [last emitted token, MASK, ..., MASK]. Their keys and values of the
committed positions are made of the target's hidden states of several layers, fused by ``fc`` and ``hidden_norm``; these
are the same in every pass, so they are kept. The output of a slot, normed, goes through the LM head:

    DFlash, JetSpec   slot i: the token at the slot's own position, i behind the last emitted one (slot 0 is not read)
    DSpark            slot i: the token behind the slot, i + 1 behind the last emitted one

The slots of DFlash and DSpark see the whole block, those of JetSpec the slots before them (``causal_head``). So all
nodes of one depth share their logits, unless a Markov head adds ``w2(w1(parent's token))`` to them (DSpark). DSpark's
confidence head predicts how much of a node's draft the target accepts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from subspec.decoding.hidden import HiddenRequest
from subspec.decoding.kv_cache import KVView
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.eagle3_head import (
    EMBEDDING,
    INPUT_NORM,
    LM_HEAD,
    MOST_FEATURES,
    QK_NORMS,
    Eagle3Head,
    Eagle3Shape,
    usual_layers,
)
from subspec.drafts.eagle_head import OPTIONAL, REQUIRED, EagleShape
from subspec.errors import ConfigError

MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
CONFIDENCE = ("confidence_head.proj.weight", "confidence_head.proj.bias")

LAYERS, MARKOV_RANK = 5, 256
"""Decoder layers and rank of the Markov head of the published heads."""

CAUSAL = ("causal_head", "causal", "is_causal")
"""Keys of a ``config.json`` that say that a slot sees only the slots before it."""

NEUTRAL = {
    "input_embedding_scale": (1,),
    "output_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "markov_head_type": ("vanilla",),
}
"""Keys that change the forward pass, and the values with which they do not; null is none, too."""


@dataclass(frozen=True)
class BlockShape(Eagle3Shape):
    """Sizes of a block head.

    Attributes:
        block: slots. mask_id: token of all slots but the first.
        shifted: whether a slot predicts the token behind it (DSpark), not that at its own position.
        causal: whether a slot sees only the slots before it.
        markov: shape of either table of the Markov head; empty: there is none.
        confidence: inputs of the confidence head; 0: there is none.
        target_layers: decoder layers of the target that it was made for; 0: not said.
    """

    kind: ClassVar[str] = "block head"
    draft: ClassVar[str] = "block_head"
    keeps_features: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = (
        *REQUIRED, *QK_NORMS, INPUT_NORM, "hidden_norm.weight", "norm.weight"
    )  # fmt: skip
    optional: ClassVar[tuple[str, ...]] = (*OPTIONAL, EMBEDDING, LM_HEAD, *MARKOV, *CONFIDENCE)

    block: int = 16
    mask_id: int = 0
    shifted: bool = False
    causal: bool = False
    markov: tuple[int, ...] = ()
    confidence: int = 0
    target_layers: int = 0

    @property
    def method(self) -> str:
        """The published method that such heads belong to."""
        return "DSpark" if self.shifted else "JetSpec" if self.causal else "DFlash"

    @property
    def levels(self) -> int:
        return self.block - (not self.shifted)

    def draft_rows(self, policy: TreePolicy) -> int:
        return self.block

    @classmethod
    def largest(cls, target: PretrainedConfig) -> dict[str, Any]:
        sizes = {"decoder_layers": LAYERS, "block": 16, "markov": (target.vocab_size, MARKOV_RANK)}
        layers = usual_layers(MOST_FEATURES, target.num_hidden_layers)
        own = {"mapped": False, "layers": layers, "confidence": target.hidden_size + MARKOV_RANK}
        return super().largest(target) | sizes | own

    @classmethod
    def names(cls, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        layers = _number(config, "num_hidden_layers", least=1)
        required, optional = super().names(config)
        return _in_layers(required, layers), _in_layers(optional, layers)

    @classmethod
    def own_fields(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        flat = {**config, **(config.get("dflash_config") or {})}
        changes = [f"{key}={flat[key]}" for key, same in NEUTRAL.items() if flat.get(key) not in (None, *same)]
        if "sliding_attention" in (flat.get("layer_types") or ()):
            changes.append("sliding_attention in layer_types")
        if changes:
            raise ConfigError(
                f"the block head's config.json says {changes[0]}: such heads are not built; take another one"
            )
        if not flat.get("target_layer_ids"):
            raise ConfigError("the block head's config.json lacks target_layer_ids: fetch or copy it again")
        markov = tuple(tensors[MARKOV[0]].shape) if MARKOV[0] in tensors else ()
        hidden, inputs = len(tensors["fc.weight"]), tensors[CONFIDENCE[0]].shape[-1] if CONFIDENCE[0] in tensors else 0
        return super().own_fields(tensors, flat) | {
            "decoder_layers": _number(flat, "num_hidden_layers", least=1),
            "block": _number(flat, "block_size", least=2),
            "mask_id": _number(flat, "mask_token_id", least=0),
            "shifted": "markov_rank" in flat or "dspark" in str(flat.get("architectures")).lower(),
            "causal": any(flat.get(key) for key in CAUSAL),
            "markov": markov,
            "confidence": hidden + sum(markov[1:]) if inputs not in (0, hidden) else inputs,
            "target_layers": flat.get("num_target_layers") or 0,
        }

    @property
    def inputs(self) -> tuple[int, int]:
        return self.fc_inputs, self.hidden

    def wants(self, target: PretrainedConfig) -> HiddenRequest:
        why, vocab = "", target.vocab_size
        if self.target_layers not in (0, target.num_hidden_layers):
            made_for = f"a target of {self.target_layers} layers (num_target_layers)"
            why = f" was made for {made_for}, and this one has {target.num_hidden_layers}"
        elif self.mask_id >= (self.embeddings or vocab):
            why = f"'s mask_token_id={self.mask_id} is no row of the embedding table"
        elif self.markov and self.markov[0] < vocab:
            why = f"'s Markov head knows {self.markov[0]} tokens, and the target's vocabulary has {vocab}"
        if why:
            raise ConfigError(f"the block head{why}: set draft.path to a head that was trained for this target")
        return super().wants(target)

    def config(self) -> dict[str, Any]:
        return (
            super().config()
            | {
                "architectures": [f"{self.method}DraftModel"],
                "num_hidden_layers": self.decoder_layers,
                "num_target_layers": self.target_layers,
                "block_size": self.block,
                "mask_token_id": self.mask_id,
                "causal_head": self.causal,
            }
            | ({"markov_rank": self.markov[-1], "markov_head_type": "vanilla"} if self.shifted and self.markov else {})
        )


def _in_layers(names: Iterable[str], layers: int) -> tuple[str, ...]:
    """``names``, those of the first decoder layer repeated for every layer."""
    first = "layers.0."
    return tuple(
        name.replace(first, f"layers.{index}.")
        for name in names
        for index in range(layers if name.startswith(first) else 1)
    )


def _number(config: Mapping[str, Any], key: str, least: int) -> int:
    """A whole number of a ``config.json``, at least ``least``."""
    value = config.get(key)
    if not isinstance(value, int) or value < least:
        raise ConfigError(
            f"the block head's config.json says {key}={value}: it must be a whole number of at least {least}"
        )
    return value


class BlockHead(Eagle3Head):
    """A block head; ``state_dict`` has the published names."""

    shape: BlockShape
    shape_class = BlockShape

    def add_modules(self, shape: EagleShape, layer: nn.Module) -> None:
        assert isinstance(shape, BlockShape)
        super().add_modules(shape, self)  # the norm of the features is the head's, not the layer's
        if shape.markov:
            vocab, rank = shape.markov
            tables = {"markov_w1": nn.Embedding(vocab, rank), "markov_w2": nn.Linear(rank, vocab, bias=False)}
            self.markov_head = nn.ModuleDict(tables)
        if shape.confidence:
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(shape.confidence, 1)})

    def fuse(self, states: Tensor) -> Tensor:
        return self.hidden_norm(self.fc(states))

    def finish(self, features: Tensor) -> Tensor:
        return features  # normed by :meth:`run`

    def write(self, features: Tensor, positions: Tensor, view: KVView) -> None:
        """Write the keys and values of committed positions.

        Args:
            features: [texts, n, hidden], from :meth:`fuse`. positions: int64 [n].
        """
        tables = self.rotary(features, positions[None])
        for layer in self.layers:
            layer.self_attn.store(features, *tables, view)

    def run(self, embeddings: Tensor, positions: Tensor, mask: Tensor, view: KVView) -> Tensor:
        """Run a block behind the committed positions.

        Args:
            embeddings: [texts, block, hidden]. positions: int64 [block].
            mask: [1, 1, block, rows of ``view``], additive, in the parameters' dtype.

        Returns:
            Normed hidden states [texts, block, hidden].
        """
        x = embeddings
        tables = self.rotary(x, positions[None])
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), tables, mask, past_key_values=view)[0]
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)

    def branch(self, tokens: Tensor) -> Tensor | None:
        """What the Markov head adds to the logits behind ``tokens`` [n]: [n, its vocabulary]; None: there is none."""
        if not self.shape.markov:
            return None
        return self.markov_head["markov_w2"](self.markov_head["markov_w1"](tokens))

    def acceptance(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """The confidence head's estimate of the share of a draft that the target accepts; None: there is none.

        Args:
            hidden: [hidden], from :meth:`run`. tokens: int64 [n], those that the draft follows.

        Returns:
            float32 [n].
        """
        if not self.shape.confidence:
            return None
        features = hidden.expand(len(tokens), -1)
        if self.shape.confidence > self.shape.hidden:
            features = torch.cat([features, self.markov_head["markov_w1"](tokens)], dim=-1)
        return self.confidence_head["proj"](features)[:, 0].float().sigmoid()


BlockShape.head_class = BlockHead
