"""Small integers without gaps: 8, 4, 3 or 2 bits each, in bytes.

Two, four or eight neighbours share a byte, the first one in its lowest bits. Three bits do not divide a byte: they
are kept as two planes beside each other, first the two low bits of every integer, then the high one.
"""

import torch
from torch import Tensor

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""Widths of the planes, the lowest bits first."""


def packed_columns(k: int, bits: int) -> int:
    """Bytes of ``k`` integers."""
    return sum(k * width // 8 for width in PLANES[bits])


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 [n, k], k a multiple of 8 -> uint8 [n, packed_columns(k)].

    Raises:
        ValueError: k is no multiple of 8.
    """
    if q.shape[1] % 8:
        raise ValueError(f"{q.shape[1]} integers in a row are no multiple of 8")
    planes, below = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        plane = (q >> below) & ((1 << width) - 1)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=q.device)
        # Disjoint bits, so that adding them up is OR-ing them.
        planes.append((plane.unflatten(1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8))
        below += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    k = packed.shape[1] * 8 // bits
    parts = packed.split([k * width // 8 for width in PLANES[bits]], dim=1)
    q, below = None, 0
    for part, width in zip(parts, PLANES[bits], strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = ((part.unsqueeze(-1) >> shifts) & ((1 << width) - 1)).flatten(1)
        q = plane if q is None else q | plane << below
        below += width
    assert q is not None
    return q
