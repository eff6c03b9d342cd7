"""Decision whether a streamed target is coded by its substitute, and estimates of the coded bytes."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from subspec.codec.coded_head import slice_rows
from subspec.codec.coded_layer import restored_bytes
from subspec.codec.restore import KERNELS
from subspec.config.enums import Codec, Dtype, Kernel, Proposer
from subspec.config.quant_checks import HEAD, MODULE_CLASSES, USUAL_MODULES, linear_names, module_entries
from subspec.config.schema import (
    Config,
    HiggsConfig,
    HqqConfig,
    NoDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.pass_shapes import PassShapes
from subspec.errors import ConfigError
from subspec.kernels import int4_wide
from subspec.levels.build import ROLES, is_kept
from subspec.levels.quantization import LevelQuantization
from subspec.targets.layer_bytes import PlainCodec

HEAD_BITS = 8
"""Of an LM head of the draft's own that the configuration does not name."""

MORE_FOR_HEADS = 0.3
"""Bits per weight more for an LM head than for a layer: rows of rare tokens are coded worse. Measured on the default
model's table: at 4 bits 7.07 for its first 4096 rows, 7.35 for its last ones, 7.26 on average; 3.7, 8.3 and 9.5 at 8, 3
and 2 bits."""


def codec_of(config: Config) -> Codec:
    """Resolve ``offload.codec`` to ``none`` or ``substitute``.

    ``auto`` codes if the draft has a substitute on the device whose kernels are ours.

    Raises:
        ConfigError: ``substitute`` was asked for and is not possible.
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
        return f"requires a quantizer that bounds each weight (hqq, higgs), not quant={quant.name}: set quant=hqq"
    exact = frozenset(name for names in MODULE_CLASSES.values() for name in names) - linear_names(quant.modules)
    if all(is_kept(role, exact) for role in ROLES):
        named = ",".join(module_entries(quant.modules))
        return (
            f"codes the Linears of a layer that are quantized, and quant.modules=[{named}] "
            "quantizes none (q, k and v are one, so are gate and up): set quant.modules=[attention,mlp]"
        )
    if config.target.dtype in (Dtype.float32, Dtype.float16):
        return f"codes bfloat16 weights, not target.dtype={config.target.dtype.value}: set target.dtype=bfloat16"
    kernel = getattr(draft, "kernel", None)
    if kernel is not None and kernel is not Kernel.auto and kernel.value not in KERNELS:
        return (
            f"reads the substitute in the order of {', '.join(KERNELS)}, not of draft.kernel={kernel.value}: "
            "set draft.kernel=auto"
        )
    return None


def decoding_only(config: Config) -> Config:
    """``config`` with a substitute that only restores the exact layers of a run without a draft.

    Settings that improve a draft are dropped: exact layers could not be coded, and an LM head would not be used.
    """
    quant = config.quant
    assert isinstance(quant, HqqConfig | HiggsConfig)
    modules = [name for name in module_entries(quant.modules) if name != HEAD]
    quant = replace(quant, skip_layers=[], modules=modules)
    if isinstance(quant, HqqConfig):
        quant = replace(quant, bits_by=replace(quant.bits_by, lm_head=None))
    return replace(config, draft=SubstituteDraftConfig(name="subspec"), quant=quant)


def draft_head(config: Config, *, codes: bool, texts: int | None = None) -> Config:
    """``config`` with an LM head of the draft's own in ``quant.modules``, if that is null and such a head pays.

    An HQQ head of 8 bits, by which the exact one is coded, takes less time in a level and together with the code less
    memory than the exact head. Real text accepts as many of its tokens (``experiments/quantizers``). Levels of several
    texts, of wide trees, or with many proposals, have so many rows that the exact head is faster.

    Args:
        codes: whether the exact head can be coded: it is not the embedding, and a layer is coded.
        texts: side by side, as planned; None: as configured.
    """
    draft, quant = config.draft, config.quant
    if not isinstance(draft, SubstituteDraftConfig) or not isinstance(quant, HqqConfig) or quant.modules is not None:
        return config
    rows = (getattr(config.tree, "width", None) or 1) + draft.proposed * (draft.proposer is not Proposer.none)
    few_rows = (texts or config.decoding.texts) == 1 and rows < int4_wide.FROM
    if not (codes and few_rows and draft.vocab is None) or codec_of(config) is Codec.none:
        return config
    bits_by = replace(quant.bits_by, lm_head=HEAD_BITS)
    return replace(config, quant=replace(quant, modules=[*USUAL_MODULES, HEAD], bits_by=bits_by))


def coded_head_bytes(quantization: LevelQuantization, room: int) -> int:
    """Estimated device bytes of the exact LM head, coded by the draft's own; 0: the draft has none.

    Args:
        room: bytes of the buffer that its slices are restored into.
    """
    if "head" not in quantization.shapes:
        return 0
    n, k = quantization.shapes["head"]
    code = int(n * k * (quantization.formats["head"].coded_bits + MORE_FOR_HEADS) / 8)
    return code + len(slice_rows(n, k, room)) * 2 * PlainCodec.ALIGNMENT


class SubstituteCodec:
    """A :class:`~subspec.targets.layer_bytes.LayerCodec`: sizes are estimates until a layer is coded.

    Args:
        quantization: of the substitute; Linears that it leaves exact are not coded.
        passes: that run the layers (:func:`~subspec.codec.coded_layer.restored_bytes`).
    """

    def __init__(self, quantization: LevelQuantization, passes: PassShapes | None) -> None:
        self.passes = passes
        self._bits: dict[str, float] = {}
        for role in quantization.shapes:
            if role == "head":
                continue
            bits = quantization.formats[role].coded_bits
            self._bits |= {f"{name}.weight": bits for name in ROLES[role]}

    def layer_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """Estimated bytes of a layer: coded Linears at ``WeightFormat.coded_bits``, the rest as it is."""
        exact = {name: shape for name, shape in shapes.items() if name not in self._bits}
        coded = sum(shapes[name].numel() * bits / 8 for name, bits in self._bits.items())
        return PlainCodec().layer_bytes(exact) + int(coded)

    def scratch_bytes(self, shapes: Mapping[str, torch.Size]) -> int:
        """One restored layer, or a slice."""
        return restored_bytes(shapes, self._bits.keys(), self.passes)
