"""From ``quant=...`` to a quantizer of modules."""

import torch

from subspec.config import HqqConfig, QuantConfig
from subspec.errors import ConfigError
from subspec.quant.base import Quantizer
from subspec.quant.hqq import HqqQuantizer


def build_quantizer(
    quant: QuantConfig, dtype: torch.dtype, device: torch.device, *, unpack: bool, what: str = "a substitute"
) -> Quantizer:
    """The quantizer of a draft's Linears.

    Args:
        dtype, device: of the draft.
        unpack: keep the quantized values as plain Linears.
        what: is quantized, for messages.

    Raises:
        ConfigError: ``quant`` names no quantizer.
    """
    if isinstance(quant, HqqConfig):
        return HqqQuantizer(
            bits=quant.bits,
            group_size=quant.group_size,
            axis=quant.axis,
            compute_dtype=dtype,
            device=device,
            unpack=unpack,
        )
    raise ConfigError(f"quant={quant.name} cannot quantize {what}: set quant=hqq")
