"""The EAGLE head (Li et al., arXiv 2401.15077, section 4.1; the same module in EAGLE-2, arXiv 2406.16858).

One decoder layer that predicts the target's *feature*, its hidden state after the final norm, one token ahead:

    feature of token i+1  ~  layer(fc([embedding of token i+1 ; feature of token i]))

The target's own LM head turns the predicted feature into logits, and the target's embedding table is used, so a head
consists of ``fc`` and a layer. That layer has no input norm, and there is no final norm. Parameters carry the names
of the published checkpoints; their shapes and biases are read off the weights (:meth:`EagleShape.of`), because the
configurations published beside them do not always say what was trained (heads for Qwen2 have as many KV heads as
query heads where their ``config.json``, a copy of the target's, says 4).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from subspec.decoding.hidden import FINAL_HIDDEN, HiddenRequest
from subspec.decoding.kv_cache import KVView
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.errors import ConfigError

ATTENTION, MLP = "layers.0.self_attn.", "layers.0.mlp."
NORM = "layers.0.post_attention_layernorm.weight"

REQUIRED = (
    "fc.weight",
    *(f"{ATTENTION}{name}_proj.weight" for name in "qkvo"),
    *(f"{MLP}{name}_proj.weight" for name in ("gate", "up", "down")),
    NORM,
)
"""Tensors that every head has."""

OPTIONAL = ("fc.bias", *(f"{ATTENTION}{name}_proj.bias" for name in "qkvo"))
"""Biases, present or not."""

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class EagleShape:
    """Sizes of a head.

    Attributes:
        kind, draft: its name in messages, and the draft that reads it.
        required, optional: names of its tensors.
        keeps_features: whether a level reads the features that the levels above it predicted.
        hidden: width of its features; those of EAGLE-1 and EAGLE-2 are the target's hidden states.
        intermediate: width of the MLP.
        biases: names of the biases it has, from :data:`OPTIONAL`.
        rope: rotary settings as in transformers' ``rope_parameters`` (``rope_theta``, ``rope_type``, ...).
        max_positions: that the rotary settings were made for.
        decoder_layers: of the head, all of the same sizes.
        qk_norm: whether the heads of query and key have norms.
    """

    kind: ClassVar[str] = "EAGLE-1 or EAGLE-2 head"
    draft: ClassVar[str] = "eagle2"
    required: ClassVar[tuple[str, ...]] = REQUIRED
    optional: ClassVar[tuple[str, ...]] = OPTIONAL
    head_class: ClassVar[type["EagleHead"]]
    keeps_features: ClassVar[bool] = True

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    biases: frozenset[str] = frozenset()
    eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    max_positions: int = 2048
    decoder_layers: int = 1
    qk_norm: bool = False

    @classmethod
    def names(cls, config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the tensors that a head with this ``config.json`` has, and of those that it may have."""
        return cls.required, cls.optional

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """Read off the weights; ``config``, the checkpoint's ``config.json``, only splits them into heads.

        Args:
            tensors: those of :meth:`names` that are there.

        Raises:
            ConfigError: the shapes contradict each other or the configuration.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        q, k = (shapes[f"{ATTENTION}{name}_proj.weight"][0] for name in "qk")
        heads = config.get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1:
            raise ConfigError(
                f"the {cls.kind}'s config.json says num_attention_heads={heads}: it must be a positive number, since "
                "weights alone do not tell where a head ends"
            )
        head_dim = q // heads
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ConfigError(f"the {cls.kind}'s config.json says hidden_act={activation}: only silu is built")
        if q % heads or head_dim % 2 or k % head_dim or heads % (k // head_dim or 1):
            raise ConfigError(
                f"the {cls.kind}'s q_proj and k_proj have {q} and {k} outputs, which {heads} heads "
                "(num_attention_heads) do not divide into: its config.json belongs to another head"
            )
        shape = cls(
            hidden=shapes["fc.weight"][0],
            heads=heads,
            kv_heads=k // head_dim,
            head_dim=head_dim,
            intermediate=shapes[f"{MLP}gate_proj.weight"][0],
            biases=frozenset(name for name in OPTIONAL if name in shapes),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope_settings(config),
            max_positions=int(config.get("max_position_embeddings", 2048)),
            **cls.own_fields(tensors, config),
        )
        expected = shape.shapes()
        for name in expected | shapes:
            if shapes.get(name) != expected.get(name):
                raise ConfigError(
                    f"the {cls.kind} holds {name} as {list(shapes.get(name, ()))} where "
                    f"{list(expected.get(name, ()))} follows from its other tensors: its files do not belong "
                    "together; fetch or copy them again"
                )
        return shape

    @classmethod
    def own_fields(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields that a subclass adds; arguments and errors as of :meth:`of`."""
        return {}

    @classmethod
    def largest(cls, target: PretrainedConfig) -> dict[str, Any]:
        """Values of the fields that a subclass adds, of the largest published head for a target."""
        return {}

    @property
    def levels(self) -> int:
        """Levels that one pass drafts."""
        return 1

    def draft_rows(self, policy: TreePolicy) -> int:
        """Rows of the draft region of its KV cache."""
        return policy.draft_rows

    @property
    def inputs(self) -> tuple[int, int]:
        """Inputs of ``fc`` and of the attention."""
        return 2 * self.hidden, self.hidden

    def wants(self, target: PretrainedConfig) -> HiddenRequest:
        """The hidden states that it reads of a target; a ConfigError if it was made for another one."""
        return FINAL_HIDDEN

    @classmethod
    def check_inputs(cls, tensors: Mapping[str, Tensor], path: str, hidden: int, target: str) -> None:
        """Check a head's inputs against the target's hidden size.

        Args:
            path, target: names of the head and of the target, for messages.
        """
        fc = list(tensors["fc.weight"].shape)
        if len(fc) != 2 or fc[1] != 2 * fc[0]:
            three = ", but EAGLE-3's: set draft=eagle3" if len(fc) == 2 and fc[1] == 3 * fc[0] else ""
            raise ConfigError(f"{path} holds fc.weight as {fc}, not as [H, 2 H]: it is no {cls.kind}{three}")
        if fc[0] != hidden:
            raise ConfigError(
                f"{path} is a head for targets of hidden size {fc[0]}, and {target} has {hidden}: set draft.path to a "
                "head that was trained for this target"
            )

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor, by name."""
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in self.head_class(self).state_dict().items()}

    def layer_config(self) -> LlamaConfig:
        """The configuration of transformers' decoder layer."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            max_position_embeddings=self.max_positions,
            rope_parameters=dict(self.rope),
            attention_bias=True,
            attn_implementation="sdpa",
        )

    def config(self) -> dict[str, Any]:
        """The ``config.json`` that :meth:`of` reads this back from, with these weights."""
        return {
            "architectures": ["EagleHead"],
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": dict(self.rope),
        }


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of a ``config.json``, whether written the old way (``rope_theta``, ``rope_scaling``) or the new.

    Refused are frequencies that depend on how far a pass reaches.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(settings.pop("type", settings.get("rope_type", "default")))
    if kind not in _FIXED_ROPE:
        raise ConfigError(
            f"the draft head's config.json asks for {kind} rotary embeddings: only {', '.join(_FIXED_ROPE)} are built"
        )
    theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
    return {**settings, "rope_type": kind, "rope_theta": float(theta)}


