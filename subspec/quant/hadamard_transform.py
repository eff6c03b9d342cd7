"""The rotation of a Linear's inputs at run time, by what is fastest on the device.

A CPU multiplies by two small matrices (:mod:`subspec.quant.hadamard`); a CUDA device runs one Triton kernel, which
also changes the signs, or ``fast_hadamard_transform`` where that is asked for.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from subspec.errors import ConfigError
from subspec.quant.hadamard import Rotation

Rotate = Callable[[Tensor, Rotation], Tensor]
"""Rotates rows of inputs: :func:`rotate` or another way to do the same."""

LIBRARY = "fast_hadamard_transform"


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate rows of inputs.

    Args:
        x: [rows, in_features], contiguous; bfloat16 on a CUDA device.

    Returns:
        bfloat16 [rows, padded] on a CUDA device; on a CPU the same, computed in float32.
    """
    if x.is_cuda:
        return rotate_triton(x, rotation)
    return rotation(x.float()).to(x.dtype)


def rotate_triton(x: Tensor, rotation: Rotation) -> Tensor:
    """:func:`rotate` by the Triton kernel, bfloat16; without a GPU in Triton's interpreter."""
    from subspec.kernels.lut_triton import rotate_inputs

    rows = x.shape[0]
    out = torch.empty(rows, rotation.padded, dtype=torch.bfloat16, device=x.device)
    first, second, third = radices(rotation.block)
    rotate_inputs[(rows, rotation.padded // rotation.block)](
        x,
        rotation.signs(x.device, torch.float32),
        out,
        rotation.in_features,
        rotation.padded,
        rotation.block**-0.5,
        BLOCK=rotation.block,
        FIRST=first,
        SECOND=second,
        THIRD=third,
        num_warps=4,
    )
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
        raise ConfigError(
            f"quant.hadamard=library cannot run here: {problem}; quant.hadamard=auto needs no library"
        )
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
    """Why ``fast_hadamard_transform`` cannot be used; None when it can."""
    if importlib.util.find_spec(LIBRARY) is None:
        return "fast_hadamard_transform is not installed (pip install fast-hadamard-transform, needs nvcc)"
    try:
        importlib.import_module(LIBRARY)
    except Exception as error:
        return f"fast_hadamard_transform cannot be imported: {str(error).splitlines()[0] if str(error) else error}"
    return None
