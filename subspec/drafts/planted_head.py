"""``draft.path=planted``: an EAGLE head with random weights for a planted target, drawn on the run's device.

No checkpoint is read. It has the shape of the head that was published for the target's family, so its memory and its
time per level are the real ones. Its predictions are noise: tau is about 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.schema import PlantedTargetConfig, TargetConfig
from subspec.drafts.eagle_head import ATTENTION, NORM, EagleShape, rope_settings
from subspec.errors import ConfigError
from subspec.targets.planted import planted_config

PLANTED = "planted"
"""The value of ``draft.path``."""

STD = 0.02
"""Of the weights: of an untrained head."""

QKV_BIASES = frozenset(f"{ATTENTION}{name}_proj.bias" for name in "qkv")


@dataclass(frozen=True)
class PlantedHead:
    """A head that is in no file.

    Attributes:
        target_shape, seed: of the planted target.
    """

    target_shape: str
    seed: int

    @classmethod
    def of(cls, target: TargetConfig) -> "PlantedHead":
        """The head for a target.

        Raises:
            ConfigError: the target has real weights: it would be drafted for by noise, and no table would say so.
        """
        if not isinstance(target, PlantedTargetConfig):
            raise ConfigError(
                f"draft.path={PLANTED} is a head with random weights, for planted targets only: for "
                f"target={target.name} set draft.path to the folder or hub id of a trained EAGLE head"
            )
        return cls(target.shape, target.seed)

    @property
    def source(self) -> str:
        """Its description in records."""
        return f"planted, random weights in the shape of a head for {self.target_shape}, seed {self.seed}"

    def shape(self) -> EagleShape:
        """Its sizes."""
        return planted_shape(planted_config(PlantedTargetConfig(name=PLANTED, shape=self.target_shape)))

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Matrices and biases N(0, 0.02), the norm 1, by their names; CPUs and GPUs draw different numbers."""
        generator = torch.Generator(device).manual_seed(self.seed)
        drawn = {}
        for name, size in self.shape().shapes().items():
            tensor = torch.empty(size, dtype=dtype, device=device)
            drawn[name] = tensor.fill_(1.0) if name == NORM else tensor.normal_(0.0, STD, generator=generator)
        return drawn


def planted_shape(target: PretrainedConfig) -> EagleShape:
    """Sizes of the head that is published for targets of this family.

    Heads for Qwen2.5 have as many KV heads as query heads and biases of q, k and v, unlike the target; those for
    Llama-3.1 have the target's KV heads and no bias.
    """
    heads = target.num_attention_heads
    qwen = target.model_type == "qwen2"
    return EagleShape(
        hidden=target.hidden_size,
        heads=heads,
        kv_heads=heads if qwen else target.num_key_value_heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
        intermediate=target.intermediate_size,
        biases=QKV_BIASES if qwen else frozenset(),
        eps=target.rms_norm_eps,
        rope=rope_settings({"rope_parameters": target.rope_parameters}),
        max_positions=target.max_position_embeddings,
    )
