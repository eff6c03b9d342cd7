"""Randomized Hadamard rotation of blocks of inputs (HIGGS, arXiv 2411.17525, section 4; QuIP#, arXiv 2402.04396).

A rotation spreads outliers over a block: rotated weights are close to Gaussian, whatever they were, and one grid fits
them all. With R the rotation, ``W x = (W R^T)(R x)``: the weights are rotated once, the inputs at run time, and the
result is that of the unrotated layer up to rounding.

**Which blocks.** A Hadamard matrix of this kind has a power of two of rows. Blocks are the largest power of two that
divides the inputs, at most ``hadamard_size`` (3584 and 18944 are multiples of 512, 576 of 64). Where that would be
less than ``LEAST_BLOCK`` inputs, the inputs are padded with zeros to a multiple of it; the padding is stored and paid
for like any other weight.

Example::

    rotation = Rotation.of(in_features=3584, hadamard_size=512, seed=0)
    y = functional.linear(rotation(x), rotation(weight))     # == functional.linear(x, weight), up to rounding
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subspec.config.quant_checks import LEAST_BLOCK
from subspec.errors import ConfigError
from subspec.kernels.modules import triton_kernels
from subspec.quant.optional_package import import_problem
from subspec.utils.rounding import is_power_of_two, round_up

LIBRARY = "fast_hadamard_transform"


@functools.cache
def hadamard_matrix(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester's matrix scaled to be orthonormal, [size, size]; symmetric, so it is its own inverse."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device, dtype)


def walsh_hadamard(x: Tensor, size: int) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of every ``size`` neighbours along the last dimension.

    Its own inverse. A transform of a*b values is one of a and one of b over the two axes of a table, so that two
    small matrix products do what would take log2(size) passes over memory.

    Args:
        x: floating [..., multiple of size].
        size: a power of two.

    Raises:
        ValueError: ``size`` is no power of two or does not divide the last dimension.
    """
    if not is_power_of_two(size) or x.shape[-1] % size:
        raise ValueError(f"no Hadamard blocks of {size} in {x.shape[-1]} values: use a power of two that divides it")
    inner = 1 << (size.bit_length() // 2)
    outer = size // inner
    table = x.reshape(-1, outer, inner) @ hadamard_matrix(inner, x.device, x.dtype)
    return (hadamard_matrix(outer, x.device, x.dtype) @ table).reshape(x.shape)


def butterfly(x: Tensor, size: int) -> Tensor:
    """:func:`walsh_hadamard` without its factor, by additions alone, in one order everywhere.

    Every value is a sum or a difference, rounded once, of two of the pass before, over distances 1, 2, 4 .. size / 2.
    Passes in this order give the same bits everywhere, which matrix products do not promise.

    Args:
        x: float32 [..., multiple of size].
        size: a power of two.
    """
    distance = 1
    while distance < size:
        first, second = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        distance *= 2
    return x


@dataclass(frozen=True)
class Rotation:
    """A fixed random rotation of the inputs of a Linear.

    Attributes:
        padded: inputs with the zeros behind them; ``in_features`` unless that has too small a power of two.
        block: inputs that are rotated together.
        seed: of the signs.
    """

    in_features: int
    padded: int
    block: int
    seed: int

    @classmethod
    def of(cls, in_features: int, hadamard_size: int, seed: int = 0) -> "Rotation":
        """By the rule at the head of this module; ``hadamard_size`` a power of two, at least ``LEAST_BLOCK``."""
        padded = in_features
        if in_features % LEAST_BLOCK:
            padded = round_up(in_features, LEAST_BLOCK)
        return cls(in_features, padded, min(padded & -padded, hadamard_size), seed)

    def signs(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """+1 or -1 for every padded input, [padded]; the same for all Linears with as many inputs."""
        return _signs(self.padded, self.seed, device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the last dimension, [..., in_features] to [..., padded], in the arithmetic of ``x``."""
        if self.padded > self.in_features:
            x = functional.pad(x, (0, self.padded - self.in_features))
        return walsh_hadamard(x * self.signs(x.device, x.dtype), self.block)

    def inverse(self, y: Tensor) -> Tensor:
        """[..., padded] back to [..., in_features]."""
        x = walsh_hadamard(y, self.block) * self.signs(y.device, y.dtype)
        return x[..., : self.in_features]

    def inverse_in_order(self, y: Tensor) -> Tensor:
        """:meth:`inverse` of float32 whose every bit follows from the input's, on any device: see :func:`butterfly`."""
        x = butterfly(y, self.block) * self.block**-0.5 * self.signs(y.device, torch.float32)
        return x[..., : self.in_features]


@functools.cache
def _signs(count: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (count,), generator=generator) * 2 - 1).to(device, dtype)


Rotate = Callable[[Tensor, Rotation], Tensor]
"""Rotates rows of inputs: :func:`rotate` or an equivalent."""


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate rows of inputs, contiguous [rows, in_features], to [rows, padded] of their dtype.

    That is bfloat16 on a CUDA device; a CPU computes in float32.
    """
    if x.device.type == "cpu":
        return rotation(x.float()).to(x.dtype)
    return rotate_triton(x, rotation)


def rotate_triton(x: Tensor, rotation: Rotation) -> Tensor:
    """:func:`rotate` by the Triton kernel, bfloat16; without a GPU in Triton's interpreter."""
    rotate_inputs = triton_kernels("rotate", x.device).rotate_inputs
    rows = x.shape[0]
    out = torch.empty(rows, rotation.padded, dtype=torch.bfloat16, device=x.device)
    first, second, third = radices(rotation.block)
    signs, factor = rotation.signs(x.device, torch.float32), rotation.block**-0.5
    rotate_inputs[(rows, rotation.padded // rotation.block)](
        x, signs, out, rotation.in_features, rotation.padded, factor,
        BLOCK=rotation.block, FIRST=first, SECOND=second, THIRD=third, num_warps=4,
    )  # fmt: skip
    return out


def rotate_by(name: str, device: torch.device) -> Rotate:
    """``auto``: :func:`rotate`; ``library``: :func:`rotate_library`.

    Raises:
        ConfigError: the library cannot be used here.
    """
    if name != "library":
        return rotate
    problem = "no CUDA device" if device.type != "cuda" else library_problem()
    if problem is not None:
        raise ConfigError(f"quant.hadamard=library cannot run here: {problem}; quant.hadamard=auto needs no library")
    return rotate_library


def radices(block: int) -> tuple[int, int, int]:
    """Three powers of two with the product ``block``, as equal as can be."""
    bits = block.bit_length() - 1
    first, second = bits // 3, (bits + 1) // 3
    return 1 << first, 1 << second, 1 << (bits - first - second)


def rotate_library(x: Tensor, rotation: Rotation) -> Tensor:
    """:func:`rotate` by ``fast_hadamard_transform``, in the dtype of ``x``; see :func:`library_problem`."""
    library: Any = importlib.import_module(LIBRARY)
    if rotation.padded > rotation.in_features:
        x = functional.pad(x, (0, rotation.padded - rotation.in_features))
    blocks = (x * rotation.signs(x.device, x.dtype)).view(x.shape[0], -1, rotation.block)
    return library.hadamard_transform(blocks, rotation.block**-0.5).view(x.shape)


def library_problem() -> str | None:
    """Why ``fast_hadamard_transform`` cannot be used; None if it can."""
    return import_problem(LIBRARY, "pip install fast-hadamard-transform, needs nvcc", LIBRARY)
