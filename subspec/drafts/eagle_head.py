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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from subspec.decoding.kv_cache import KVView
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
        hidden: width of the target's hidden states.
        heads, kv_heads, head_dim: of the attention.
        intermediate: width of the MLP.
        biases: names of the biases it has, from :data:`OPTIONAL`.
        eps: of the norm.
        rope: rotary settings as in transformers' ``rope_parameters`` (``rope_theta``, ``rope_type``, ...).
        max_positions: that the rotary settings were made for.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    biases: frozenset[str] = frozenset()
    eps: float = 1e-6
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    max_positions: int = 2048

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], config: Mapping[str, Any]) -> "EagleShape":
        """Read off the weights; ``config`` only splits them into heads.

        Args:
            shapes: of the tensors in :data:`REQUIRED` and of those in :data:`OPTIONAL` that are there.
            config: the checkpoint's ``config.json``.

        Raises:
            ConfigError: the shapes contradict each other, the configuration's number of heads, or its activation.
        """
        hidden = shapes["fc.weight"][0]
        q, k = (shapes[f"{ATTENTION}{name}_proj.weight"][0] for name in "qk")
        intermediate = shapes[f"{MLP}gate_proj.weight"][0]
        heads = config.get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1:
            raise ConfigError(
                f"the EAGLE head's config.json says num_attention_heads={heads}: it must be a positive number, since "
                "weights alone do not tell where a head ends"
            )
        head_dim = q // heads
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(
                f"the EAGLE head's config.json says hidden_act={activation}: only silu is built"
            )
        if q % heads or head_dim % 2 or k % head_dim or heads % (k // head_dim or 1):
            raise ConfigError(
                f"the EAGLE head's q_proj and k_proj have {q} and {k} outputs, which {heads} heads "
                "(num_attention_heads) do not divide into: its config.json belongs to another head"
            )
        shape = cls(
            hidden=hidden,
            heads=heads,
            kv_heads=k // head_dim,
            head_dim=head_dim,
            intermediate=intermediate,
            biases=frozenset(name for name in OPTIONAL if name in shapes),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=rope_settings(config),
            max_positions=int(config.get("max_position_embeddings", 2048)),
        )
        for name, expected in shape.shapes().items():
            if tuple(shapes[name]) != tuple(expected):
                raise ConfigError(
                    f"the EAGLE head holds {name} as {list(shapes[name])} where {list(expected)} follows from its "
                    "other tensors: its files do not belong together; fetch or copy them again"
                )
        return shape

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every parameter, by name."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        every = {
            "fc.weight": (self.hidden, 2 * self.hidden),
            "fc.bias": (self.hidden,),
            f"{ATTENTION}q_proj.weight": (width, self.hidden),
            f"{ATTENTION}k_proj.weight": (kv_width, self.hidden),
            f"{ATTENTION}v_proj.weight": (kv_width, self.hidden),
            f"{ATTENTION}o_proj.weight": (self.hidden, width),
            f"{ATTENTION}q_proj.bias": (width,),
            f"{ATTENTION}k_proj.bias": (kv_width,),
            f"{ATTENTION}v_proj.bias": (kv_width,),
            f"{ATTENTION}o_proj.bias": (self.hidden,),
            f"{MLP}gate_proj.weight": (self.intermediate, self.hidden),
            f"{MLP}up_proj.weight": (self.intermediate, self.hidden),
            f"{MLP}down_proj.weight": (self.hidden, self.intermediate),
            NORM: (self.hidden,),
        }
        return {
            name: torch.Size(shape)
            for name, shape in every.items()
            if name not in OPTIONAL or name in self.biases
        }

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

    Raises:
        ConfigError: frequencies that depend on how far a pass reaches, or of an unknown kind.
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = str(settings.pop("type", settings.get("rope_type", "default")))
    if kind not in _FIXED_ROPE:
        raise ConfigError(
            f"the EAGLE head's config.json asks for {kind} rotary embeddings: only {', '.join(_FIXED_ROPE)} are built"
        )
    theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
    return {**settings, "rope_type": kind, "rope_theta": float(theta)}


