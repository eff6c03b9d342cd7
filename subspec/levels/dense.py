"""Draft levels over exact bfloat16 layers, without a second copy of their weights.

The parts of a fused Linear are adjacent in a layer's flat bytes (:func:`subspec.targets.layer_bytes.flat_layer`), so
the parameters of a transformers module and the fused Linears are views of the same bytes.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from subspec.errors import ConfigError
from subspec.levels.build import check_biases, level_model
from subspec.levels.model import LevelLayer, LevelModel
from subspec.quant.level_linear import Dense
from subspec.targets.layer_bytes import NEIGHBOURS
from subspec.targets.meta_model import parameter_shapes
from subspec.utils.rounding import is_power_of_two


def dense_levels(model: PreTrainedModel, layers: Iterable[int]) -> LevelModel:
    """The decoder layers ``layers`` of ``model``, laid out by :func:`flat_layer`, each on its own rows of the cache."""
    modules = model.get_decoder().layers
    return level_model(model, [dense_layer(layer_views(modules[index]), cache_layer=index) for index in layers])


def dense_layer(views: Mapping[str, Tensor], *, cache_layer: int | None = None) -> LevelLayer:
    """A layer of draft levels over the bytes of :func:`flat_layer`, bfloat16; nothing is copied.

    Args:
        cache_layer: layer of the KV cache that it uses; None: its place among the draft's layers.
    """
    weights, biases, gate_up = ([views[name] for name in group if name in views] for group in NEIGHBOURS)
    return LevelLayer(
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


def layer_views(layer: nn.Module) -> dict[str, Tensor]:
    """A loaded layer's parameters by name."""
    return {name: parameter.data for name, parameter in layer.named_parameters()}


def check_level_support(config: PretrainedConfig, dtype: torch.dtype, what: str) -> None:
    """Check that draft levels support a model's layers.

    Args:
        what: the model, the beginning of a message.

    Raises:
        ConfigError: the kernels do not support its head size, its biases, its activation, its rotary embeddings or its
            dtype.
    """
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    why = ""
    if dim < 16 or not is_power_of_two(dim):
        why = f"has heads of {dim} numbers, and captured levels of offload=stream need a power of two of at least 16"
    elif config.hidden_act not in ("silu", "swish"):
        why = f"has the activation {config.hidden_act}, and captured levels of offload=stream compute silu"
    elif (config.rope_parameters or {}).get("partial_rotary_factor", 1) != 1:
        why = "turns a part of each head only (partial_rotary_factor), and captured levels turn all of it"
    if why:
        raise ConfigError(f"{what} {why}: set offload=none, or take another draft")
    check_biases(parameter_shapes(config)[0], what)
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{what} is in {name}, and captured levels of offload=stream compute in bfloat16: leave "
            "draft.dtype and target.dtype at auto"
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Adjacent tensors as one tensor over the same bytes, joined along their first dimension."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            raise ValueError("parameters that are to be joined do not lie next to each other")
        end += part.numel() * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