class EagleRotary(LlamaRotaryEmbedding):
    """transformers' rotary tables; the frequencies stay float32 when the module's dtype changes."""

    def _apply(self, fn: Any, recurse: bool = True) -> "EagleRotary":
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class EagleAttention(LlamaAttention):
    """transformers' attention, with a bias or a norm of the heads wherever the checkpoint has one."""

    def __init__(self, config: LlamaConfig, shape: EagleShape, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in (f"{one}_proj" for one in "qkvo"):
            outputs, inputs = getattr(self, name).weight.shape
            inputs = inputs if name == "o_proj" else shape.inputs[1]
            setattr(self, name, nn.Linear(inputs, outputs, bias=f"{ATTENTION}{name}.bias" in shape.biases))
        for name in ("q_norm", "k_norm"):
            self.add_module(name, LlamaRMSNorm(self.head_dim, shape.eps) if shape.qk_norm else nn.Identity())

    def _heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, n, inputs] -> queries [batch, heads, n, dim], keys and values [batch, kv_heads, n, dim]."""
        query, key = self.q_norm(self._heads(self.q_proj, x)), self.k_norm(self._heads(self.k_proj, x))
        return *apply_rotary_pos_emb(query, key, cos, sin), self._heads(self.v_proj, x)

    def store(self, x: Tensor, cos: Tensor, sin: Tensor, view: KVView) -> None:
        """Write the keys and values of [1, n, inputs] to ``view``."""
        key = self.k_norm(self._heads(self.k_proj, x))
        view.update(apply_rotary_pos_emb(key, key, cos, sin)[1], self._heads(self.v_proj, x), self.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: Any,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the base class on a cache; keys and values are not repeated for the query heads of a group."""
        query, key, value = self.project(hidden_states, *position_embeddings)
        count, groups = query.shape[2], self.num_key_value_groups
        key, value = past_key_values.update(key, value, self.layer_idx)
        # The queries of a group become further rows of their KV head.
        attended = nn.functional.scaled_dot_product_attention(
            query.reshape(*key.shape[:2], groups * count, self.head_dim),
            key,
            value,
            attn_mask=attention_mask.repeat(1, 1, groups, 1),
        )
        attended = attended.reshape(len(key), -1, count, self.head_dim).transpose(1, 2).flatten(2)
        return self.o_proj(attended), None


