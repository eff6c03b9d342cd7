"""Exact weights from their code and the packed substitute on the device: the CUDA decoder's launch.

The substitute is read where the draft's kernels have it, in their order; so only kernels of ours whose order is known
here can serve (:data:`KERNELS`). On a CPU the torch decoder stands in.
"""

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import int4, wq
from subspec.kernels.ops import LevelLinear, MmaInt4, TritonWq
from subspec.offload.codec import CHUNK, Coded, decode
from subspec.quant.codes import Codes

KERNELS = (MmaInt4.kind, TritonWq.kind)
"""Kernels of the draft whose packed weights the decoder reads."""

THREADS = 128


@dataclass(frozen=True)
class Rows:
    """Which rows of a fused Linear are a Linear's own.

    Attributes:
        first: the first of them.
        interleaved: they alternate 16 by 16 with another Linear's (gate and up).
    """

    first: int
    interleaved: bool

    def select(self, fused: Tensor, count: int) -> Tensor:
        """Rows [count, ...] of ``fused`` [n, ...]."""
        if not self.interleaved:
            return fused[self.first : self.first + count]
        return fused.unflatten(0, (-1, 2, 16))[:, self.first // 16].flatten(0, 1)[:count]


def substitute_codes(linear: LevelLinear, rows: Rows, count: int) -> Codes:
    """A Linear's own codes, from the packed weight of the fused one.

    Raises:
        TypeError: the kernel's order is not known here.
    """
    if isinstance(linear, MmaInt4):
        q, scale, zero = int4.unpack_codes(linear.weight)
        group, bits = int4.GROUP, 4
    elif isinstance(linear, TritonWq):
        q, scale, zero = wq.unpack_codes(linear.weight)
        group, bits = linear.weight.group, linear.weight.bits
    else:
        raise TypeError(f"the decoder does not know the order of {linear.kind}'s weights")
    q, scale, zero = (rows.select(part, count).contiguous() for part in (q, scale, zero))
    return Codes(q, scale, zero, group, bits)


def decode_into(out: Tensor, coded: Coded, linear: LevelLinear, rows: Rows) -> None:
    """Write an exact weight.

    Args:
        out: bfloat16 [n, k], contiguous, 16-byte aligned.
        coded: of the weight; on the device of ``out``.
        linear: the substitute's fused Linear.
        rows: which of its rows belong to this weight.
    """
    count, columns = coded.shape
    if not out.is_cuda:
        out.copy_(decode(coded, substitute_codes(linear, rows, count)))
        return
    half = 0.5 + coded.margin
    chunks = -(-out.numel() // CHUNK)
    launch: dict[str, Any] = {"grid": (-(-chunks // THREADS), 1, 1), "block": (THREADS, 1, 1)}
    device = out.device.index or 0
    stream = [coded.starts, coded.stream]
    if isinstance(linear, MmaInt4):
        packed = linear.weight
        place = [columns // int4.GROUP, packed.tiles, rows.first, int(rows.interleaved), half]
        _kernel(1, device)(**launch, args=[*stream, packed.words, packed.meta, out, out.numel(), *place])
    elif isinstance(linear, TritonWq):
        weight = linear.weight
        shape = [
            columns,
            weight.out_features,
            weight.bits,
            weight.group,
            rows.first,
            int(rows.interleaved),
            half,
        ]
        source = [weight.words, weight.high, weight.meta]
        _kernel(2, device)(**launch, args=[*stream, *source, out, out.numel(), *shape])
    else:
        raise TypeError(f"the decoder does not know the order of {linear.kind}'s weights")


@functools.cache
def _kernel(layout: int, device: int) -> Any:
    source = resources.files("subspec.kernels").joinpath("codec.cu").read_text(encoding="utf-8")
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(f"#define LAYOUT {layout}\n{source}", "codec_decode")
