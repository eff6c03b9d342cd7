"""The substitute's levels on a CPU: how their Linears are quantized, and what they take beside a streamed target."""

from dataclasses import replace

from transformers import PretrainedConfig

from subspec.config.checks import streams_from_disk
from subspec.config.schema import Config, HqqConfig
from subspec.decoding.cpu_pass import misfit
from subspec.drafts.vocabulary import known_tokens
from subspec.errors import ConfigError
from subspec.levels.cpu_levels import why_modules
from subspec.levels.quantization import LevelQuantization, hqq_quantization
from subspec.memory.allocator import Allocation
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.quant.cpu_linear import CpuFormat, CpuHeadFormat, Int8CpuLinear
from subspec.quant.weight_format import WeightFormat
from subspec.targets.meta_model import parameter_shapes

LEVEL_COPIES = 4
"""Float32 tensors [width, vocabulary] that a draft level holds at once: logits, log-probabilities, scores, choice."""


def cpu_quantization(config: Config, model: PretrainedConfig) -> LevelQuantization | str:
    """The quantization of fused levels on a CPU; or why there are none.

    Our own kernels take all Linears or none. Without them, beside a target that streams from a disk, each Linear has
    the kernel of the least memory.

    Raises:
        ConfigError: the Linears that would be fused are quantized differently, or settings contradict the target.
    """
    quant = config.quant
    if not isinstance(quant, HqqConfig) or quant.axis != 1:
        return "fused levels on a CPU take quant=hqq with quant.axis=1"
    if (why := why_modules(model)) is not None:
        return why
    layer, head = (parameter_shapes(model)[0], (known_tokens(config.draft, model.vocab_size), model.hidden_size))
    found = hqq_quantization(quant, layer, head, CpuFormat)
    known = {role: own for role, own in found.formats.items() if isinstance(own, CpuFormat)}
    own = {role: format_.own(*found.shapes[role]) for role, format_ in known.items()}
    formats: dict[str, WeightFormat] = {role: format_ for role, format_ in own.items() if format_ is not None}
    if misfit(model) is not None or len(formats) < len(found.formats):
        if not streams_from_disk(config):
            return found
        formats = {role: format_.smallest(*found.shapes[role]) for role, format_ in known.items()}
    return replace(found, formats=formats)


def head_format(config: Config, model: PretrainedConfig) -> CpuHeadFormat:
    """Of an LM head that ``quant`` leaves exact."""
    format_ = CpuHeadFormat(only=Int8CpuLinear.kind if streams_from_disk(config) else None)
    own = replace(format_, only=None).own(known_tokens(config.draft, model.vocab_size), model.hidden_size)
    return own if isinstance(own, CpuHeadFormat) else format_


class CpuSubstituteMemory(DraftMemory):
    """The substitute in host memory beside a target that streams from a disk."""

    captured = False

    def __init__(self, inputs: SizingInputs) -> None:
        config, spec = inputs.config, inputs.spec
        quantization = cpu_quantization(config, inputs.model)
        if isinstance(quantization, str):
            raise ConfigError(f"draft=subspec: {quantization}")
        skipped = len(set(getattr(config.quant, "skip_layers", ())))
        exact = 4 * sum(n * k for n, k in quantization.exact.values())
        whole = exact + 4 * sum(n * k for role, (n, k) in quantization.shapes.items() if role != "head")
        known, converted = known_tokens(config.draft, spec.vocab), 0 if inputs.itemsize == 4 else 4
        head = head_format(config, inputs.model).device_bytes(known, spec.hidden)
        tensors = (
            (quantization.layer_bytes + exact, spec.layers - skipped),
            (whole, skipped),
            (quantization.head_bytes or head, 1),
        )
        self.allocations = (Allocation("substitute", tensors, quantization.summary()),)
        self.workspaces = {"8-bit LM head of the draft": (1 + converted) * known * spec.hidden}
        self.shared_rows = inputs.policy.draft_rows
        self.level = LEVEL_COPIES * 4 * inputs.texts * inputs.policy.width * spec.vocab
