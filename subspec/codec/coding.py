"""Whether a streamed target is coded by its substitute, and how many bytes that will take, before anything is coded."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from subspec.codec.coded_head import slice_rows
from subspec.codec.restore import KERNELS
from subspec.config.enums import Codec, Dtype, Kernel
from subspec.config.schema import (
    Config,
    HiggsConfig,
    HqqConfig,
    NoDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, is_kept
from subspec.levels.quantization import LevelQuantization
from subspec.quant.affine_format import AffineFormat, Format, describe
from subspec.quant.base import HEAD, MODULE_CLASSES, linear_names
from subspec.quant.codebook_format import LutFormat
from subspec.quant.grids import load_grid
from subspec.targets.layer_bytes import PlainCodec

BITS = {2: 9.55, 3: 8.25, 4: 7.1, 8: 3.7}
"""Bits per exact weight to reserve by the bits of its substitute, in groups of 64: measured (``experiments/codec``) on
Gaussian weights and on the default model 9.2 to 9.4, 8.0 to 8.1, 7.0 and 3.4 to 3.5."""

BITS_PER_DOUBLING = 0.16
"""More for every doubling of the group: scales follow the largest weight of more."""

LOOKUP_BITS = 11.0
"""Bits per exact weight to reserve for HIGGS beyond the binary logarithm of its grid's error: 7.5, 8.5 and 9.4 at 4, 3
and 2 bits. Measured (``experiments/codec``) 10.8 to 10.9 on Gaussian weights and 10.9 to 11.0 on the default model,
whatever the groups, for the error is Gaussian and grows with the scale."""


HEAD_BITS = 0.3
"""More for an LM head: rows of rare tokens are coded worse. On the default model's table, at 4 bits from 7.07 for its
first 4096 rows to 7.35 for its last ones, 7.26 on average; 3.7, 8.3 and 9.5 beside 8, 3 and 2 bits."""


def codec_of(config: Config) -> Codec:
    """``none`` or ``substitute``: what ``offload.codec`` comes to in this configuration.

    ``auto`` codes where the substitute is on the device anyway and its kernels are ours.

    Raises:
        ConfigError: ``substitute`` was asked for and cannot be.
    """
    offload = config.offload
    if not isinstance(offload, StreamOffloadConfig) or offload.codec is Codec.none:
        return Codec.none
    if offload.codec is Codec.auto and isinstance(config.draft, NoDraftConfig):
        return Codec.none
    problem = _problem(config)
    if problem and offload.codec is Codec.substitute:
        raise ConfigError(f"offload.codec=substitute {problem}, or offload.codec=none")
    return Codec.none if problem else Codec.substitute


def _problem(config: Config) -> str | None:
    draft, quant = config.draft, config.quant
    if not isinstance(draft, SubstituteDraftConfig | NoDraftConfig):
        return f"needs the quantized target on the device, and draft={draft.name} has none there: set draft=subspec"
    if not isinstance(quant, HqqConfig | HiggsConfig):
        return f"needs a substitute that says about where a weight is, and quant={quant.name} has none: set quant=hqq"
    exact = frozenset(name for names in MODULE_CLASSES.values() for name in names) - linear_names(
        quant.modules
    )
    if all(is_kept(role, exact) for role in ROLES):
        return (
            f"codes the Linears of a layer that are quantized, and quant.modules=[{','.join(quant.modules)}] quantizes "
            "none (q, k and v are one, so are gate and up): set quant.modules=[attention,mlp]"
        )
    if config.target.dtype in (Dtype.float32, Dtype.float16):
        return (
            f"codes bfloat16 weights, not target.dtype={config.target.dtype.value}: set target.dtype=bfloat16"
        )
    kernel = getattr(draft, "kernel", None)
    if kernel is not None and kernel is not Kernel.auto and kernel.value not in KERNELS:
        return (
            f"reads the substitute in the order of {', '.join(KERNELS)}, not of draft.kernel={kernel.value}: "
            "set draft.kernel=auto"
        )
    return None


def decoding_only(config: Config) -> Config:
    """``config`` with a substitute that decodes the exact layers of a run in which nothing drafts.

    What makes a draft better is left out: layers that stay exact could not be coded, and nobody asks for an LM head.
    """
    quant = config.quant
    assert isinstance(quant, HqqConfig | HiggsConfig)
    quant = replace(quant, skip_layers=[], modules=[name for name in quant.modules if name != HEAD])
    if isinstance(quant, HqqConfig):
        quant = replace(quant, bits_by=replace(quant.bits_by, lm_head=None))
    return replace(config, draft=SubstituteDraftConfig(name="subspec"), quant=quant)


def reserved_bits(kept: Format) -> float:
    """Bits to reserve for an exact weight whose substitute is kept so.

    Raises:
        TypeError: a format that no exact weight is coded with.
    """
    if isinstance(kept, AffineFormat):
        return BITS[kept.bits] + BITS_PER_DOUBLING * math.log2(kept.group / 64)
    if isinstance(kept, LutFormat):
        return LOOKUP_BITS + math.log2(load_grid(kept.bits, kept.dim).mse) / 2
    raise TypeError(f"no exact weight is coded with {describe(kept)}")


def coded_head_bytes(quantization: LevelQuantization, room: int) -> int:
    """Estimated device bytes of the exact LM head, coded by the draft's own; 0: the draft has none.

    Args:
        room: bytes of the buffer that its slices are decoded into.
    """
    if "head" not in quantization.shapes:
        return 0
    n, k = quantization.shapes["head"]
    code = int(n * k * (reserved_bits(quantization.formats["head"]) + HEAD_BITS) / 8)
    return code + len(slice_rows(n, k, room)) * 2 * PlainCodec.ALIGNMENT


class SubstituteCodec:
    """A :class:`~subspec.targets.layer_bytes.LayerCodec`: sizes are estimates until a layer is coded.

    Args:
        quantization: of the substitute; what it leaves exact is not coded.
    """

    def __init__(self, quantization: LevelQuantization) -> None:
        self._bits: dict[str, float] = {}
        for role in quantization.shapes:
            if role == "head":
                continue
            bits = reserved_bits(quantization.formats[role])
            self._bits |= {f"{name}.weight": bits for name in ROLES[role]}

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Estimated bytes of a layer: coded Linears at :data:`BITS`, the rest as it is."""
        exact = {name: shape for name, shape in shapes.items() if name not in self._bits}
        coded = sum(shapes[name].numel() * bits / 8 for name, bits in self._bits.items())
        return PlainCodec().layer_bytes(exact) + int(coded)

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """One decoded layer."""
        return PlainCodec().layer_bytes(shapes)
