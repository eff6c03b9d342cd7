"""Which models can be decoded losslessly: one check of a model's configuration for every way to start a run.

The command line asks before weights are fetched, the library about a model that is loaded. Messages name the key or the
argument to change, which the caller passes in.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subspec.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that the engine knows how to run."""

ATTENTION = ("sdpa", "eager")
"""Attention implementations that take an explicit mask, which a tree needs."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of attention that the layers of these families have."""


MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embeddings that transformers computes anew from the largest position of a pass."""

FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embeddings that depend on a token's position alone."""


def rope_kind(model: PretrainedConfig) -> str:
    """The kind of rotary embeddings, as the model's configuration spells it; ``default`` where it says nothing."""
    settings = getattr(model, "rope_parameters", None) or getattr(model, "rope_scaling", None) or {}
    kind = settings.get("rope_type", settings.get("type"))
    if kind is None and any(isinstance(value, Mapping) for value in settings.values()):
        return "by kind of layer"
    return "default" if kind is None else str(kind)


def check_family(model_type: Any, name: str) -> None:
    """Refuse a model of a family that is not supported.

    Args:
        model_type: of its configuration.
        name: what the user called the model.

    Raises:
        ConfigError: it is none of :data:`FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{name} is of type {model_type!r}; targets of these types are supported: {', '.join(FAMILIES)}"
        )


def check_unquantized(quantization: Any, name: str) -> None:
    """Refuse a model whose weights are quantized already.

    Args:
        quantization: its ``quantization_config``, if any.

    Raises:
        ConfigError: there is one.
    """
    if not quantization:
        return
    method = quantization if isinstance(quantization, str) else None
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
    elif method is None:
        method = getattr(quantization, "quant_method", None)
    method = getattr(method, "value", method) or "unknown method"
    raise ConfigError(
        f"{name} holds quantized weights ({method}); the target must be the exact model: "
        "pass the unquantized checkpoint (the substitute is quantized from it by the run)"
    )


def shortest_window(model: PretrainedConfig) -> int | None:
    """Tokens that the narrowest layer of a model attends to; None: every layer sees the whole text.

    transformers reads windows in two places: in the attention masks (Mistral: of every layer; Qwen: of the layers whose
    type says so), and in the KV cache of ``generate``, for every model whose configuration has no types of layers.
    """
    kinds = getattr(model, "layer_types", None)
    windows = []
    if model.model_type == "mistral" or kinds is None or "sliding_attention" in kinds:
        windows.append(getattr(model, "sliding_window", None))
    if kinds is None:
        windows.append(getattr(model, "attention_chunk_size", None))
    return min((int(window) for window in windows if window is not None), default=None)


def check_model_config(model: PretrainedConfig, *, name: str, max_length: int, key: str) -> None:
    """Refuse a model that tree passes over at most ``max_length`` tokens would not decode exactly.

    Args:
        model: its transformers configuration.
        name: what the user called the model.
        max_length: most tokens of prompt and output together.
        key: what the caller's user sets ``max_length`` by.

    Raises:
        ConfigError: with the first reason found.
    """
    check_family(getattr(model, "model_type", None), name)
    check_unquantized(getattr(model, "quantization_config", None), name)
    positions = getattr(model, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ConfigError(
            f"{key}={max_length} exceeds the {positions} positions of {name}: lower {key} to {positions}"
        )
    window = shortest_window(model)
    if window is not None and max_length > window:
        raise ConfigError(
            f"{key}={max_length} exceeds the attention window of {window} tokens of {name}, whose sliding attention "
            f"is not built: lower {key} to {window}"
        )
    others = sorted(set(getattr(model, "layer_types", None) or ()) - LAYER_TYPES)
    if others:
        raise ConfigError(
            f"{name} has layers of type {', '.join(others)}, which are not built; take another target"
        )
    kind = rope_kind(model)
    if kind in MOVING_ROPE:
        raise ConfigError(
            f"{name} has {kind} rotary embeddings, whose frequencies depend on how far a pass reaches: a tree would "
            "change them, so it cannot be decoded losslessly here; take another target"
        )
    if kind not in FIXED_ROPE:
        raise ConfigError(
            f"{name}: rope type {kind} is not supported (supported: {', '.join(FIXED_ROPE)}); take another target"
        )


def check_loaded_model(model: Any, argument: str = "model") -> None:
    """Refuse an object that is not a whole, exact causal language model, ready for inference on one device.

    Args:
        argument: what the caller's user passed it as.

    Raises:
        ConfigError: with the first reason found.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        merge = ": merge its adapter first (merge_and_unload())" if hasattr(model, "merge_and_unload") else ""
        raise ConfigError(
            f"{argument} is a {kind}, not a transformers model{merge}; pass what AutoModelForCausalLM.from_pretrained "
            "returns"
        )
    check_family(model.config.model_type, f"{argument} ({kind})")
    if not isinstance(model, _causal_class(model.config.model_type)):
        raise ConfigError(
            f"{argument} is a {kind}, not a causal language model with its LM head; pass what "
            "AutoModelForCausalLM.from_pretrained returns"
        )
    check_unquantized(getattr(model.config, "quantization_config", None), f"{argument} ({kind})")
    if any(module.training for module in model.modules()):
        raise ConfigError(f"{argument} ({kind}) is in training mode: call {argument}.eval() first")
    attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
    if attention not in ATTENTION:
        raise ConfigError(
            f"{argument} ({kind}) computes attention with {attention}, which takes no mask of a tree: load it with "
            "attn_implementation='sdpa'"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise ConfigError(
            f"{argument} ({kind}) lies on {', '.join(devices)}: load it whole on one device (without device_map='auto')"
        )
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) != 1 or not _computes(next(model.parameters()).dtype):
        raise ConfigError(
            f"{argument} ({kind}) holds weights as {', '.join(dtypes)}: load it in one type (dtype=torch.bfloat16, "
            "float16 or float32)"
        )


def _computes(dtype: torch.dtype) -> bool:
    """Whether Linear layers compute in ``dtype``; floats of a byte are for storage."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _causal_class(family: str) -> type:
    """The class that transformers loads as the causal language model of ``family``."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
