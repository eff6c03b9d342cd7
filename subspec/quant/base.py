"""Quantizers behind one interface, and the walk that applies one to a model's decoder Linears."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from subspec.errors import ConfigError

MODULE_CLASSES: dict[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "lm_head": ("lm_head",),
}
"""Names that ``quant.modules`` accepts besides single Linears."""

HEAD = "lm_head"
"""The draft's own LM head; the target's stays exact."""


class Quantizer(Protocol):
    """Turns one Linear into a module that approximates it with fewer bits."""

    name: str

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        """A quantized stand-in for ``linear``, which stays untouched; ``name`` is its path, for messages."""

    def stored_bytes(self, linear: nn.Linear, name: str) -> int:
        """Bytes the quantized form of ``linear`` takes (weights, scales and zeros; the bias is not counted)."""

    @property
    def backend(self) -> str:
        """What computes the quantized Linears' forward pass."""


@dataclass
class QuantReport:
    """What was quantized: for the record and the plan.

    ``details``: kernels of a fused substitute, and the cache. ``bits``: stored bits per weight by Linear.
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
        """One more quantized Linear."""
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
    wrong = [index for index in skip_layers if not 0 <= index < len(layers)]
    if wrong:
        raise ConfigError(
            f"quant.skip_layers: no layer {wrong[0]} in a target with layers 0..{len(layers) - 1}"
        )
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
