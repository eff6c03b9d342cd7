"""The substitute's memory beside a streamed target, computed before anything is loaded."""

from subspec.config.schema import HqqConfig
from subspec.drafts.vocabulary import known_tokens
from subspec.levels.quantization import LevelQuantization
from subspec.memory.allocator import Allocation
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.draft_memory import CAPTURED_ITEMSIZE, DraftMemory, SizingInputs


class SubstituteMemory(DraftMemory):
    """The quantized substitute: a copy of every layer, exact for those in ``quant.skip_layers``."""

    required_by = "quant.skip_layers keeps"

    def __init__(self, inputs: SizingInputs) -> None:
        spec, quantization = inputs.spec, inputs.quantization
        assert quantization is not None
        self.required_resident = tuple(sorted(set(getattr(inputs.config.quant, "skip_layers", ()))))
        skipped = len(self.required_resident)
        self.allocations = substitute_allocations(quantization, spec.layers - skipped, skipped)
        self.shared_rows = inputs.policy.draft_rows
        own_head = "head" in quantization.shapes
        integers = isinstance(inputs.config.quant, HqqConfig)
        self.library = False
        self.library_levels = not (integers and own_head and not quantization.exact and not skipped)
        known = known_tokens(inputs.config.draft, spec.vocab)
        if known < spec.vocab and not own_head:
            rows = (known * spec.hidden * CAPTURED_ITEMSIZE, 1)
            self.allocations += (Allocation("draft's LM head", (rows,), f"{known} of {spec.vocab} ids"),)
        linears = fused_linears(quantization.exact, exact=True) + fused_linears(quantization.shapes, exact=False)
        self.level = captured_level_bytes(
            LevelShape.of(spec, linears, own_head=own_head, known=known),
            inputs.policy.width,
            inputs.sampling,
            inputs.texts,
        )
        shared_head = 0 if own_head or known < spec.vocab else spec.vocab * spec.hidden * inputs.itemsize
        self.read = sum(allocation.bytes for allocation in self.allocations) + shared_head


def substitute_allocations(
    quantization: LevelQuantization, replaced: int, skipped: int, note: str = ""
) -> tuple[Allocation, ...]:
    """A substitute of ``replaced`` quantized layers and ``skipped`` exact ones.

    The packed weights of a layer are one allocation, every exact fused Linear is one.
    """
    exact = [n * k * CAPTURED_ITEMSIZE for n, k in quantization.exact.values()]
    layer = [n * k * CAPTURED_ITEMSIZE for role, (n, k) in quantization.shapes.items() if role != "head"]
    kept = [(size, replaced) for size in exact] + [(size, skipped) for size in exact + layer]
    return (
        Allocation(
            "substitute",
            ((quantization.layer_bytes, replaced), (quantization.head_bytes, 1)),
            note + quantization.summary(),
        ),
        Allocation("exact substitute", tuple(kept), "bfloat16: what stays exact"),
    )
