"""A checkpoint's weights, one decoder layer at a time.

Files are mapped, not read: bytes come from disk when a tensor is asked for, and the system drops them again when memory
is short, so the model is never in memory twice.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from subspec.errors import ConfigError, SubspecError
from subspec.targets.checkpoint import DTYPE_NAMES, SIGNIFICANT_BITS, checkpoint_identity
from subspec.targets.meta_model import layer_name, parameter_shapes
from subspec.targets.prepared import PreparedCheckpoint
from subspec.targets.weight_files import data_offsets, open_weights

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

NAMED = 3
"""Most missing weights that a message names."""


class CheckpointSource:
    """A :class:`~subspec.targets.source.LayerSource` over a folder of safetensors.

    Tensors on the CPU that need no cast may be views of the mapped file: copy them, do not write to them.

    Attributes:
        notes: for readers of the run's figures.

    Raises:
        SubspecError: weights of the configuration's architecture are missing, or have other shapes.
    """

    planted = False

    def __init__(self, checkpoint: PreparedCheckpoint, dtype: torch.dtype) -> None:
        self.name, self.source, self.dtype = checkpoint.name, checkpoint.source, dtype
        self.config = copy.deepcopy(checkpoint.config)
        self.tokenizer, self.eos_token_ids = checkpoint.tokenizer, checkpoint.eos_token_ids
        self._folder, self._stored = checkpoint.folder, checkpoint.weights
        self._offsets: dict[Path, dict[str, int]] = {}
        if self.config.tie_word_embeddings and self._has_own_head():
            self.config.tie_word_embeddings = False
        self._layer_shapes, self._shared_shapes = parameter_shapes(self.config)
        self.notes = tuple(checkpoint.remarks(dtype, self._check()))

    @property
    def identity(self) -> str:
        """See :func:`~subspec.targets.checkpoint.checkpoint_identity`."""
        return checkpoint_identity(self._folder, self.source)

    def layer_shapes(self, index: int) -> Mapping[str, torch.Size]:
        """Shapes by name within the layer; all layers of these families are alike."""
        return dict(self._layer_shapes)

    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """The parameters of decoder layer ``index``, read now."""
        if not 0 <= index < self.config.num_hidden_layers:
            raise IndexError(f"no layer {index} in a model of {self.config.num_hidden_layers}")
        return self._read({name: layer_name(index, name) for name in self._layer_shapes}, device)

    def sample(self, index: int) -> Mapping[str, Tensor]:
        """Vectors and first rows of decoder layer ``index``, read now."""
        names = {name: layer_name(index, name) for name in self._layer_shapes}
        return self._read(names, torch.device("cpu"), rows=1)

    def locations(self, index: int) -> Mapping[str, tuple[Path, int]] | None:
        """Where the files hold decoder layer ``index``; None if its type is another, or a parameter begins askew."""
        found = {}
        for name in self._layer_shapes:
            key = self._key(layer_name(index, name))
            stored = self._stored[key]
            if stored.dtype != DTYPE_NAMES[self.dtype]:
                return None
            file = self._folder / stored.file
            if file not in self._offsets:
                self._offsets[file] = data_offsets(file)
            found[name] = file, self._offsets[file][key]
        aligned = all(offset % self.dtype.itemsize == 0 for _, offset in found.values())
        return found if aligned else None

    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """Embedding, final norm and, unless tied, the LM head, read now."""
        return self._read({name: name for name in self._shared_shapes}, device)

    def _read(self, names: Mapping[str, str], device: torch.device, rows: int | None = None) -> dict[str, Tensor]:
        """Tensors by name; of matrices only the first ``rows``."""
        by_file: dict[str, list[str]] = {}
        keys = {name: self._key(full) for name, full in names.items()}
        for name, key in keys.items():
            by_file.setdefault(self._stored[key].file, []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with open_weights(self._folder / file) as handle:
                for name in wanted:
                    key = keys[name]
                    whole = rows is None or len(self._stored[key].shape) == 1
                    tensor = handle.get_tensor(key) if whole else handle.get_slice(key)[:rows]
                    tensors[name] = tensor.to(device=device, dtype=self.dtype)
        return {name: tensors[name] for name in names}

    def _key(self, name: str) -> str:
        """The name in the files: without the prefix where the bare decoder was saved; either end of a tie."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._stored:
                return candidate
        if name == _EMBEDDING and self.config.tie_word_embeddings and _HEAD in self._stored:
            return _HEAD
        return name

    def _has_own_head(self) -> bool:
        """Whether a checkpoint whose configuration ties the LM head stores one that differs from the embedding.

        transformers leaves such a pair untied.
        """
        embedding = self._key(_EMBEDDING)
        if _HEAD not in self._stored or embedding not in self._stored or embedding == _HEAD:
            return False
        tables = self._read({name: name for name in (_EMBEDDING, _HEAD)}, torch.device("cpu"))
        return not torch.equal(tables[_EMBEDDING], tables[_HEAD])

    def _check(self) -> set[str]:
        """Compare the files with the architecture; returns the types of its weights. Surplus tensors are ignored."""
        expected = dict(self._shared_shapes)
        for index in range(self.config.num_hidden_layers):
            expected |= {layer_name(index, name): shape for name, shape in self._layer_shapes.items()}
        missing = [name for name in expected if self._key(name) not in self._stored]
        if missing:  # perhaps because matrices are packed under other names
            types = {tensor.dtype for tensor in self._stored.values() if len(tensor.shape) > 1}
        else:
            types = {self._stored[self._key(name)].dtype for name in expected}
        if packed := sorted(types - SIGNIFICANT_BITS.keys()):
            raise ConfigError(
                f"{self.name} holds {', '.join(packed)} weights; the target must be the exact, unquantized model"
            )
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise SubspecError(
                f"{self.name} lacks weights of a {self.config.model_type} language model: "
                f"{', '.join(missing[:NAMED])}{more}: not a causal language model, or an incomplete checkpoint"
            )
        for name, shape in expected.items():
            found = self._stored[self._key(name)].shape
            if found != shape:
                raise SubspecError(
                    f"{self.name} holds {name} as {list(found)}, its config.json says {list(shape)}: "
                    "they do not belong together"
                )
        return types
