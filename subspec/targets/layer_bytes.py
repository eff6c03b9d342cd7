"""A decoder layer as one flat run of bytes: what crosses the link, and how parameters are read out of it."""

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
"""Parameters that lie next to each other, in this order."""


class LayerCodec(Protocol):
    """How a streamed layer looks on its way: *bytes plus a decode step*."""

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Bytes of one layer in pinned memory, over the link and in a ring slot."""

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Device bytes that the decode step fills beside the slot."""


@dataclass(frozen=True)
class PlainCodec:
    """The weights as they are, ``itemsize`` bytes each: parameters are views into the slot, nothing is decoded."""

    itemsize: int = 2
    ALIGNMENT = 256

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Every parameter in turn, each at a multiple of 256 bytes (what kernels with vector loads want)."""
        return sum(round_up(math.prod(shape) * self.itemsize, self.ALIGNMENT) for shape in shapes.values())

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """None."""
        return 0


def parameter_views(flat: Tensor, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each parameter as a view into ``flat`` (uint8), every one at a multiple of 256 bytes.

    The same layout :class:`~PlainCodec` counts; host buffers and ring slots both use it, so
    one copy moves a whole layer.
    """
    views, offset = {}, 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        views[name] = flat[offset : offset + size].view(dtype).view(shape)
        offset += round_up(size, PlainCodec.ALIGNMENT)
    return views


def write_layer(flat: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Copy a layer's parameters into its flat buffer."""
    views = parameter_views(flat, {name: tensor.shape for name, tensor in tensors.items()}, dtype)
    for name, tensor in tensors.items():
        views[name].copy_(tensor)


def flat_bytes(shapes: Mapping[str, torch.Size], itemsize: int) -> int:
    """Bytes of a layer laid out by :func:`flat_views`."""
    return sum(
        round_up(sum(math.prod(shapes[name]) for name in group) * itemsize, PlainCodec.ALIGNMENT)
        for group in _groups(shapes)
    )


def flat_views(flat: Tensor, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of a layer as a view into ``flat`` (uint8 of :func:`flat_bytes`), in the order of ``shapes``.

    Neighbours touch; everything else begins at a multiple of 256 bytes.
    """
    views, offset = {}, 0
    for group in _groups(shapes):
        start = offset
        for name in group:
            size = math.prod(shapes[name]) * dtype.itemsize
            views[name] = flat[start : start + size].view(dtype).view(shapes[name])
            start += size
        offset += round_up(start - offset, PlainCodec.ALIGNMENT)
    return {name: views[name] for name in shapes}


def flat_layer(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A copy of a layer's parameters in one allocation on ``device``, laid out by :func:`flat_views`."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flat = torch.empty(flat_bytes(shapes, dtype.itemsize), dtype=torch.uint8, device=device)
    views = flat_views(flat, shapes, dtype)
    for name, tensor in tensors.items():
        views[name].copy_(tensor)
    return views


def _groups(shapes: Mapping[str, torch.Size]) -> list[tuple[str, ...]]:
    """Names that lie together, in the order of the first of each."""
    group_of = {name: group for group in NEIGHBOURS for name in group}
    groups = dict.fromkeys(group_of.get(name, (name,)) for name in shapes)
    return [tuple(name for name in group if name in shapes) for group in groups]
