"""A number that stands for all bits of a row of logits."""

import torch
from torch import Tensor

PIECE_ROWS = 8
"""Rows at a time: 64-bit copies of a whole tree's logits would take gigabytes."""


def digest_rows(logits: Tensor) -> Tensor:
    """int64 [n] of logits [n, vocabulary]: a weighted sum of the bits modulo 2**64.

    Rows of equal bits have equal digests; others differ but for a chance of about 2**-63. Integer sums have no order,
    so the digest of a row does not depend on the rows beside it.
    """
    bits = logits.view({2: torch.int16, 4: torch.int32}[logits.element_size()])
    column = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    weight = column * 0x1E3779B97F4A7C15
    weight = (weight ^ (weight >> 29)) * 0x3F58476D1CE4E5B9
    weight = weight ^ (weight >> 32) | 1
    return torch.cat([(piece.to(torch.int64) * weight).sum(dim=1) for piece in bits.split(PIECE_ROWS)])
