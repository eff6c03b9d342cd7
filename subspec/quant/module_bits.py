"""Bits by module: one number for all Linears, others for classes of them or single ones."""

import dataclasses
from collections.abc import Sequence

from subspec.config.schema import BitsByModule
from subspec.errors import ConfigError
from subspec.quant.base import MODULE_CLASSES, linear_names

BITS = (8, 4, 3, 2)
"""What a weight may be quantized to."""


def bits_by_linear(bits: int, bits_by: BitsByModule, modules: Sequence[str]) -> dict[str, int]:
    """Bits of every quantized Linear: a Linear's own, else its class's, else ``bits``.

    Args:
        modules: ``quant.modules``.

    Raises:
        ConfigError: bits that no quantizer has, or bits for what stays exact.
    """
    own = {key: value for key, value in dataclasses.asdict(bits_by).items() if value is not None}
    for key, value in [("bits", bits), *((f"bits_by.{key}", value) for key, value in own.items())]:
        if value not in BITS:
            raise ConfigError(f"quant.{key}={value}: use {', '.join(map(str, BITS))} bits")
    chosen = linear_names(list(modules))
    for key, value in own.items():
        if not chosen & set(MODULE_CLASSES.get(key, (key,))):
            raise ConfigError(
                f"quant.bits_by.{key}={value}, but {key} stays exact: add it to quant.modules, or leave it out"
            )
    classes = {name: key for key, names in MODULE_CLASSES.items() for name in names}
    return {name: own.get(name, own.get(classes[name], bits)) for name in classes if name in chosen}