class EagleHead(nn.Module):
    """An EAGLE head; ``state_dict`` has the names of the published checkpoints, without the embedding.

    Attributes:
        d2t: int64 [vocabulary of the head], what its ids lack to the target's; None: they are the target's.

    Args:
        shape: its sizes.
        seed: of the initial weights, N(0, 0.02) with zero biases; the global random state is left as it was.
    """

    shape_class: ClassVar[type[EagleShape]] = EagleShape

    def __init__(self, shape: EagleShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):  # Linears draw initial weights of their own
            self.fc = nn.Linear(shape.inputs[0], shape.hidden, bias="fc.bias" in shape.biases)
            config = shape.layer_config()
            self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(shape.decoder_layers))
            for index, layer in enumerate(self.layers):
                layer.self_attn = EagleAttention(config, shape, index)
            self.register_buffer("d2t", None)
            self.add_modules(shape, self.layers[0])
        with torch.device("cpu"):
            self.rotary = EagleRotary(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
                elif not parameter.is_meta and "norm" not in name:
                    parameter.normal_(0.0, 0.02, generator=generator)

    def add_modules(self, shape: EagleShape, layer: nn.Module) -> None:
        """Add what a subclass has besides, or in place of, the modules of EAGLE-2."""
        layer.input_layernorm = nn.Identity()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A head in eval mode, without gradients, whose parameters are ``tensors`` themselves.

        Arguments and errors as of :meth:`EagleShape.of`; the tensors are of one device, and of one dtype but for
        indices.
        """
        shape = cls.shape_class.of(tensors, config)
        with torch.device("meta"):
            head = cls(shape)
        head.load_state_dict(dict(tensors), strict=True, assign=True)
        head.rotary.to(tensors["fc.weight"].device)
        return head.eval().requires_grad_(False)

    def embed(self, tokens: Tensor, target: TargetModel) -> Tensor:
        """Embeddings [n, hidden] of ``tokens`` [n]."""
        return target.embed(tokens)

    def fuse(self, states: Tensor) -> Tensor:
        """The features [n, hidden] of a target's hidden states [n, ``target_width``]."""
        return states

    def combine(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's residual stream [n, hidden], and the inputs of its attention [n, inputs]."""
        x = self.fc(torch.cat([embeddings, features], dim=-1))
        return x, x

    def finish(self, features: Tensor) -> Tensor:
        """The LM head's inputs [n, hidden] of predicted features [n, hidden]."""
        return features

    def logits(self, features: Tensor, target: TargetModel) -> Tensor:
        """Logits [n, vocabulary of the head] of predicted features [n, hidden]."""
        return target.logits(self.finish(features))

    def forward(self, embeddings: Tensor, features: Tensor, positions: Tensor, mask: Tensor, view: KVView) -> Tensor:
        """Predicted features on a cache.

        Args:
            embeddings, features: [n, hidden]; row i: a token's embedding, and the feature of the token before it.
            positions: int64 [n].
            mask: [1, 1, n, rows of ``view``], additive, in the parameters' dtype.
            view: of a cache of one layer.

        Returns:
            [n, hidden].
        """
        residual, x = self.combine(embeddings, features)
        layer, x = self.layers[0], x[None]
        attended, _ = layer.self_attn(x, self.rotary(x, positions[None]), mask, past_key_values=view)
        hidden = residual + attended[0]
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def store(self, embeddings: Tensor, features: Tensor, positions: Tensor, view: KVView) -> None:
        """Write keys and values alone, for rows whose predictions are not needed; arguments as of :meth:`forward`.

        With a single layer they depend on the row's own input only: no attention, no MLP, no mask.
        """
        x = self.combine(embeddings, features)[1][None]
        self.layers[0].self_attn.store(x, *self.rotary(x, positions[None]), view)


EagleShape.head_class = EagleHead
