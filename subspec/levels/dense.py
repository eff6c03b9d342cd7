"""Fused levels over exact bfloat16 layers, without a second copy of their weights.

A layer lies in one flat run of bytes in which the parts of a fused Linear are neighbours
(:func:`subspec.targets.layer_bytes.flat_layer`), so that the parameters of a transformers module and the fused Linears
are views of the same bytes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.errors import ConfigError
from subspec.levels.model import FusedLayer
from subspec.quant.level_linear import Dense
from subspec.targets.layer_bytes import NEIGHBOURS
from subspec.utils.rounding import is_power_of_two


def dense_layer(views: Mapping[str, Tensor], *, cache_layer: int | None = None) -> FusedLayer:
    """The fused form of a layer made by :func:`flat_layer` in bfloat16; nothing is copied.

    Args:
        cache_layer: whose rows of the KV cache it uses; None: those of its place among the fused layers.

    Raises:
        ConfigError: the layer has a bias that the fused level does not know.
    """
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        if f"{name}.bias" in views:
            raise ConfigError(
                f"the draft's layers have a bias in {name}, which the fused level of offload=stream does not support: "
                "set offload=none, or take another draft"
            )
    weights, biases, gate_up = ([views[name] for name in group if name in views] for group in NEIGHBOURS)
    return FusedLayer(
        qkv=Dense(_joined(weights)),
        out=Dense(views["self_attn.o_proj.weight"]),
        gate_up=Dense(_joined(gate_up), swiglu=True, interleaved=False),
        down=Dense(views["mlp.down_proj.weight"]),
        qkv_bias=_joined(biases) if biases else None,
        input_norm=views["input_layernorm.weight"],
        post_norm=views["post_attention_layernorm.weight"],
        q_norm=views.get("self_attn.q_norm.weight"),
        k_norm=views.get("self_attn.k_norm.weight"),
        cache_layer=cache_layer,
    )


def check_fused(config: PretrainedConfig, dtype: torch.dtype, what: str) -> None:
    """Whether the fused level can run a model's layers.

    Args:
        what: the model, as a message begins with.

    Raises:
        ConfigError: its heads or its type do not suit the kernels.
    """
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if dim < 16 or not is_power_of_two(dim):
        raise ConfigError(
            f"{what} has heads of {dim} numbers, and the fused level of offload=stream needs a power of two of at "
            "least 16: set offload=none, or take another draft"
        )
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{what} is in {name}, and the fused level of offload=stream computes in bfloat16: leave "
            "draft.dtype and target.dtype at auto"
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Neighbours as one tensor over the same bytes, joined along their first dimension."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            raise ValueError("parameters that are to be joined do not lie next to each other")
        end += part.numel() * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
