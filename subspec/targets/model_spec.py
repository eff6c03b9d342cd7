"""A model's shapes, read off its configuration, for sizes and kernels."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from subspec.targets.meta_model import parameter_shapes


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a model; every layer of the supported families has the parameters of ``layer``."""

    layers: int
    layer: Mapping[str, torch.Size]
    shared: Mapping[str, torch.Size]
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelSpec":
        """Read off a transformers configuration; no weights are made."""
        layer, shared = parameter_shapes(config)
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            layer=layer,
            shared=shared,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=shared["model.embed_tokens.weight"][0],
            tied="lm_head.weight" not in shared,
        )

    def vector_sizes(self, itemsize: int) -> list[int]:
        """Bytes of each norm and bias of one layer; the substitute keeps them on the device."""
        return [shape.numel() * itemsize for shape in self.layer.values() if len(shape) == 1]