class Rotary(nn.Module):
    """Rotary tables in float32, whatever the parameters' dtype becomes."""

    inverse_frequency: Tensor

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=shape.heads * shape.head_dim,
            num_attention_heads=shape.heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_positions,
            rope_parameters=dict(shape.rope),
        )
        with torch.device("cpu"):
            made = LlamaRotaryEmbedding(config=config)
        self.scaling: float = made.attention_scaling
        self.register_buffer("inverse_frequency", made.inv_freq.float(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Rotary":
        # Module.to(bfloat16) would round the frequencies; only their device changes.
        moved = fn(self.inverse_frequency)
        self.inverse_frequency = self.inverse_frequency.to(moved.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """int64 [...] -> cosine and sine, each [..., head_dim]."""
        angles = positions[..., None].float() * self.inverse_frequency
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary tables [..., n, dim] to ``x`` [..., n, dim] (halves, as in the Llama family)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class EagleAttention(nn.Module):
    """Grouped-query attention with a bias wherever the checkpoint has one."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def linear(name: str, inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=f"{ATTENTION}{name}.bias" in shape.biases)

        self.q_proj = linear("q_proj", shape.hidden, width)
        self.k_proj = linear("k_proj", shape.hidden, kv_width)
        self.v_proj = linear("v_proj", shape.hidden, kv_width)
        self.o_proj = linear("o_proj", width, shape.hidden)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., n, hidden] -> queries [..., heads, n, dim], keys and values [..., kv_heads, n, dim]."""
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        query = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(-2, -3)
        value = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(-2, -3)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def store(self, x: Tensor, cos: Tensor, sin: Tensor, view: KVView) -> None:
        """Keys and values of [n, hidden] into ``view``."""
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1)
        value = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1)
        view.update(rotate(key, cos, sin)[None], value[None], 0)

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, view: KVView) -> Tensor:
        """[n, hidden], additive mask [n, rows of ``view``] -> [n, hidden]; the new rows are stored."""
        query, key, value = self.project(x, cos, sin)
        key, value = view.update(key[None], value[None], 0)
        groups, count = self.heads // self.kv_heads, x.shape[0]
        # The queries of a group share a KV head: as further rows of it, nothing of the cache is repeated.
        grouped = query.reshape(1, self.kv_heads, groups * count, self.head_dim)
        attended = nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask.repeat(groups, 1)[None, None]
        )
        return self.o_proj(attended.view(self.heads, count, -1).transpose(0, 1).flatten(1))

    def causal(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, n, hidden] -> [batch, n, hidden], differentiable."""
        query, key, value = self.project(x, cos, sin)
        groups = self.heads // self.kv_heads
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class EagleMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class EagleNorm(nn.Module):
    """RMSNorm computed in float32, as in the Llama family."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.eps = shape.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class EagleLayer(nn.Module):
    """A decoder layer without input norm."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.self_attn = EagleAttention(shape)
        self.mlp = EagleMLP(shape)
        self.post_attention_layernorm = EagleNorm(shape)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What follows attention."""
        x = residual + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleHead(nn.Module):
    """An EAGLE head; ``state_dict`` has the names of the published checkpoints, without the embedding.

    Args:
        shape: its sizes.
        seed: of the initial weights, N(0, 0.02) with zero biases; the global random state is left as it was.
    """

    def __init__(self, shape: EagleShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):  # Linears draw initial weights of their own
            self.fc = nn.Linear(2 * shape.hidden, shape.hidden, bias="fc.bias" in shape.biases)
            self.layers = nn.ModuleList([EagleLayer(shape)])
        self.rotary = Rotary(shape)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.is_meta or name == NORM:
                    continue
                if name.endswith(".bias"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> "EagleHead":
        """A head in eval mode, without gradients, whose parameters are ``tensors`` themselves.

        Args:
            tensors: all of :data:`REQUIRED`, some of :data:`OPTIONAL`, nothing else; of one dtype and device.
            config: the checkpoint's ``config.json``.

        Raises:
            ConfigError: as :meth:`EagleShape.of`.
        """
        shape = EagleShape.of({name: tensor.shape for name, tensor in tensors.items()}, config)
        with torch.device("meta"):
            head = cls(shape)
        head.load_state_dict(dict(tensors), strict=True, assign=True)
        head.rotary.to(tensors["fc.weight"].device)
        return head.eval().requires_grad_(False)

    def forward(
        self, embeddings: Tensor, features: Tensor, positions: Tensor, mask: Tensor, view: KVView
    ) -> Tensor:
        """Predicted features, on a cache.

        Args:
            embeddings, features: [n, hidden]; row i: a token's embedding, and the feature of the token before it.
            positions: int64 [n].
            mask: [n, rows of ``view``], additive, in the parameters' dtype.
            view: of a cache of one layer.

        Returns:
            [n, hidden].
        """
        layer = self.layers[0]
        x = self.fc(torch.cat([embeddings, features], dim=-1))
        cos, sin = self.rotary(positions, x.dtype)
        return layer.finish(x, layer.self_attn.cached(x, cos, sin, mask, view))

    def store(self, embeddings: Tensor, features: Tensor, positions: Tensor, view: KVView) -> None:
        """Keys and values alone, for rows whose predictions nobody asks for; arguments as in :meth:`forward`.

        With a single layer they depend on the row's own input only: no attention, no MLP, no mask.
        """
        x = self.fc(torch.cat([embeddings, features], dim=-1))
        self.layers[0].self_attn.store(x, *self.rotary(positions, x.dtype), view)

    def causal(self, embeddings: Tensor, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Predicted features of whole texts at once, differentiable: what training needs.

        Args:
            embeddings, features: [batch, n, hidden], aligned as in :meth:`forward`. Rows after a text's end do not
                reach rows before it, so padding on the right needs no mask.
            positions: int64 [n] or [batch, n]; None: 0, 1, 2 ...

        Returns:
            [batch, n, hidden].
        """
        if positions is None:
            positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        layer = self.layers[0]
        x = self.fc(torch.cat([embeddings, features], dim=-1))
        cos, sin = self.rotary(positions, x.dtype)
        return layer.finish(x, layer.self_attn.causal(x, cos, sin))
