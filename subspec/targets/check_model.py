"""Refuse models that cannot be decoded losslessly, by configuration or once loaded.

The command line checks before weights are fetched, the library checks loaded models. Callers pass in the key or the
argument that messages name.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from subspec.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Supported values of ``model_type``."""

ATTENTION = ("sdpa", "eager")
"""Attention implementations that accept an explicit mask, which a tree needs."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of attention layers that are built."""

MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embeddings that transformers recomputes from the largest position of a pass."""

FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embeddings that depend on a token's position alone."""


def rope_kind(model: PretrainedConfig) -> str:
    """The kind of rotary embeddings in the model's configuration; ``default`` if it names none."""
    settings = getattr(model, "rope_parameters", None) or getattr(model, "rope_scaling", None) or {}
    kind = settings.get("rope_type", settings.get("type"))
    if kind is None and any(isinstance(value, Mapping) for value in settings.values()):
        return "by kind of layer"
    return "default" if kind is None else str(kind)


def check_family(model_type: Any, name: str) -> None:
    """Refuse (ConfigError) a ``model_type`` that is none of :data:`FAMILIES`; ``name`` is the model's."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{name} is of type {model_type!r}; targets of these types are supported: {', '.join(FAMILIES)}"
        )


def check_unquantized(quantization: Any, name: str) -> None:
    """Refuse (ConfigError) a model with a ``quantization_config``: a mapping, an object or a name."""
    if not quantization:
        return
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method")
    else:
        method = getattr(quantization, "quant_method", quantization)
    method = getattr(method, "value", method) or "unknown method"
    raise ConfigError(
        f"{name} holds quantized weights ({method}); the target must be the exact model: "
        "pass the unquantized checkpoint (the substitute is quantized from it by the run)"
    )


def shortest_window(model: PretrainedConfig) -> int | None:
    """Tokens that the narrowest layer of a model attends to; None: every layer attends to the whole text.

    transformers reads windows in two places: in the attention masks (Mistral: of every layer; Qwen: of layers of type
    ``sliding_attention``), and in the KV cache of ``generate``, for every model without ``layer_types``.
    """
    kinds = getattr(model, "layer_types", None)
    windows = []
    if model.model_type == "mistral" or kinds is None or "sliding_attention" in kinds:
        windows.append(getattr(model, "sliding_window", None))
    if kinds is None:
        windows.append(getattr(model, "attention_chunk_size", None))
    return min((int(window) for window in windows if window is not None), default=None)


def check_architecture(model: PretrainedConfig, name: str) -> None:
    """Refuse (ConfigError) a model whose layers are not built here, whatever the length of a text."""
    check_family(getattr(model, "model_type", None), name)
    check_unquantized(getattr(model, "quantization_config", None), name)
    if model.num_hidden_layers < 1:
        raise ConfigError(f"{name} has num_hidden_layers={model.num_hidden_layers}; take another model")
    kinds = set(getattr(model, "layer_types", None) or ())
    if others := sorted(kinds - LAYER_TYPES):
        raise ConfigError(f"{name} has layers of type {', '.join(others)}, which are not built; take another model")
    if "sliding_attention" in kinds and getattr(model, "sliding_window", None) is None:
        raise ConfigError(f"{name} has layers of type sliding_attention, but no sliding_window; mend config.json")
    kind = rope_kind(model)
    if kind in MOVING_ROPE:
        raise ConfigError(
            f"{name} has {kind} rotary embeddings, whose frequencies depend on the length of a pass: a tree changes "
            "them, so decoding would not be lossless; take another model"
        )
    if kind not in FIXED_ROPE:
        raise ConfigError(
            f"{name}: rope type {kind} is not supported (supported: {', '.join(FIXED_ROPE)}); take another model"
        )


def check_model_config(model: PretrainedConfig, *, name: str, max_length: int, key: str) -> None:
    """Refuse (ConfigError) a model that tree passes over ``max_length`` tokens would not decode exactly.

    Args:
        name: of the model, for messages.
        max_length: most tokens of prompt and output together.
        key: the configuration key or argument that sets ``max_length``.
    """
    check_architecture(model, name)
    positions = getattr(model, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ConfigError(f"{key}={max_length} exceeds the {positions} positions of {name}: lower {key} to {positions}")
    window = shortest_window(model)
    if window is not None and max_length > window:
        raise ConfigError(
            f"{key}={max_length} exceeds the attention window of {window} tokens of {name}, whose sliding attention "
            f"is not built: lower {key} to {window}"
        )


def check_loaded_model(model: Any) -> None:
    """Refuse (ConfigError) an object that is not a whole, exact causal language model, ready on one device."""
    kind = type(model).__name__
    named = f"model ({kind})"
    if not isinstance(model, PreTrainedModel):
        merge = ": merge its adapter first (merge_and_unload())" if hasattr(model, "merge_and_unload") else ""
        raise ConfigError(
            f"model is a {kind}, not a transformers model{merge}; pass what AutoModelForCausalLM.from_pretrained "
            "returns"
        )
    check_family(model.config.model_type, named)
    if not isinstance(model, getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type])):
        raise ConfigError(
            f"model is a {kind}, not a causal language model with its LM head; pass what "
            "AutoModelForCausalLM.from_pretrained returns"
        )
    check_unquantized(getattr(model.config, "quantization_config", None), named)
    if any(module.training for module in model.modules()):
        raise ConfigError(f"{named} is in training mode: call model.eval() first")
    attention = getattr(model.config, "_attn_implementation", None) or "sdpa"
    if attention not in ATTENTION:
        raise ConfigError(
            f"{named} computes attention with {attention}, which accepts no tree mask: load it with "
            "attn_implementation='sdpa'"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise ConfigError(
            f"{named} lies on {', '.join(devices)}: load it whole on one device (without device_map='auto')"
        )
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    dtype = next(model.parameters()).dtype
    if len(dtypes) != 1 or not dtype.is_floating_point or dtype.itemsize == 1:  # floats of a byte are for storage
        raise ConfigError(
            f"{named} holds weights as {', '.join(dtypes)}: load it in one type (dtype=torch.bfloat16, "
            "float16 or float32)"
        )
