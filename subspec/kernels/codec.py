"""Exact weights from their code and the packed substitute on the device: the CUDA decoder's launch.

The substitute is read where the draft's kernels have it, in their order; so only kernels of ours whose order is known
here can serve (:data:`KERNELS`). HIGGS takes two launches: one dequantizes the weight and rotates it back, into the
place of the exact one, the other decodes there. On a CPU the torch decoder stands in.
"""

import functools
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from subspec.kernels import int4, wq
from subspec.kernels.lut import MmaLut
from subspec.kernels.ops import LevelLinear, MmaInt4, TritonWq
from subspec.offload.codec import CHUNK, Coded, decode
from subspec.offload.intervals import reach_factor
from subspec.quant.codes import Codes, QuantizedWeight
from subspec.quant.hadamard import LEAST_BLOCK

KERNELS = (MmaInt4.kind, TritonWq.kind, MmaLut.kind)
"""Kernels of the draft whose packed weights the decoder reads."""

THREADS = 128

DEQUANTIZED_ROWS = 8
"""That a block of threads dequantizes."""


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


def substitute_codes(linear: LevelLinear, rows: Rows, count: int) -> QuantizedWeight:
    """A Linear's own codes, from the packed weight of the fused one.

    Raises:
        TypeError: the kernel's order is not known here.
    """
    if isinstance(linear, MmaLut):
        codes = linear.codes
        pairs, scale = (rows.select(part, count).contiguous() for part in (codes.pairs, codes.scale))
        return replace(codes, pairs=pairs, scale=scale)
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
    elif isinstance(linear, MmaLut):
        dequantize_into(out, linear, rows)
        packed, steps = linear.weight, linear.rotation.block // LEAST_BLOCK
        groups = packed.scale.shape[1]
        place = [
            columns,
            groups,
            packed.tiles,
            packed.steps // groups,
            steps,
            rows.first,
            int(rows.interleaved),
        ]
        unit = reach_factor(coded.margin, linear.rotation.block)
        _kernel(3, device)(**launch, args=[*stream, packed.scale, out, out.numel(), *place, unit])
    else:
        raise TypeError(f"the decoder does not know the order of {linear.kind}'s weights")


def dequantize_into(out: Tensor, linear: MmaLut, rows: Rows) -> None:
    """Write a Linear's dequantized weight, rotated back, on a CUDA device (``lut_dequantize.cu``).

    Its bits are those of :func:`subspec.offload.intervals.rebuild`.

    Args:
        out: bfloat16 [n, k], contiguous, 16-byte aligned.
        rows: which of the fused Linear's rows are its own.
    """
    count, columns = out.shape
    packed, rotation = linear.weight, linear.rotation
    steps = rotation.block // LEAST_BLOCK
    kernel = _dequantize_kernel(packed.bits, steps, out.device.index or 0)
    group_steps = packed.steps // packed.scale.shape[1]
    place = [columns, packed.steps, packed.tiles, group_steps, rows.first, int(rows.interleaved)]
    signs = rotation.signs(out.device, torch.float32)
    kernel(
        grid=(-(-count // DEQUANTIZED_ROWS), packed.steps // steps, 1),
        block=(32 * steps, 1, 1),
        args=[packed.words, packed.scale, packed.table, signs, out, count, *place, rotation.block**-0.5],
    )


@functools.cache
def _kernel(layout: int, device: int) -> Any:
    return _compiled(_source("codec.cu"), {"LAYOUT": layout}, "codec_decode", device)


@functools.cache
def _dequantize_kernel(bits: int, steps: int, device: int) -> Any:
    settings = {"LAYOUT": 0, "BITS": bits, "STEPS": steps}
    return _compiled(_source("codec.cu") + _source("lut_dequantize.cu"), settings, "lut_dequantize", device)


def _source(name: str) -> str:
    return resources.files("subspec.kernels").joinpath(name).read_text(encoding="utf-8")


def _compiled(source: str, settings: dict[str, int], name: str, device: int) -> Any:
    header = "".join(f"#define {key} {value}\n" for key, value in settings.items())
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(header + source, name)
