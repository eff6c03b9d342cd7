"""``draft.path=planted``: a draft head with random weights for a planted target, drawn on the run's device.

No checkpoint is read. It has the shape of the head that was published for the target's family, so its memory and its
time per level are the real ones. Its predictions are noise: tau is about 1.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.schema import PlantedTargetConfig, TargetConfig
from subspec.drafts.block_head import LAYERS, BlockHead
from subspec.drafts.eagle3_head import D2T, MOST_FEATURES, Eagle3Head, usual_layers
from subspec.drafts.eagle_head import ATTENTION, EagleHead, EagleShape, rope_settings
from subspec.errors import ConfigError
from subspec.targets.planted import planted_config

PLANTED = "planted"
"""The value of ``draft.path``."""

STD = 0.02
"""Of the weights: of an untrained head."""

DRAFT_VOCAB = 32_000
"""Vocabulary of the published EAGLE-3 heads; half of the target's if that is smaller."""

QKV_BIASES = frozenset(f"{ATTENTION}{name}_proj.bias" for name in "qkv")


@dataclass(frozen=True)
class PlantedHead:
    """A head that is in no file.

    Attributes:
        target_shape, seed: of the planted target.
        kind: of the head.
    """

    target_shape: str
    seed: int
    kind: type[EagleHead] = EagleHead

    @classmethod
    def of(cls, target: TargetConfig, kind: type[EagleHead] = EagleHead) -> "PlantedHead":
        """The head for a target.

        Raises:
            ConfigError: the target has real weights: it would be drafted for by noise, and no table would say so.
        """
        if not isinstance(target, PlantedTargetConfig):
            raise ConfigError(
                f"draft.path={PLANTED} is a head with random weights, for planted targets only: for "
                f"target={target.name} set draft.path to the folder or hub id of a trained head"
            )
        return cls(target.shape, target.seed, kind)

    @property
    def source(self) -> str:
        """Its description in records."""
        head = {Eagle3Head: "an EAGLE-3 head", BlockHead: "a DFlash head"}.get(self.kind, "a head")
        return f"planted, random weights in the shape of {head} for {self.target_shape}, seed {self.seed}"

    @functools.cached_property
    def _target(self) -> PretrainedConfig:
        return planted_config(PlantedTargetConfig(name=PLANTED, shape=self.target_shape))

    def shape(self) -> EagleShape:
        """Sizes of the head that is published for targets of this family.

        EAGLE-2 heads for Qwen2.5 have as many KV heads as query heads and biases of q, k and v, unlike the target;
        other heads have the target's KV heads and no bias. EAGLE-3 heads read three layers and use the target's
        embedding. Block heads are DFlash's: five layers, features of five layers of the target (or of all of a smaller
        one), 16 slots.
        """
        target = self._target
        heads, number = target.num_attention_heads, target.num_hidden_layers
        qwen = target.model_type == "qwen2" and self.kind is EagleHead
        own: dict[str, Any] = {}
        if self.kind is Eagle3Head:
            own = {"fc_inputs": 3 * target.hidden_size, "draft_vocab": min(DRAFT_VOCAB, target.vocab_size // 2)}
            own["mapped"] = True
        if self.kind is BlockHead:
            layers = usual_layers(min(MOST_FEATURES, number), number)
            own = {"fc_inputs": len(layers) * target.hidden_size, "layers": layers, "target_layers": number}
            own |= {"decoder_layers": LAYERS, "mask_id": target.vocab_size - 1, "qk_norm": True}
        return self.kind.shape_class(
            hidden=target.hidden_size,
            heads=heads,
            kv_heads=heads if qwen else target.num_key_value_heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            intermediate=target.intermediate_size,
            biases=QKV_BIASES if qwen else frozenset(),
            eps=target.rms_norm_eps,
            rope=rope_settings({"rope_parameters": target.rope_parameters}),
            max_positions=target.max_position_embeddings,
            **own,
        )

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Matrices and biases N(0, 0.02), norms 1, by their names; CPUs and GPUs draw different numbers.

        The ids of a reduced vocabulary are spread evenly over the target's.
        """
        generator = torch.Generator(device).manual_seed(self.seed)
        drawn = {}
        for name, size in self.shape().shapes().items():
            if name == D2T:
                own = torch.arange(*size, device=device)
                drawn[name] = own * self._target.vocab_size // len(own) - own
                continue
            tensor = torch.empty(size, dtype=dtype, device=device)
            drawn[name] = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, STD, generator=generator)
        return drawn
