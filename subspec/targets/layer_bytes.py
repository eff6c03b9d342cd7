"""Layouts of a decoder layer as one flat run of bytes: for the link, and for the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from subspec.utils.rounding import round_up

NEIGHBOURS = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)
"""Groups of parameters that are contiguous in a :func:`flat_layer`, in this order."""


class LayerCodec(Protocol):
    """The format of a streamed layer: bytes over the link, and scratch memory to restore it."""

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Bytes of one layer in pinned memory, over the link and in a ring slot."""

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Device bytes that restoring fills beside the slot."""


@dataclass(frozen=True)
class PlainCodec:
    """Plain weights of ``itemsize`` bytes each: parameters are views into the slot, nothing is restored."""

    itemsize: int = 2
    ALIGNMENT = 256

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Every parameter in turn, each at a multiple of 256 bytes (kernels use vector loads)."""
        return sum(round_up(math.prod(shape) * self.itemsize, self.ALIGNMENT) for shape in shapes.values())

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        return 0


def parameter_views(flat: Tensor, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each parameter as a view into ``flat`` (uint8), every one at a multiple of 256 bytes.

    The layout that :class:`PlainCodec` counts. Host buffers and ring slots both use it, so one copy moves a layer.
    """
    views, offset = {}, 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        views[name] = flat[offset : offset + size].view(dtype).view(shape)
        offset += round_up(size, PlainCodec.ALIGNMENT)
    return views


def write_layer(flat: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Copy a layer's parameters into its flat buffer."""
    for name, view in parameter_views(flat, {name: one.shape for name, one in tensors.items()}, dtype).items():
        view.copy_(tensors[name])


def flat_bytes(shapes: Mapping[str, torch.Size], itemsize: int) -> int:
    """Bytes of a :func:`flat_layer`."""
    return sum(
        round_up(sum(math.prod(shapes[name]) for name in group) * itemsize, PlainCodec.ALIGNMENT)
        for group in _groups(shapes)
    )


def flat_layer(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A copy of a layer's parameters in one allocation on ``device``.

    Groups of :data:`NEIGHBOURS` are contiguous; everything else begins at a multiple of 256 bytes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flat = torch.empty(flat_bytes(shapes, dtype.itemsize), dtype=torch.uint8, device=device)
    views, end = {}, 0
    for group in _groups(shapes):
        for name in group:
            start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            views[name] = flat[start:end].view(dtype).view(shapes[name])
            views[name].copy_(tensors[name])
        end = round_up(end, PlainCodec.ALIGNMENT)
    return {name: views[name] for name in shapes}


def _groups(shapes: Mapping[str, torch.Size]) -> list[tuple[str, ...]]:
    """Names of each contiguous group, in the order of their first members."""
    group_of = {name: group for group in NEIGHBOURS for name in group}
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in shapes)
    return [tuple(name for name in group if name in shapes) for group in groups]
