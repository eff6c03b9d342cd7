"""The interface of a target's exact weights: one decoder layer at a time, so that the whole model is never needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase


class LayerSource(Protocol):
    """Origin of a target's weights.

    Attributes:
        name: of the target.
        config: the model's transformers configuration.
        tokenizer: the target's; only a model that drafts may have None.
        eos_token_ids: every id that ends a text, ascending.
        dtype: of every tensor handed out.
        source: recorded origin.
        planted: whether the weights are made up.
        notes: for readers of a run's figures.
        identity: of the decoder layers, for results on disk that depend on them.
    """

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    source: str
    planted: bool
    notes: tuple[str, ...]

    @property
    def identity(self) -> str: ...

    def layer_shapes(self, index: int) -> Mapping[str, torch.Size]:
        """Shape of every parameter of decoder layer ``index``, by its name within the layer
        (``self_attn.q_proj.weight``), in the order of the module's ``named_parameters``."""

    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """The parameters of decoder layer ``index`` on ``device``; none is kept here."""

    def sample(self, index: int) -> Mapping[str, Tensor]:
        """A quickly read part of decoder layer ``index``, on the CPU: vectors whole, of matrices the first row [1, k].

        It verifies results on disk that were made from the layer. Parameters that follow from ``identity`` may be
        missing."""

    def locations(self, index: int) -> Mapping[str, tuple[Path, int]] | None:
        """File and first byte of every parameter of decoder layer ``index``, by name in the order of ``layer_shapes``;
        None: they are in no file as they are in memory."""

    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """All parameters outside the decoder layers, by name in the causal LM: ``model.embed_tokens.weight``,
        ``model.norm.weight`` and, unless tied, ``lm_head.weight``."""
