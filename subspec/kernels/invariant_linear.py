"""Linear layers whose rows have the same bits in any company: launches, split points and tile shapes.

The order of a row's sum is fixed by the matrix alone: :func:`split_k` cuts its inputs into parts, each part is summed
in steps of the tensor core's own 16 inputs, the parts are added in order. The tile shape changes no bit (a GPU test
compares all candidates), so :mod:`subspec.kernels.choose_tiling` may take the one that it measures to be the fastest.
One shape serves every number of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.kernels.modules import triton_kernels
from subspec.utils.rounding import round_up

K_STEP = 128
"""Parts of a sum begin at multiples of this: no tile is deeper."""

LEAST_PART = 512
"""Inputs of a part at least: shorter ones cost more to add up than they gain."""

PROGRAMS = 96
"""Tiles of one row that a launch should have at least, so that most multiprocessors of a card read weights."""

MOST_PARTS = 4
"""Partial sums are float32, of all rows: more of them take memory and time when there are many rows."""


@dataclass(frozen=True)
class Tiling:
    """Shape of a program: rows, columns and inputs of a step, its warps, and steps whose loads are on their way."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} warps {self.warps} stages {self.stages}"


CANDIDATES = (
    Tiling(128, 128, 64, 8, 4),
    Tiling(128, 128, 64, 8, 3),
    Tiling(64, 128, 64, 4, 4),
    Tiling(64, 128, 128, 4, 3),
    Tiling(64, 128, 64, 4, 3),
    Tiling(64, 64, 128, 4, 3),
    Tiling(128, 256, 64, 8, 3),
)
"""All of them take the same tensor-core instruction on a card: at least 64 rows and 4 warps."""

REFERENCE = Tiling(32, 32, 32, 1, 1)
"""For Triton's interpreter."""


@dataclass(frozen=True)
class KSplit:
    """Slices of a matrix's inputs: ``parts`` of ``size`` inputs each, the last one with the remainder."""

    parts: int
    size: int


def split_k(n: int, k: int) -> KSplit:
    """The cut of a matrix [n, k], from its shape alone: no card and no number of rows may change the order of a sum."""
    parts = 1
    while parts < MOST_PARTS and -(-n // 128) * parts < PROGRAMS and k >= 2 * parts * LEAST_PART:
        parts *= 2
    size = round_up(-(-k // parts), K_STEP)
    return KSplit(-(-k // size), size)


def multiply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out: Tensor,
    tiling: Tiling,
    outputs: int | None = None,
) -> None:
    """x @ concatenation(weights).T + biases.

    Args:
        x: [rows, k].
        weights, biases: of one to three matrices [n_i, k] of one dtype; all or no biases.
        out: [rows, sum of n_i] in the dtype of ``x``: the result; its rows may be strided. Or float32
            [parts, rows, sum of n_i], a slice in any way: the parts of :func:`split_k`, whose sum it is.
        outputs: of the matrix of which these are some rows; None: all.
    """
    invariant = triton_kernels("invariant", x.device)
    rows, k = x.shape
    partial = out.dim() == 3
    sizes = [weight.shape[0] for weight in weights] + [0] * (3 - len(weights))
    split = split_k(outputs or sum(sizes), k) if partial else KSplit(1, round_up(k, K_STEP))
    if partial and out.shape[0] != split.parts:
        raise ValueError(f"{out.shape[0]} parts, but the matrix is cut into {split.parts}")
    has_bias = biases[0] is not None
    w = [*weights, *[weights[0]] * (3 - len(weights))]
    b = [*biases, *[biases[0]] * (3 - len(biases))] if has_bias else w
    columns = sum(-(-size // tiling.n) for size in sizes)
    x = aligned(x)
    invariant.linear[(-(-rows // tiling.m) * columns, split.parts)](
        x, *w, *b, out, rows, k, split.size, *sizes, x.stride(0), out.stride(-2), out.stride(0),
        HAS_BIAS=has_bias,
        PARTIAL=partial,
        EVEN_K=k % tiling.k == 0,
        OPERAND=operand(x),
        BLOCK_M=tiling.m,
        BLOCK_N=tiling.n,
        BLOCK_K=tiling.k,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """``x``, copied where it does not begin at a multiple of 16 bytes, so that one compiled kernel reads all inputs."""
    return x.clone() if x.data_ptr() % 16 else x


def operand(x: Tensor) -> object:
    """Type of the factors of a product: that of ``x`` on a GPU; Triton's interpreter multiplies float32 only."""
    if x.is_meta:
        return None
    from triton import language as tl

    if x.device.type != "cuda":
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[x.dtype]
