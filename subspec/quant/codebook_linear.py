"""Linear layers whose weights are looked up in a table of pairs (``quant=higgs``): several kernels, one result.

    y[row, n] = sum over groups of scale[n, group] * sum_k table[code[n, k]] * R(x)[row, k]

where R rotates the inputs. Like every Linear of a draft level (:mod:`subspec.quant.level_linear`) a call gives sums
[splits, rows, stride] that its reader adds up, or the activation of a fused gate/up pair. Kernels:

- ``reference``: dequantizes in every call; plain torch, any device.
- ``lut_triton``: bytes and scales row by row, in the quantizer's own packing (:mod:`subspec.kernels.lut_triton`).
- ``lut_mma``: CUDA, compiled at run time; words in the order of tensor-core fragments (:mod:`subspec.quant.codebook`).
- ``flute``: FLUTE's kernel, where that package is installed (:mod:`subspec.quant.flute`).

Example::

    codes = encode(weight, bits=4, dim=2, group_size=256, hadamard_size=512)
    linear = make_lut_linear(codes, Variant("lut_triton"))
    y = linear(x).sum(0)     # about functional.linear(x, weight)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from subspec.kernels.activation import apply_swiglu
from subspec.quant import codebook, flute
from subspec.quant.flute import FluteLut
from subspec.quant.hadamard_transform import Rotate, rotate
from subspec.quant.higgs_weight import CHUNK, HiggsCodes, pack_pairs, unpack_pairs
from subspec.quant.level_linear import LevelLinear, Variant

MAX_ROWS = 16
"""Rows of one launch of the Triton kernel: as many as the narrowest product takes anyway."""

BLOCKS_PER_PROCESSOR = 4
"""Blocks that a multiprocessor holds, so that one block's loads fly while another computes."""

MOST_SPLITS = 8


USUAL_TILES = 4
"""16-row tiles per block of ``lut_triton`` where a variant names none: 64 rows make the widest instructions."""


@dataclass(frozen=True)
class TritonSettings:
    """What ``lut_triton`` is compiled with besides its block's outputs.

    Attributes:
        inputs: per step, a power of two of at least 64 (fewer where groups are smaller).
        warps, stages: of Triton; the kernel itself loads codes one step ahead, so that stages add only x's.
        gather: look up through shared memory instead of the L1 cache.
    """

    inputs: int = 128
    warps: int = 4
    stages: int = 1
    gather: bool = False


USUAL_SETTINGS = TritonSettings()


def pair_table(codes: HiggsCodes) -> Tensor:
    """int32 [4 ** bits]: both weights of a pair as bfloat16, the first one in the low half."""
    halves = codes.grid.pairs().to(codes.pairs.device, torch.bfloat16).contiguous().view(torch.int16)
    return halves.view(torch.int32)[:, 0].contiguous()


class ReferenceLut(LevelLinear):
    """Plain torch on any device, in the arithmetic of its input; keeps the codes packed."""

    kind = "reference"

    def __init__(self, codes: HiggsCodes, *, swiglu: bool = False) -> None:
        self.swiglu = swiglu
        self.rotation, self.grid, self.group = codes.rotation, codes.grid, codes.group_size
        self.packed = pack_pairs(codes.pairs, codes.grid.bits)
        self.scale = codes.scale
        self.stride = codes.pairs.shape[0]
        self.nbytes = self.packed.numel() + 2 * self.scale.numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed, self.scale

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        self.packed, self.scale = tensors

    @property
    def codes(self) -> HiggsCodes:
        """What it was made from."""
        pairs = unpack_pairs(self.packed, self.grid.bits)
        return HiggsCodes(pairs, self.scale, self.grid, self.group, self.rotation)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.codes.rotated().to(x.dtype)
        y = functional.linear(self.rotation(x), weight)
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


