"""A scale and a zero in 16 bits: of a group of 64 inputs of an integer weight in the kernel's order.

The 16 bits are a float16, the scale. Its lowest six bits are a number of steps, too, the zero, so a scale has four bits
of mantissa to choose. A step is a quarter of an integer. 8 bits are two planes of nibbles with the same zero,
``z = z' + 16 z'``, which makes it 17 quarters.
"""

import torch
from torch import Tensor

ZERO_BITS = 6
_ZERO = (1 << ZERO_BITS) - 1
_LEAST, _MOST = 0x0400, 0x6BC0
"""Bits of 2**-14 and of 3968: with any zero normal numbers, 16 times which are finite."""


def zero_step(bits: int) -> float:
    """Integers of ``bits`` bits per step of a zero."""
    return 4.25 if bits == 8 else 0.25


def zeros_in(scale: Tensor, bits: int) -> Tensor:
    """The zeros that scales (floating, exact in float16) contain: float32, the same shape."""
    return (scale.half().view(torch.int16) & _ZERO).float() * zero_step(bits)


def nearest_zero(zero: Tensor, bits: int) -> Tensor:
    """The nearest zeros that a scale can contain: float32, the same shape."""
    return _steps(zero, bits).float() * zero_step(bits)


def containing(scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest scales, not smaller, that contain these zeros (:func:`nearest_zero`): float32, the same shape."""
    steps, scale = _steps(zero, bits), scale.float().clamp(2.0**-24, 65504.0)
    half = scale.half()
    above = half.view(torch.int16).int() + (half.float() < scale) - steps
    return (((above + _ZERO) & ~_ZERO).clamp_(_LEAST, _MOST) + steps).to(torch.int16).view(torch.float16).float()


def _steps(zero: Tensor, bits: int) -> Tensor:
    return (zero / zero_step(bits)).round().clamp_(0, _ZERO).int()
