"""A target's exact layers on disk, for a run that reads them from there in every pass: a file of bytes per layer.

For targets whose own files cannot be read in place: other dtypes, and weights that are not in files.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from subspec.errors import SubspecError
from subspec.store.store import Store
from subspec.utils.files import Content
from subspec.utils.pinned import PinnedBuffer


class ExactLayerStore(Store[PinnedBuffer]):
    """Layers as their parameters' bytes, one after the other. A layer that cannot be kept ends the run."""

    name, making, made_as, suffix = "copy of the target's layers", "writing", "written", ".bin"
    format = 1

    def parse(self, content: PinnedBuffer) -> PinnedBuffer:
        return content

    def file(self, index: int) -> tuple[Path, str] | None:
        """A layer's file and its SHA-256; None if it is not kept whole. The content is not read."""
        if not self.has(index):
            return None
        name = self._file(index)
        expected = self._files[name]
        try:
            whole = self._path(name).stat().st_size == expected["bytes"]
        except OSError:
            whole = False
        return (self._path(name), expected["sha256"]) if whole else None

    def write(self, index: int, layer: Mapping[str, Tensor]) -> tuple[Path, str]:
        """Write the parameters of a layer; returns its file and its SHA-256.

        Raises:
            SubspecError: the disk is full or forbidden.
        """
        self.put(index, lambda: [parameter_bytes(tensor) for tensor in layer.values()])
        self._flush()
        self.made += 1
        name = self._file(index)
        with self._path(name).open("rb") as stream:
            os.fsync(stream.fileno())  # or the first reads past the page cache would wait for it
        return self._path(name), self._files[name]["sha256"]

    def _give_up(self, why: str) -> None:
        raise SubspecError(
            f"offload=stream with device=cpu keeps a copy of the target's layers on disk: {why}; make room, or set "
            "SUBSPEC_CACHE to a folder on a larger disk"
        )


def parameter_bytes(tensor: Tensor) -> Content:
    """The bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def layer_digest(layer: Mapping[str, Tensor]) -> str:
    """SHA-256 of the parameters' bytes, which is that of the file they are kept in."""
    digest = hashlib.sha256()
    for tensor in layer.values():
        digest.update(parameter_bytes(tensor))
    return digest.hexdigest()
