"""A target's exact weights, one decoder layer at a time: what a loader needs that never holds the whole model.

Streaming, quantizing and planting all walk the layers once; whoever walks decides where each layer ends up.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase


class LayerSource(Protocol):
    """Where a target's weights come from.

    Attributes:
        name: of the target.
        config: the model's transformers configuration.
        tokenizer: the target's tokenizer.
        eos_token_ids: every id that ends a text, ascending.
        dtype: of every tensor handed out.
        source: what a record says was loaded.
        planted: whether the weights are made up.
        identity: what tells its decoder layers from all others', for what is kept on disk and follows from them.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    source: str
    planted: bool

    @property
    def identity(self) -> str: ...

    def layer_shapes(self, index: int) -> Mapping[str, torch.Size]:
        """Shape of every parameter of decoder layer ``index``, by its name within the layer
        (``self_attn.q_proj.weight``), in the order of the module's ``named_parameters``."""

    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """The parameters of decoder layer ``index`` on ``device``; nothing of them is kept here."""

    def sample(self, index: int) -> Mapping[str, Tensor]:
        """What is quickly read of decoder layer ``index``, on the CPU: vectors whole, of matrices the first row [1, k].

        It tells whether what was kept of the layer is still of these weights; parameters that follow from ``identity``
        may be missing."""

    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """Everything outside the decoder layers, by its name in the causal LM: ``model.embed_tokens.weight``,
        ``model.norm.weight`` and, unless tied, ``lm_head.weight``."""
