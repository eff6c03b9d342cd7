"""A target's exact layers on disk, for a run that reads them from there in every pass: a file of bytes per layer.

For targets whose own files cannot be read in place: other dtypes, and weights that are not in files.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from subspec.store.store import Store
from subspec.utils.files import Content
from subspec.utils.pinned import PinnedBuffer


class ExactLayerStore(Store[PinnedBuffer]):
    """Layers as their parameters' bytes, one after the other. A layer that cannot be kept ends the run."""

    name, making, made_as, suffix = "copy of the target's layers", "writing", "written", ".bin"
    format = 1
    required = True

    def parse(self, content: PinnedBuffer) -> PinnedBuffer:
        return content

    def write(self, index: int, layer: Mapping[str, Tensor]) -> tuple[Path, str]:
        """Write the parameters of a layer; returns its file and its SHA-256.

        Raises:
            SubspecError: the disk is full or forbidden.
        """
        self.put(index, lambda: [parameter_bytes(tensor) for tensor in layer.values()])
        self.made += 1
        kept = self.file(index)
        assert kept is not None  # or it has raised
        return kept


def parameter_bytes(tensor: Tensor) -> Content:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def layer_digest(layer: Mapping[str, Tensor]) -> str:
    """SHA-256 of the parameters' bytes, which is that of the file they are kept in."""
    digest = hashlib.sha256()
    for tensor in layer.values():
        digest.update(parameter_bytes(tensor))
    return digest.hexdigest()
