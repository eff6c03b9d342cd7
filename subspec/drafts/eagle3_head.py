"""The EAGLE-3 head (Li et al., arXiv 2503.01840): features of several layers of the target, and an LM head of its own.

``fc`` fuses the target's hidden states of some layers into one feature per token. The attention reads the normed
embedding and the normed feature side by side; the residual stream is the feature:

    feature of token i+1  =  layer(embedding of token i+1, feature of token i)
    logits behind it      =  lm_head(norm(feature of token i+1))

Predicted features are fed back as they are, before ``norm`` and without ``fc``. The LM head's vocabulary is often a
part of the target's: ``d2t`` holds the offset of each of its ids to the target's id.

Published variants: three feature layers or five, with the norms of query and key heads (DeepSpec), a residual stream
behind the norm (speculators: ``norm_before_residual``), an embedding table of its own or the target's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from subspec.decoding.hidden import FINAL_HIDDEN, HiddenRequest
from subspec.decoding.target_model import TargetModel
from subspec.drafts.eagle_head import ATTENTION, OPTIONAL, REQUIRED, EagleHead, EagleShape
from subspec.errors import ConfigError

INPUT_NORM = "layers.0.input_layernorm.weight"
QK_NORMS = tuple(f"{ATTENTION}{name}_norm.weight" for name in "qk")
EMBEDDING, LM_HEAD, D2T = "embed_tokens.weight", "lm_head.weight", "d2t"

MOST_FEATURES = 5
"""Feature layers of the largest published heads."""

NOT_BUILT = ("norm_before_fc", "fc_norm", "norm_output")
"""Switches of the speculators library that change the forward pass."""


@dataclass(frozen=True)
class Eagle3Shape(EagleShape):
    """Sizes of an EAGLE-3 head.

    Attributes:
        fc_inputs: width of the target's hidden states of all feature layers, side by side.
        draft_vocab: rows of its LM head; 0: the target's LM head is used.
        embeddings: rows of its embedding table; 0: the target's table is used.
        mapped: whether there is a ``d2t``. last_id: the largest target id that it names.
        norm_before_residual: whether the residual stream is the normed feature.
        layers: decoder layers of the target behind which the features are taken; empty: the usual ones.
    """

    kind: ClassVar[str] = "EAGLE-3 head"
    draft: ClassVar[str] = "eagle3"
    required: ClassVar[tuple[str, ...]] = (*REQUIRED, INPUT_NORM, "layers.0.hidden_norm.weight", "norm.weight")
    optional: ClassVar[tuple[str, ...]] = (*OPTIONAL, *QK_NORMS, EMBEDDING, LM_HEAD, D2T)

    fc_inputs: int = 0
    draft_vocab: int = 0
    embeddings: int = 0
    mapped: bool = False
    last_id: int = 0
    norm_before_residual: bool = False
    layers: tuple[int, ...] = ()

    @classmethod
    def own_fields(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        eagle_config = config.get("eagle_config") or {}
        for switch in NOT_BUILT:
            if config.get(switch) or eagle_config.get(switch):
                raise ConfigError(
                    f"the {cls.kind}'s config.json says {switch}=true: such heads are not built; take another one"
                )
        rows, embeddings = (len(tensors.get(name, ())) for name in (LM_HEAD, EMBEDDING))
        mapped = D2T in tensors
        if mapped > (rows > 0) or (not mapped and 0 < rows < (config.get("vocab_size") or 0)):
            raise ConfigError(
                f"the {cls.kind}'s vocabulary is a part of the target's and it lacks {LM_HEAD if mapped else D2T}: "
                "fetch or copy it again"
            )
        return {
            "fc_inputs": tensors["fc.weight"].shape[1],
            "draft_vocab": rows,
            "embeddings": embeddings,
            "mapped": mapped,
            "last_id": _last_id(tensors[D2T]) if mapped else 0,
            "qk_norm": any(name in tensors for name in QK_NORMS),
            "norm_before_residual": bool(config.get("norm_before_residual", False)),
            "layers": _feature_layers(config),
        }

    @classmethod
    def largest(cls, target: PretrainedConfig) -> dict[str, Any]:
        tables = dict.fromkeys(("draft_vocab", "embeddings"), target.vocab_size)
        return tables | {"qk_norm": True, "mapped": True, "fc_inputs": MOST_FEATURES * target.hidden_size}

    @property
    def inputs(self) -> tuple[int, int]:
        return self.fc_inputs, 2 * self.hidden

    @classmethod
    def check_inputs(cls, tensors: Mapping[str, Tensor], path: str, hidden: int, target: str) -> None:
        own, *width = tensors["fc.weight"].shape
        if len(width) != 1 or width[0] % hidden:
            raise ConfigError(
                f"{path} holds fc.weight as {[own, *width]}, whose inputs are no multiple of the hidden size of "
                f"{target}, {hidden}: set draft.path to a head that was trained for this target"
            )
        shared = [name for name in (EMBEDDING, LM_HEAD) if name not in tensors]
        if shared and own != hidden:
            raise ConfigError(
                f"{path} lacks {' and '.join(shared)}, and its hidden size {own} is not that of {target}, {hidden}: "
                "set draft.path to a head that was trained for this target"
            )

    def wants(self, target: PretrainedConfig) -> HiddenRequest:
        number, vocab = target.num_hidden_layers, target.vocab_size
        count = self.fc_inputs // target.hidden_size
        layers = self.layers or usual_layers(count, number)
        if not layers:
            return FINAL_HIDDEN
        if len(layers) != count or not all(0 <= layer < number for layer in layers):
            raise ConfigError(
                f"the {self.kind} reads {count} hidden states behind the layers {list(layers)} of a target with the "
                f"layers 0..{number - 1}: set draft.path to a head that was trained for this target"
            )
        if self.last_id >= vocab or 0 < self.embeddings < vocab:
            raise ConfigError(
                f"the {self.kind} knows token ids up to {self.last_id or self.embeddings - 1}, and the target's "
                f"vocabulary has {vocab}: set draft.path to a head that was trained for this target"
            )
        return HiddenRequest(layers=layers)

    def config(self) -> dict[str, Any]:
        layers = {"target_layer_ids": list(self.layers)} if self.layers else {}
        own = {"architectures": ["LlamaForCausalLMEagle3"], "norm_before_residual": self.norm_before_residual}
        return super().config() | own | layers | {"draft_vocab_size": self.draft_vocab}


def _last_id(d2t: Tensor) -> int:
    """The largest target id, or 0 for a tensor without numbers; a ConfigError if it holds no offsets of ids."""
    if d2t.is_meta:
        return 0
    ids = d2t + torch.arange(d2t.numel(), device=d2t.device)
    if d2t.ndim != 1 or d2t.is_floating_point() or ids.min() < 0:
        raise ConfigError(
            "the EAGLE-3 head's d2t does not hold the offset of each of its ids to the target's: fetch the head again"
        )
    return int(ids.max())


def _feature_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers *behind* which features are taken, as a configuration numbers them; empty: it does not say.

    vLLM and speculators number by the layer that a hidden state enters, at the top of the file. SGLang and ModelOpt
    (nested in ``eagle_config``) and DeepSpec (``target_layer_ids``) number by the layer that it leaves.
    """
    entered = config.get("eagle_aux_hidden_state_layer_ids") or config.get("aux_hidden_state_layer_ids") or ()
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    left = config.get("target_layer_ids") or nested or ()
    return tuple(int(layer) - 1 for layer in entered) or tuple(int(layer) for layer in left)