class TritonLut(LevelLinear):
    """The Triton kernel; on a CPU (tests) it runs in Triton's interpreter."""

    kind = "lut_triton"

    def __init__(
        self,
        codes: HiggsCodes,
        variant: Variant,
        settings: TritonSettings = USUAL_SETTINGS,
        *,
        swiglu: bool = False,
        rotate: Rotate = rotate,
    ) -> None:
        # Imported here: Triton is not there on machines that only compose configurations or run on a CPU.
        from subspec.kernels import lut_triton

        self._kernels = lut_triton
        self.swiglu, self.settings, self._rotate = swiglu, settings, rotate
        self.outputs = 16 * (variant.tiles or USUAL_TILES)
        self.rotation, self.group, self.bits = codes.rotation, codes.group_size, codes.grid.bits
        self.packed = pack_pairs(codes.pairs, self.bits)
        self.scale = codes.scale.contiguous()
        self.table = pair_table(codes)
        self.stride = codes.pairs.shape[0]
        self.nbytes = self.packed.numel() + 2 * self.scale.numel()
        # A step lies in one group: groups are multiples of 64 but not always powers of two.
        self._step = min(settings.inputs, self.group & -self.group)
        self.splits = variant.splits or self._usual_splits()
        self.splits = max(1, min(self.splits, self.rotation.padded // self._step))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed, self.scale

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        self.packed, self.scale = tensors

    def _usual_splits(self) -> int:
        if not self.packed.is_cuda:
            return 1
        count = torch.cuda.get_device_properties(self.packed.device).multi_processor_count
        blocks = -(-self.stride // self.outputs)
        return min(MOST_SPLITS, math.ceil(BLOCKS_PER_PROCESSOR * count / blocks))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > MAX_ROWS:
            parts = [self(part) for part in x.split(MAX_ROWS)]
            return torch.cat(parts, dim=0 if self.swiglu else 1)
        n, inputs = self.stride, self.rotation.padded
        partial = torch.empty(self.splits, rows, n, dtype=torch.float32, device=x.device)
        steps = inputs // self._step
        cuda = x.is_cuda
        tl = self._kernels.tl
        self._kernels.lut_linear[(-(-n // self.outputs), self.splits)](
            self._rotate(x, self.rotation),
            self.packed,
            self.scale,
            self.table,
            partial,
            rows,
            n,
            inputs,
            self.scale.shape[1],
            -(-steps // self.splits) * self._step,
            BITS=self.bits,
            GROUP=self.group,
            N=self.outputs,
            K=self._step,
            M=MAX_ROWS,
            GATHER=self.settings.gather,
            OPERAND=tl.bfloat16 if cuda else tl.float32,  # the interpreter multiplies no bfloat16
            num_warps=self.settings.warps,
            num_stages=self.settings.stages,
        )
        return self._activation(partial) if self.swiglu else partial

    def _activation(self, partial: Tensor) -> Tensor:
        splits, rows, n = partial.shape
        out = torch.empty(rows, n // 2, dtype=torch.bfloat16, device=partial.device)
        block = 512
        self._kernels.swiglu_sums[(rows, -(-n // 2 // block))](
            partial, out, rows, n // 2, SPLITS=splits, BLOCK=block, num_warps=4
        )
        return out


class MmaLut(LevelLinear):
    """Our CUDA tensor-core kernel (:mod:`subspec.quant.codebook`); on a CPU (tests) its reference stands in."""

    kind = "lut_mma"

    def __init__(
        self, codes: HiggsCodes, variant: Variant, *, swiglu: bool = False, rotate: Rotate = rotate
    ) -> None:
        self.rotation, self.grid, self._rotate = codes.rotation, codes.grid, rotate
        self.weight = codebook.pack(codes, pair_table(codes), tiles=variant.tiles or 2, swiglu=swiglu)
        if self.weight.words.is_cuda and not swiglu:  # the activation needs whole sums
            device = self.weight.words.device
            count = torch.cuda.get_device_properties(device).multi_processor_count
            self.splits = variant.splits or codebook.splits_for(self.weight, count)
        self.stride = self.weight.padded
        self.nbytes = self.weight.nbytes

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight.words, self.weight.scale

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        words, scale = tensors
        self.weight = replace(self.weight, words=words, scale=scale)

    @property
    def codes(self) -> HiggsCodes:
        """What it was made from."""
        pairs, scale = codebook.unpack_codes(self.weight)
        return HiggsCodes(pairs, scale, self.grid, self.rotation.padded // scale.shape[1], self.rotation)

    def __call__(self, x: Tensor) -> Tensor:
        rows, swiglu = x.shape[0], self.weight.swiglu
        if not x.is_cuda:
            y = codebook.reference(self.weight, self._rotate(x, self.rotation))
            y = functional.pad(y, (0, (self.stride // 2 if swiglu else self.stride) - y.shape[1]))
            return y.to(torch.bfloat16) if swiglu else y.unsqueeze(0)
        if rows > codebook.MAX_ROWS:
            parts = [self(part) for part in x.split(codebook.MAX_ROWS)]
            return torch.cat(parts, dim=0 if swiglu else 1)
        if swiglu:
            out = torch.empty(rows, self.stride // 2, dtype=torch.bfloat16, device=x.device)
        else:
            out = torch.empty(self.splits, rows, self.stride, dtype=torch.float32, device=x.device)
        codebook.linear(self.weight, self._rotate(x, self.rotation), out, splits=self.splits)
        return out


LUT_KERNELS = (MmaLut.kind, TritonLut.kind, ReferenceLut.kind)
"""What can compute a Linear of ``quant=higgs`` and is ours, the fastest first; ``flute`` has to be asked for."""


def make_lut_linear(
    codes: HiggsCodes,
    variant: Variant,
    *,
    swiglu: bool = False,
    settings: TritonSettings = USUAL_SETTINGS,
    rotate: Rotate = rotate,
) -> LevelLinear:
    """A Linear of ``quant=higgs``.

    Args:
        variant: one of :data:`LUT_KERNELS`, its tiles of 16 outputs per block and its splits (0: usual ones).
        swiglu: the rows are gate and up interleaved 16 by 16, and the result is their activation.
        settings: of the Triton kernel.
        rotate: what rotates the inputs (the reference always does it in torch).

    Raises:
        ValueError: there is no such kernel, or rows of gate and up are not whole tiles.
    """
    if swiglu and codes.pairs.shape[0] % 32:
        raise ValueError(f"{codes.pairs.shape[0]} interleaved rows are not a multiple of 32")
    if variant.kernel == ReferenceLut.kind:
        return ReferenceLut(codes, swiglu=swiglu)
    if variant.kernel == TritonLut.kind:
        return TritonLut(codes, variant, settings, swiglu=swiglu, rotate=rotate)
    if variant.kernel == MmaLut.kind:
        return MmaLut(codes, variant, swiglu=swiglu, rotate=rotate)
    if variant.kernel == FluteLut.kind:
        return FluteLut(codes, swiglu=swiglu, rotate=rotate)
    raise ValueError(f"no look-up kernel {variant.kernel!r}: use {', '.join((*LUT_KERNELS, FluteLut.kind))}")


def unavailable(kernel: str, device: torch.device) -> str | None:
    """Why ``kernel`` cannot run on ``device``, in a few words; None when it can."""
    if kernel == ReferenceLut.kind:
        return None
    if device.type != "cuda":
        return "no CUDA device"
    if kernel == MmaLut.kind:
        return codebook.unavailable()
    if kernel == FluteLut.kind:
        return flute.unavailable()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    return None


assert CHUNK == codebook.STEP, "both packings work in steps of 64 inputs"
