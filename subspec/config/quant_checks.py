"""Checks of a quantizer's settings that need no model: bits, groups, and the Linears that are quantized."""

import dataclasses
from collections.abc import Sequence

from subspec.config.schema import BitsByModule, HiggsConfig, HqqConfig, QuantConfig
from subspec.errors import ConfigError
from subspec.utils.rounding import is_power_of_two

HQQ_BITS = (8, 4, 3, 2)
HIGGS_BITS = (2, 3, 4)
HIGGS_DIMS = (1, 2)
"""Weights that are rounded together."""
LEAST_BLOCK = 64
"""Smallest block that HIGGS rotates: a mean of fewer weights is not Gaussian enough, and kernels take 64 inputs in one
step."""
LARGEST_BLOCK = 1024
"""Inputs that HIGGS's Triton kernel can rotate together."""

MODULE_CLASSES: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "lm_head": ("lm_head",),
}
"""Names that ``quant.modules`` accepts besides single Linears."""

HEAD = "lm_head"
"""The draft's own LM head; the target's stays exact."""

USUAL_MODULES = ("attention", "mlp")
"""Where ``quant.modules`` is null."""


def check_quant(quant: QuantConfig) -> None:
    """Refuse (ConfigError) wrong settings of a quantizer, for any model."""
    if isinstance(quant, HqqConfig):
        check_hqq(quant.bits, quant.group_size, quant.axis)
        bits_by_linear(quant.bits, quant.bits_by, quant.modules)
    if isinstance(quant, HiggsConfig):
        check_higgs(quant.bits, quant.vector_dim, quant.group_size, quant.hadamard_size)
        linear_names(quant.modules)


def check_hqq(bits: int, group_size: int, axis: int) -> None:
    """Refuse (ConfigError) wrong settings of HQQ, for any model."""
    if bits not in HQQ_BITS:
        raise ConfigError(f"quant.bits={bits}: HQQ here has {', '.join(map(str, HQQ_BITS))} bits")
    if group_size < 8 or group_size % 8:
        raise ConfigError(f"quant.group_size={group_size}: use a multiple of 8, for instance 64")
    if axis not in (0, 1):
        raise ConfigError(f"quant.axis={axis}: use 1 (input dimension) or 0 (output dimension)")


def check_higgs(bits: int, vector_dim: int, group_size: int, hadamard_size: int) -> None:
    """Refuse (ConfigError) wrong settings of HIGGS, for any model."""
    if bits not in HIGGS_BITS:
        raise ConfigError(f"quant.bits={bits}: HIGGS here has {', '.join(map(str, HIGGS_BITS))} bits")
    if vector_dim not in HIGGS_DIMS:
        raise ConfigError(f"quant.vector_dim={vector_dim}: HIGGS here has grids of 1 or 2 dimensions")
    if group_size < LEAST_BLOCK or group_size % LEAST_BLOCK:
        raise ConfigError(f"quant.group_size={group_size}: use a multiple of {LEAST_BLOCK}, for instance 256")
    if not is_power_of_two(hadamard_size) or not LEAST_BLOCK <= hadamard_size <= LARGEST_BLOCK:
        raise ConfigError(
            f"quant.hadamard_size={hadamard_size}: use a power of two from {LEAST_BLOCK} to {LARGEST_BLOCK}, "
            "for instance 512"
        )


def module_entries(modules: Sequence[str] | None) -> list[str]:
    """The entries of ``quant.modules``; None: the usual ones."""
    return [*(USUAL_MODULES if modules is None else modules)]


def linear_names(modules: Sequence[str] | None) -> set[str]:
    """The names of the Linears in ``quant.modules``, classes expanded; None: of the usual ones.

    ConfigError if an entry is neither a class nor a Linear's name, or if there is none.
    """
    known = {name for names in MODULE_CLASSES.values() for name in names}
    chosen: set[str] = set()
    for entry in module_entries(modules):
        if entry not in MODULE_CLASSES and entry not in known:
            names = [*MODULE_CLASSES, *sorted(known - MODULE_CLASSES.keys())]
            raise ConfigError(f"quant.modules: unknown module {entry!r}; use {', '.join(names)}")
        chosen.update(MODULE_CLASSES.get(entry, (entry,)))
    if not chosen:
        raise ConfigError("quant.modules is empty: a substitute needs at least one quantized module, e.g. [mlp]")
    return chosen


def bits_by_linear(bits: int, bits_by: BitsByModule, modules: Sequence[str] | None) -> dict[str, int]:
    """Bits of every quantized Linear (of ``quant.modules``): its own, else its class's, else ``bits``.

    ConfigError for bits that no quantizer has, and for bits of a Linear that stays exact.
    """
    own = {key: value for key, value in dataclasses.asdict(bits_by).items() if value is not None}
    for key, value in [("bits", bits), *((f"bits_by.{key}", value) for key, value in own.items())]:
        if value not in HQQ_BITS:
            raise ConfigError(f"quant.{key}={value}: use {', '.join(map(str, HQQ_BITS))} bits")
    chosen = linear_names(modules)
    for key, value in own.items():
        if not chosen & set(MODULE_CLASSES.get(key, (key,))):
            raise ConfigError(
                f"quant.bits_by.{key}={value}, but {key} stays exact: add it to quant.modules, or leave it out"
            )
    classes = {name: key for key, names in MODULE_CLASSES.items() for name in names}
    return {name: own.get(name, own.get(classes[name], bits)) for name in classes if name in chosen}