def usual_layers(count: int, layers: int) -> tuple[int, ...]:
    """The layers behind which a head takes its features if its configuration does not say.

    Three features are those that enter layers 2, n // 2 and n - 3 of n. A single one is the final hidden state (no
    layer). Any other number is spread evenly over layers 1 to n - 3, as DFlash and DeepSpec do.
    """
    if count == 1:
        return ()
    usual = [1 + round(i * (layers - 4) / (count - 1)) for i in range(count)]
    if count == 3:
        usual = [1, layers // 2 - 1, layers - 4]
    return tuple(min(max(layer, 0), layers - 1) for layer in usual)


class Eagle3Head(EagleHead):
    """An EAGLE-3 head; the published ``midlayer`` is ``layers.0`` here."""

    shape: Eagle3Shape
    shape_class = Eagle3Shape

    def add_modules(self, shape: EagleShape, layer: nn.Module) -> None:
        assert isinstance(shape, Eagle3Shape)
        layer.hidden_norm = LlamaRMSNorm(shape.hidden, shape.eps)
        self.norm = LlamaRMSNorm(shape.hidden, shape.eps)
        if shape.embeddings:
            self.embed_tokens = nn.Embedding(shape.embeddings, shape.hidden)
        if shape.draft_vocab:
            self.lm_head = nn.Linear(shape.hidden, shape.draft_vocab, bias=False)
        if shape.mapped:
            self.d2t = torch.zeros(shape.draft_vocab, dtype=torch.int64)

    def embed(self, tokens: Tensor, target: TargetModel) -> Tensor:
        return self.embed_tokens(tokens) if self.shape.embeddings else target.embed(tokens)

    def fuse(self, states: Tensor) -> Tensor:
        return self.fc(states)

    def combine(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layers[0]
        normed = layer.hidden_norm(features)
        x = torch.cat([layer.input_layernorm(embeddings), normed], dim=-1)
        return normed if self.shape.norm_before_residual else features, x

    def finish(self, features: Tensor) -> Tensor:
        return self.norm(features)

    def logits(self, features: Tensor, target: TargetModel) -> Tensor:
        features = self.finish(features)
        return self.lm_head(features) if self.shape.draft_vocab else target.logits(features)


Eagle3Shape.head_class = Eagle3Head
