"""Memory of a small model under ``offload=stream``."""

from dataclasses import replace

from subspec.drafts.separate_cache import prompt_rows
from subspec.drafts.small_checkpoint import load_small_config, small_shapes
from subspec.levels.build import role_shapes
from subspec.memory.allocator import Allocation
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.draft_memory import CAPTURED_ITEMSIZE, DraftMemory, SizingInputs, kv_bytes
from subspec.memory.trace import target_trace
from subspec.targets.layer_bytes import flat_bytes


class OwnModelMemory(DraftMemory):
    """A model with a KV cache of its own of ``draft_rows`` + ``decoding.max_length`` + ``rows`` rows."""

    def __init__(self, inputs: SizingInputs, draft_rows: int, rows: int) -> None:
        model, target = small_shapes(inputs.config), inputs.spec
        known = min(model.vocab, target.vocab)
        table = max(model.vocab, target.vocab) * model.hidden * CAPTURED_ITEMSIZE
        head = known * model.hidden * CAPTURED_ITEMSIZE
        layer = flat_bytes(model.layer, CAPTURED_ITEMSIZE)
        length = inputs.config.decoding.max_length
        self.trace = target_trace(load_small_config(inputs.config), CAPTURED_ITEMSIZE, bitwise=False)
        cache = kv_bytes(model, length, draft_rows, rows, CAPTURED_ITEMSIZE)
        self.allocations = (
            Allocation(
                "small model",
                ((layer, model.layers), (table, 1), (head, int(not model.tied)), (model.hidden * CAPTURED_ITEMSIZE, 1)),
                f"{model.layers} layers, {model.vocab} tokens, bfloat16",
            ),
            Allocation("small model's KV", ((cache, inputs.texts),), f"{draft_rows} + {length} + {rows} rows"),
        )
        self.read = layer * model.layers + head


class SmallModelMemory(OwnModelMemory):
    """It runs the prompt itself, and its levels as captured graphs."""

    def __init__(self, inputs: SizingInputs) -> None:
        model, target, policy = small_shapes(inputs.config), inputs.spec, inputs.policy
        length = inputs.config.decoding.max_length
        rows, known = prompt_rows(length), min(model.vocab, target.vocab)
        super().__init__(inputs, policy.draft_rows, rows)
        shape = LevelShape.of(replace(model, vocab=known), fused_linears(role_shapes(model.layer), exact=True))
        self.level = captured_level_bytes(replace(shape, target_vocab=target.vocab), policy.width, inputs.sampling)
        self.workspaces = {f"the small model's prompt, {rows} tokens": self.trace.prefill_bytes(rows, length)}
