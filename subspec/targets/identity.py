"""Digests of what a configuration's paths refer to, so that a resumed run can tell whether it still is the same.

A digest depends on contents alone: copying, moving or re-sharding a checkpoint does not change it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from subspec.targets.weight_files import TEXTS, open_weights, weight_files

WHOLE_BYTES = 128 * 2**20
"""Weights of up to this size are read whole (a quarter of a second); of larger ones a part of every tensor is."""

PIECES, PIECE_BYTES = 4, 4096
"""Number and size of the parts that are read of a tensor, evenly spaced from its first byte to its last."""


def folder_identity(folder: Path) -> str:
    """Hex SHA-256 of a model's folder: its weights and the files of ``TEXTS`` beside them; errors as of
    :func:`~subspec.targets.weight_files.open_weights`."""
    tensors = (
        (name, handle.get_tensor(name))
        for handle in (open_weights(folder / file) for file in weight_files(folder))
        for name in handle.keys()  # noqa: SIM118 (no mapping)
    )
    return identity(tensors, (file for pattern in TEXTS for file in folder.glob(pattern)))


def identity(tensors: Iterable[tuple[str, Tensor]], texts: Iterable[Path]) -> str:
    """Hex SHA-256 of named tensors on the CPU and of whole files, both in any order.

    Tensors of up to :data:`WHOLE_BYTES` in all are read whole, of larger sets :data:`PIECES` parts of every tensor.
    Mapped tensors are read from disk only where they are sampled.
    """
    digest = hashlib.sha256()
    named = sorted(tensors, key=lambda pair: pair[0])
    whole = sum(tensor.nbytes for _, tensor in named) <= WHOLE_BYTES
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        last = len(flat) - PIECE_BYTES
        if whole or last <= PIECES * PIECE_BYTES:
            digest.update(flat.data)
            continue
        for piece in range(PIECES):
            start = last * piece // (PIECES - 1)
            digest.update(flat[start : start + PIECE_BYTES].data)
    for file in sorted(set(texts)):
        if file.is_file():
            digest.update(f"{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
