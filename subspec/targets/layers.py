"""A checkpoint's weights one decoder layer at a time, and one door to the layers of every kind of target.

The files are mapped, not read: a tensor's bytes come from disk when it is asked for, and the system drops them
again when memory is short, so the model is never in memory twice.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from subspec.config.schema import PlantedTargetConfig, TargetConfig
from subspec.errors import SubspecError
from subspec.targets.checkpoint import checkpoint_identity, weight_files
from subspec.targets.meta_model import layer_name, parameter_shapes
from subspec.targets.planted import PlantedSource
from subspec.targets.prepared import PreparedCheckpoint, prepare_checkpoint
from subspec.targets.source import LayerSource
from subspec.utils.console import Note, print_note

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

NAMED = 3
"""Most missing weights that a message names."""


def open_source(
    config: TargetConfig, dtype: torch.dtype, device: torch.device, *, note: Note = print_note
) -> LayerSource:
    """The layers of any target: embedded, hub id, local folder or planted. Fetches what is not there.

    Args:
        dtype: of every tensor handed out.
        device: of the run; planted weights are drawn there. Nothing is put there yet, so whether the weights
            fit is for the caller to plan.
        note: told one line about everything worth knowing.

    Raises:
        SubspecError: as :func:`subspec.targets.load_target`, before any weight is read.
    """
    if isinstance(config, PlantedTargetConfig):
        source: PlantedSource | CheckpointSource = PlantedSource(config, dtype, device)
    else:
        source = CheckpointSource(prepare_checkpoint(config, note), dtype)
    for line in source.notes:
        note(line)
    return source


class CheckpointSource:
    """A :class:`~subspec.targets.source.LayerSource` over a folder of safetensors.

    Tensors on the CPU that need no cast may be views of the mapped file: copy them, do not write to them.

    Attributes:
        notes: what a reader of the run's figures should know.

    Raises:
        SubspecError: weights of the configuration's architecture are missing, or have other shapes.
    """

    planted = False

    def __init__(self, checkpoint: PreparedCheckpoint, dtype: torch.dtype) -> None:
        self.name, self.source, self.dtype = checkpoint.name, checkpoint.source, dtype
        self.config = copy.deepcopy(checkpoint.config)
        self.tokenizer, self.eos_token_ids = checkpoint.tokenizer, checkpoint.eos_token_ids
        self.notes = tuple(checkpoint.remarks(dtype))
        self._folder = checkpoint.folder
        self._files, shapes = _index(checkpoint.folder)
        if self.config.tie_word_embeddings and self._has_own_head():
            self.config.tie_word_embeddings = False
        self._layer_shapes, self._shared_shapes = parameter_shapes(self.config)
        self._check(shapes)

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

    def shared(self, device: torch.device) -> Mapping[str, Tensor]:
        """Embedding, final norm and, unless tied, the LM head, read now."""
        return self._read({name: name for name in self._shared_shapes}, device)

    def _read(
        self, names: Mapping[str, str], device: torch.device, rows: int | None = None
    ) -> dict[str, Tensor]:
        """Tensors by name; of matrices only the first ``rows``."""
        by_file: dict[str, list[str]] = {}
        stored = {name: self._stored(full) for name, full in names.items()}
        for name, key in stored.items():
            by_file.setdefault(self._files[key], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            with _open(self._folder / file) as handle:
                for name in wanted:
                    part = handle.get_slice(stored[name])
                    whole = rows is None or len(part.get_shape()) == 1
                    tensor = handle.get_tensor(stored[name]) if whole else part[:rows]
                    tensors[name] = tensor.to(device=device, dtype=self.dtype)
        return {name: tensors[name] for name in names}

    def _stored(self, name: str) -> str:
        """The name in the files: without the prefix where the bare decoder was saved; either end of a tie."""
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._files:
                return candidate
        if name == _EMBEDDING and self.config.tie_word_embeddings and _HEAD in self._files:
            return _HEAD
        return name

    def _has_own_head(self) -> bool:
        """Whether a checkpoint that claims to be tied stores a head that differs from its embedding.

        transformers leaves such a pair untied, and so the target has two tables.
        """
        embedding = self._stored(_EMBEDDING)
        if _HEAD not in self._files or embedding not in self._files or embedding == _HEAD:
            return False
        tables = self._read({name: name for name in (_EMBEDDING, _HEAD)}, torch.device("cpu"))
        return not torch.equal(tables[_EMBEDDING], tables[_HEAD])

    def _check(self, stored: Mapping[str, torch.Size]) -> None:
        expected = dict(self._shared_shapes)
        for index in range(self.config.num_hidden_layers):
            expected |= {layer_name(index, name): shape for name, shape in self._layer_shapes.items()}
        missing = [name for name in expected if self._stored(name) not in stored]
        family = self.config.model_type
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise SubspecError(
                f"{self.name} lacks weights of a {family} language model: {', '.join(missing[:NAMED])}{more}: "
                "not a causal language model, or an incomplete checkpoint"
            )
        for name, shape in expected.items():
            found = stored[self._stored(name)]
            if found != shape:
                raise SubspecError(
                    f"{self.name} holds {name} as {list(found)}, its config.json says {list(shape)}: "
                    "they do not belong together"
                )


def _index(folder: Path) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """File and shape of every tensor, from the headers alone."""
    files, shapes = {}, {}
    for file in weight_files(folder):
        with _open(folder / file) as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                files[name] = file
                shapes[name] = torch.Size(handle.get_slice(name).get_shape())
    return files, shapes


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise SubspecError(
            f"{path} cannot be read ({' '.join(str(error).split())}); fetch or copy it again"
        ) from error
