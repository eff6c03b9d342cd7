"""A checkpoint's weights, one decoder layer at a time.

Files are mapped, not read: bytes come from disk when a tensor is asked for, and the system drops them again when memory
is short, so the model is never in memory twice.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from subspec.errors import ConfigError, SubspecError
from subspec.targets.checkpoint import (
    DTYPE_NAMES,
    SIGNIFICANT_BITS,
    check_folder_config,
    checkpoint_identity,
    has_tokenizer,
    load_tokenizer,
    read_headers,
    rounded_type,
)
from subspec.targets.generation_settings import not_applied, read_generation_settings
from subspec.targets.hub import Located
from subspec.targets.meta_model import layer_name, parameter_shapes
from subspec.targets.source import LayerSource
from subspec.targets.target import template_ids
from subspec.targets.weight_files import SINGLE, TARGET, Wanted, data_offsets, open_weights

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

_READABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

NAMED = 3
"""Most missing weights, and most tokens, that a message names."""


class CheckpointSource(LayerSource):
    """Layers of a folder of safetensors. Everything is checked before the first weight is read.

    Tensors on the CPU that need no cast may be views of the mapped file: copy them, do not write to them.

    Args:
        name: of the model, as configured.
        wanted: what the folder must hold. A model that drafts may lack a tokenizer, and nothing about it touches the
            output, so there is nothing to note.

    Raises:
        SubspecError: one line with the remedy.
    """

    def __init__(self, located: Located, name: str, dtype: torch.dtype, wanted: Wanted = TARGET) -> None:
        self.name, self.source, self.dtype, self._folder = name, located.source, dtype, located.folder
        super().__init__(check_folder_config(self._folder, name, wanted))
        self._stored = read_headers(self._folder, wanted)
        self._offsets: dict[Path, dict[str, int]] = {}
        if wanted.tokenizer or has_tokenizer(self._folder):
            self.tokenizer = load_tokenizer(self._folder, name, self.config.vocab_size)
        else:
            self.tokenizer = None
        settings = None
        if wanted.tokenizer:
            if self.tokenizer.chat_template:
                template_ids(self.tokenizer, [{"role": "user", "content": "Hello"}], name)
            settings = read_generation_settings(self._folder, name)
            self.eos_token_ids = settings.eos_token_ids(self.config, self.tokenizer)
        if self.config.tie_word_embeddings and self._has_own_head():
            self.config.tie_word_embeddings = False
            self._layer_shapes, self._shared_shapes = parameter_shapes(self.config)
        stored_types = self._check()
        if settings is not None:
            self.notes = tuple(self._remarks(stored_types, not_applied(settings.values)))

    @property
    def identity(self) -> str:
        """See :func:`~subspec.targets.checkpoint.checkpoint_identity`."""
        return checkpoint_identity(self._folder, self.source)

    def layer(self, index: int, device: torch.device) -> Mapping[str, Tensor]:
        """Read now."""
        return self._read(self._names(index), device)

    def sample(self, index: int) -> Mapping[str, Tensor]:
        """Read now."""
        return self._read(self._names(index), torch.device("cpu"), rows=1)

    def locations(self, index: int) -> Mapping[str, tuple[Path, int]] | None:
        """None if the files hold another type, or a parameter begins askew."""
        found = {}
        for name, full in self._names(index).items():
            key = self._key(full)
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
        """Read now."""
        return self._read({name: name for name in self._shared_shapes}, device)

    def _read(self, names: Mapping[str, str], device: torch.device, rows: int | None = None) -> dict[str, Tensor]:
        """Tensors by name; of matrices only the first ``rows``."""
        keys = {name: self._key(full) for name, full in names.items()}
        files = {self._stored[key].file for key in keys.values()}
        handles = {file: open_weights(self._folder / file) for file in files}
        tensors = {}
        for name, key in keys.items():
            stored = self._stored[key]
            handle, whole = handles[stored.file], rows is None or len(stored.shape) == 1
            tensor = handle.get_tensor(key) if whole else handle.get_slice(key)[:rows]
            tensors[name] = tensor.to(device=device, dtype=self.dtype)
        return tensors

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

    def _remarks(self, stored_types: set[str], unfulfilled: str | None) -> Iterator[str]:
        """Notes for readers of a run's figures, a line each.

        Args:
            stored_types: of the weights that the model has, by their safetensors names.
            unfulfilled: generation settings that a run does not apply, as the end of a sentence.
        """
        if stored := rounded_type(stored_types, self.dtype):
            yield (
                f"{self.name}: weights stored as {_READABLE[stored]} are rounded to "
                f"{str(self.dtype).removeprefix('torch.')}; the target of this run is the rounded model"
            )
        if (self._folder / SINGLE).is_file() and next(self._folder.glob("*-of-*.safetensors"), None):
            yield f"{self.name}: {SINGLE} is read, as transformers does, and the shards beside it are not"
        if not self.tokenizer.chat_template:
            yield f"{self.name} has no chat template: prompts are given as plain text, without roles"
        size, added = self.config.vocab_size, self.tokenizer.get_added_vocab()
        if beyond := sorted(token for token, number in added.items() if number >= size):
            yield (
                f"{self.name}: no prompt may hold {', '.join(beyond[:NAMED])}: the model's vocabulary ends at "
                f"{size - 1}, below {len(beyond)} token(s) that were added to its tokenizer"
            )
        if not self.eos_token_ids:
            yield f"{self.name} names no end-of-text token: texts end at their length limit only"
        if unfulfilled:
            yield f"{self.name}: generation settings of the checkpoint are not applied: {unfulfilled}"
