"""Memory of a draft: what a plan needs to know, and what every kind of draft computes it from.

Each kind computes it beside its own code (``DraftSpec.memory``). Memory that does not depend on the kind (the tree, the
target's passes, its norms and biases) belongs to :mod:`subspec.planning.memory_layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from subspec.config.schema import Config
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import Sampling
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.levels.quantization import LevelQuantization
from subspec.memory.allocator import GRAPH_BYTES, Allocation, Tensors
from subspec.memory.trace import META, TargetTrace
from subspec.targets.model_spec import ModelSpec

CAPTURED_ITEMSIZE = 2
"""Bytes per weight of captured levels, which compute in bfloat16."""


@dataclass(frozen=True)
class SizingInputs:
    """Inputs of a draft's sizes.

    Attributes:
        model, spec: of the target. target: its traces.
        itemsize: bytes per weight of the target.
        quantization: of a substitute; None for other drafts.
        texts: that run side by side.
    """

    config: Config
    model: PretrainedConfig
    spec: ModelSpec
    target: TargetTrace
    itemsize: int
    policy: TreePolicy
    sampling: Sampling
    quantization: LevelQuantization | None = None
    texts: int = 1


class DraftMemory:
    """Memory of a draft, in bytes.

    Attributes:
        allocations: on the device for the whole run.
        required_resident: layers of the target that must be resident. required_by: the reason, before "N layers" in a
            message.
        shared_rows: rows in the draft region of the target's KV cache; 0 for a draft with a cache of its own.
        level: peak of a draft level, logits included. captured: whether levels are captured as CUDA graphs.
        workspaces: peaks of the draft's other work, by name. They do not coincide with each other or with the target's
            passes: the largest counts.
        states: hidden states of layers that the target's passes return besides the final ones.
        library: whether cuBLAS multiplies for it outside of captured levels. library_levels: inside of them.
    """

    allocations: tuple[Allocation, ...] = ()
    required_resident: tuple[int, ...] = ()
    required_by = ""
    shared_rows = 0
    level = 0
    captured = True
    workspaces: Mapping[str, int] = {}
    states = 0
    read = 0
    library = library_levels = True

    def prompt_bytes(self, chunk: int) -> int:
        """Peak of ``Draft.observe`` of ``chunk`` tokens, with the target's hidden states."""
        return 0

    def level_read(self, resident: int) -> int:
        """Bytes of weights, layers and LM head, that a draft level reads with ``resident`` resident layers."""
        return self.read

    @property
    def level_tensors(self) -> Tensors:
        """A level's peak, and the graphs' fragments."""
        return ((self.level, 1), (GRAPH_BYTES, int(self.captured)))


def kv_bytes(spec: ModelSpec, max_length: int, draft_rows: int, target_rows: int, itemsize: int, texts: int = 1) -> int:
    """Bytes of a KV cache of all layers, for each of ``texts`` texts."""
    return KVCache(
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_length=max_length,
        draft_rows=draft_rows,
        target_rows=target_rows,
        dtype={2: torch.bfloat16, 4: torch.float32}[itemsize],
        device=META,
        texts=texts,
    ).nbytes


def tree_bytes(nodes: int) -> int:
    return sum(value.nbytes for value in vars(Tree(nodes, META)).values() if isinstance(value, Tensor))
