"""Which Linears of a model are quantized, to how many bits, and their replacement by quantized modules."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from subspec.config.checks import check_skip_layers
from subspec.config.quant_checks import HEAD, linear_names


class Quantizer(Protocol):
    """Quantizes a whole Linear to a module."""

    name: str
    backend: str
    """Implementation of the quantized Linears' forward pass, for records."""

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        """A quantized module in place of ``linear``, which stays unchanged; ``name``: its path, for messages."""

    def stored_bytes(self, linear: nn.Linear, name: str) -> int:
        """Bytes of the quantized weights, scales and zeros, without the bias."""


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


def quantize_model(
    model: PreTrainedModel, quantizer: Quantizer, *, modules: Sequence[str] | None, skip_layers: list[int]
) -> QuantReport:
    """Replace the Linears that ``modules`` names (or their classes) of a graph (see ``share_parameters``), in place.

    The decoder layers ``skip_layers`` stay exact.

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
    if HEAD in names:  # a copy of the draft's own: the target's, tied or not, stays exact
        head = model.get_output_embeddings()
        model.set_output_embeddings(quantizer.quantize(head, HEAD))
        report.count(HEAD, head.weight.numel(), quantizer.stored_bytes(head, HEAD))
    return report
