"""From ``quant=...`` to a quantizer of modules: one entry in :data:`QUANTIZERS` per method.

The methods of the fused level of ``offload=stream`` are in :mod:`subspec.levels.quantization`.
"""

from collections.abc import Callable

import torch

from subspec.config.quant_checks import bits_by_linear
from subspec.config.schema import HiggsConfig, HqqConfig, QuantConfig
from subspec.errors import ConfigError
from subspec.quant.higgs import HiggsQuantizer
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import Quantizer


def build_quantizer(
    quant: QuantConfig, dtype: torch.dtype, device: torch.device, *, unpack: bool, what: str = "a substitute"
) -> Quantizer:
    """The quantizer of a draft's Linears, packed or, with ``unpack``, plain; ``what``: the draft, for messages.

    Raises:
        ConfigError: ``quant`` names no quantizer.
    """
    if type(quant) not in QUANTIZERS:
        raise ConfigError(f"quant={quant.name} cannot quantize {what}: set quant=hqq or quant=higgs")
    return QUANTIZERS[type(quant)](quant, dtype, device, unpack)


def _hqq(quant: HqqConfig, dtype: torch.dtype, device: torch.device, unpack: bool) -> Quantizer:
    bits_by = bits_by_linear(quant.bits, quant.bits_by, quant.modules)
    sizes = {"bits": quant.bits, "bits_by": bits_by, "group_size": quant.group_size, "axis": quant.axis}
    return HqqQuantizer(**sizes, compute_dtype=dtype, device=device, unpack=unpack)


def _higgs(quant: HiggsConfig, dtype: torch.dtype, device: torch.device, unpack: bool) -> Quantizer:
    sizes = {name: getattr(quant, name) for name in ("bits", "vector_dim", "group_size", "hadamard_size")}
    kernels = {"kernel": quant.kernel, "hadamard": quant.hadamard}
    return HiggsQuantizer(**sizes, **kernels, compute_dtype=dtype, device=device, unpack=unpack)


QUANTIZERS: dict[type[QuantConfig], Callable[..., Quantizer]] = {HqqConfig: _hqq, HiggsConfig: _higgs}
"""By the class of ``quant``'s configuration; called with it, the draft's dtype and device, and ``unpack``."""
