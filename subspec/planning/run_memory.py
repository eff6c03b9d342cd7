"""Memory of a run that does not depend on where its weights lie: draft, KV cache, tree, passes, audit."""

from transformers import PretrainedConfig

from subspec.config.schema import Config, StreamOffloadConfig
from subspec.decoding.audit import PROMPT_CHUNK
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.decoding.shared_pass import JOINING_ROWS, LOGITS_ROWS
from subspec.drafts.registry import spec_of
from subspec.errors import ConfigError
from subspec.levels.quantization import LevelQuantization
from subspec.memory.allocator import Allocation, Tensors
from subspec.memory.draft_memory import DraftMemory, SizingInputs, kv_bytes, tree_bytes
from subspec.memory.trace import target_trace
from subspec.targets.model_spec import ModelSpec
from subspec.utils.rounding import round_up

CHUNK_GOAL = 512
"""Prefill chunk whose workspace is reserved before any layer becomes resident.

A chunk is one sweep over all streamed weights. 1024 tokens instead of 512 cost 0.08 GiB (7B), a fifth of a resident
layer, and save one sweep of a prompt longer than 512 tokens; most are shorter. The chunk grows into half of the memory
that the layers leave over.
"""

LOADING_LAYERS = 3
"""Layers in host memory while loading: one being read, one being quantized, one to spare."""

SLOT_PAGES = 4
"""Pages that a slot of a disk's ring holds beyond its layer, which may lie in two files, each with a page cut at both
ends."""

AUDIT_ROWS = 256
"""Tokens per pass of an audit that compares no bits."""


class RunMemory:
    """Sizes that a configuration fixes.

    Args:
        itemsize: bytes per weight of the target.
        bitwise: whether passes run in batch-invariant arithmetic. coded: whether they restore layers.
        row_multiple: rows of a tree and of its pass are rounded up to it.
        quantization: of a substitute on a GPU.

    Attributes:
        draft: its memory. drafts: whether there is one.
        goal, least_chunk, most_chunk: prefill chunk in tokens: reserved first, lower bound, upper bound.
        texts: that run side by side.
        pass_rows: of a verification pass. levels: most of a tree.

    Raises:
        ConfigError: no ``offload=stream``, or a draft that has no plan.
    """

    def __init__(
        self,
        config: Config,
        model: PretrainedConfig,
        itemsize: int,
        *,
        bitwise: bool = False,
        coded: bool = False,
        row_multiple: int = 1,
        quantization: LevelQuantization | None = None,
    ) -> None:
        if not isinstance(config.offload, StreamOffloadConfig):
            raise ConfigError(f"offload={config.offload.name} has no plan: set offload=stream")
        self.config, self.offload, self.itemsize, self.bitwise = config, config.offload, itemsize, bitwise
        self.spec = spec = ModelSpec.of(model)
        self.target = target_trace(model, itemsize, bitwise=bitwise, sliced=coded)
        self.sampling = build_sampling(config)
        self.texts: int = config.decoding.texts
        self.most_chunk = length = config.decoding.max_length
        self.least_chunk = min(config.decoding.prefill_chunk, length)
        self.goal = max(self.least_chunk, min(length, CHUNK_GOAL))

        kind = spec_of(config.draft)
        self.draft, self.drafts = DraftMemory(), kind is not None
        nodes = rows = self.pass_rows = 1
        self.levels, width = 0, 0
        if kind is not None:
            policy = build_tree_policy(config.tree)
            self.draft = kind.memory(
                SizingInputs(
                    config, model, spec, self.target, itemsize, policy, self.sampling, quantization, self.texts
                )
            )
            nodes, width, self.levels = policy.capacity, policy.width, policy.max_depth
            rows, self.pass_rows = round_up(nodes, row_multiple), round_up(policy.pass_nodes, row_multiple)
        draft, each = self.draft, f", {self.texts} texts" * (self.texts > 1)
        cache = kv_bytes(spec, length, draft.shared_rows, self.pass_rows, itemsize, self.texts)
        note = f"{nodes} nodes" if self.drafts else "the root alone"
        self._cache_and_tree = (
            Allocation("KV cache", ((cache, 1),), f"{draft.shared_rows} + {length} + {self.pass_rows} rows{each}"),
            Allocation("tree", ((tree_bytes(rows), self.texts),), note + f" in {rows} rows" * (rows != nodes) + each),
        )
        self._level = Allocation(
            "draft level",
            draft.level_tensors if self.drafts else (),
            f"width {width}{', CUDA graphs' * draft.captured}",
        )

    def ring_slots(self, resident: int) -> int:
        """Slots of the ring: at most as many as there are streamed layers."""
        return min(self.offload.ring_slots, self.spec.layers - resident)

    def run_allocations(self, chunk: int) -> list[Allocation]:
        """KV cache, tree, workspace, draft level and audit, with prefill chunks of ``chunk`` tokens."""
        peaks = self._pass_peaks(chunk)
        largest = max(peaks, key=lambda name: peaks[name])
        return [
            *self._cache_and_tree,
            Allocation("workspace", ((peaks[largest], 1),), f"largest: {largest}"),
            self._level,
            Allocation("audit", self._audit_tensors(peaks[largest]), "its own cache and logits"),
        ]

    def _pass_peaks(self, chunk: int) -> dict[str, int]:
        """Peaks of passes and of choosing tokens, by name."""
        target, draft, texts, rows, levels = self.target, self.draft, self.texts, self.pass_rows, self.levels
        states, beside = draft.states, min(chunk, JOINING_ROWS) if texts > 1 else 0
        together = max(1, min(texts, LOGITS_ROWS // rows)) * rows
        row = target.hidden(1).nbytes
        # Logits are computed while the pass's states are held; of one text's final ones the trace knows itself.
        kept = row * (states * rows if texts == 1 else (1 + states) * (texts * rows + beside))
        noise = 0 if self.sampling.greedy else 4 * (texts - 1) * (levels + 2) * target.model.vocab_size
        several, length = f"{texts} x " * (texts > 1), self.most_chunk
        return {
            f"prefill, {chunk} tokens": target.prefill_bytes(chunk, length, states),
            f"pass over {several}{rows} rows": target.tree_pass_bytes(rows, levels, length, states, texts, beside),
            f"logits of {together} rows": target.verify_bytes(together, levels, self.sampling) + kept + noise,
            f"draft's rows of {chunk} tokens": draft.prompt_bytes(chunk) + kept * (texts > 1),
            **draft.workspaces,
        }

    def _audit_tensors(self, workspace: int) -> Tensors:
        """The audit's KV cache, and its logits as far as they need more than the run's workspace."""
        if not self.config.audit:
            return ()
        rows = judged = min(AUDIT_ROWS, self.most_chunk)
        if self.bitwise:
            rows, judged = min(PROMPT_CHUNK, self.most_chunk), 1
        logits = self.target.audit_bytes(judged, self.sampling)
        cache = kv_bytes(self.spec, self.most_chunk, 0, rows, self.itemsize)
        return ((cache, 1), (max(0, logits - workspace), 1))
