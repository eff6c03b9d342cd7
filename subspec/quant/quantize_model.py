"""Which Linears of a model are quantized, to how many bits, and their replacement by quantized modules."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from subspec.config.checks import check_skip_layers
from subspec.config.schema import BitsByModule
from subspec.errors import ConfigError
from subspec.kernels.int4 import BITS

MODULE_CLASSES: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "lm_head": ("lm_head",),
}
"""Names that ``quant.modules`` accepts besides single Linears."""

HEAD = "lm_head"
"""The draft's own LM head; the target's stays exact."""


class Quantizer(Protocol):
    """Quantizes a whole Linear to a module."""

    name: str

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        """A quantized module in place of ``linear``, which stays unchanged; ``name``: its path, for messages."""

    def stored_bytes(self, linear: nn.Linear, name: str) -> int:
        """Bytes of the quantized weights, scales and zeros, without the bias."""

    @property
    def backend(self) -> str:
        """Implementation of the quantized Linears' forward pass, for records."""


@dataclass
class QuantReport:
    """The quantized Linears, for the record and the plan.

    Attributes:
        details: kernels of a fused substitute, and the cache.
        bits: stored bits per weight by Linear.
    """

    quantizer: str
    backend: str
    modules: int = 0
    weights: int = 0
    stored_bytes: int = 0
    seconds: float = 0.0
    kept_exact: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)

    def count(self, linear: str, weights: int, stored_bytes: int) -> None:
        """Add a quantized Linear."""
        self.modules += 1
        self.weights += weights
        self.stored_bytes += stored_bytes
        self.bits[linear] = round(8 * stored_bytes / weights, 4)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and zeros included."""
        return 8 * self.stored_bytes / self.weights if self.weights else 0.0


def linear_names(modules: list[str]) -> set[str]:
    """Expand the classes in ``quant.modules`` to the names of Linears.

    Raises:
        ConfigError: an entry is neither a class nor a Linear's name, or there is none at all.
    """
    known = {name for names in MODULE_CLASSES.values() for name in names}
    chosen: set[str] = set()
    for entry in modules:
        if entry not in MODULE_CLASSES and entry not in known:
            names = [*MODULE_CLASSES, *sorted(known - MODULE_CLASSES.keys())]
            raise ConfigError(f"quant.modules: unknown module {entry!r}; use {', '.join(names)}")
        chosen.update(MODULE_CLASSES.get(entry, (entry,)))
    if not chosen:
        raise ConfigError(
            "quant.modules is empty: a substitute needs at least one quantized module, e.g. [mlp]"
        )
    return chosen


def bits_by_linear(bits: int, bits_by: BitsByModule, modules: Sequence[str]) -> dict[str, int]:
    """Bits of every quantized Linear: its own, else its class's, else ``bits``.

    Args:
        modules: ``quant.modules``.

    Raises:
        ConfigError: bits that no quantizer has, or bits of a Linear that stays exact.
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


def quantize_model(
    model: PreTrainedModel,
    quantizer: Quantizer,
    *,
    modules: list[str],
    skip_layers: list[int],
    progress: Callable[[int, int], None] | None = None,
) -> QuantReport:
    """Replace the chosen Linears of every decoder layer, and the LM head if it is chosen, in place.

    Args:
        model: a graph whose modules may be replaced (see ``share_parameters``).
        modules: names or classes of Linears.
        skip_layers: decoder layers that stay exact.
        progress: called with (layers done, layers).

    Raises:
        ConfigError: unknown modules or layers.
    """
    names = linear_names(modules)
    layers = model.get_decoder().layers
    check_skip_layers(skip_layers, len(layers))
    report = QuantReport(quantizer.name, quantizer.backend)
    for index, layer in enumerate(layers):
        for path, module in list(layer.named_modules()):
            if not isinstance(module, nn.Linear):
                continue
            full = f"layers.{index}.{path}"
            parent_path, _, name = path.rpartition(".")
            if name not in names or index in skip_layers:
                report.kept_exact.append(full)
                continue
            setattr(layer.get_submodule(parent_path), name, quantizer.quantize(module, full))
            report.count(name, module.weight.numel(), quantizer.stored_bytes(module, full))
        if progress is not None:
            progress(index + 1, len(layers))
    if HEAD in names:  # a copy of the draft's own: the target's, tied or not, stays exact
        head = model.get_output_embeddings()
        model.set_output_embeddings(quantizer.quantize(head, HEAD))
        report.count(HEAD, head.weight.numel(), quantizer.stored_bytes(head, HEAD))
    return report
