"""Model graphs on the meta device: filled by loaders, and the origin of the names and shapes of weights.

Names and shapes are read off transformers' own modules, so they cannot drift from the architecture. One decoder
layer is enough: every layer of the supported families has the same parameters.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from subspec.utils.console import quiet_libraries

LAYERS = "model.layers."
"""Prefix of every decoder layer's parameters in a causal LM's state dict."""


def layer_name(index: int, name: str) -> str:
    """Full name of the parameter ``name`` of decoder layer ``index``."""
    return f"{LAYERS}{index}.{name}"


def empty_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal LM of ``config`` with every parameter on the meta device, in ``dtype``.

    It is in eval mode, without gradients, with SDPA attention, its embeddings tied if the configuration says so.
    Buffers (the rotary frequencies, float32) are real and on ``device``.
    """
    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    base = model.get_decoder()
    # Frequencies are computed, not loaded: the module is rebuilt on a real device.
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def parameter_shapes(config: PretrainedConfig) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Shapes of the parameters of a decoder layer, by name within the layer, and of everything outside the layers.

    Both in the order of ``named_parameters``; a tied LM head is not listed.
    """
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    if getattr(single, "layer_types", None):
        single.layer_types = single.layer_types[:1]
    layer, shared = {}, {}
    prefix = layer_name(0, "")
    for name, parameter in empty_model(single, torch.float32, torch.device("meta")).named_parameters():
        if name.startswith(prefix):
            layer[name.removeprefix(prefix)] = parameter.shape
        else:
            shared[name] = parameter.shape
    return layer, shared


def count_parameters(config: PretrainedConfig) -> int:
    """Number of weights of the whole model; a tied LM head counts once."""
    layer, shared = parameter_shapes(config)
    per_layer = sum(shape.numel() for shape in layer.values())
    return config.num_hidden_layers * per_layer + sum(shape.numel() for shape in shared.values())


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make ``tensors`` the parameters of ``module``, by name."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
