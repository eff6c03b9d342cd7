"""Typed schema of a run: one dataclass per option of each config group.

Hydra merges the YAML files of ``conf/`` into these dataclasses, so that a misspelt key or a wrong type is refused while
the configuration is composed. A YAML file names its dataclass through the hidden group ``schema``
(``defaults: [/schema/tree/beam@_here_]``). A new option needs one dataclass, one YAML file and one entry in
:data:`SCHEMAS`. Ranges and contradictions are checked by :mod:`subspec.config.checks`.
The groups of :mod:`subspec.config.schema_inputs` are imported from here, too.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from subspec.config.defaults import register_resolvers
from subspec.config.enums import (  # noqa: F401  (imported from here, as the groups are)
    Cache,
    Codec,
    Device,
    Dtype,
    Hadamard,
    HiggsKernel,
    Kernel,
    Objective,
    Placement,
    Profile,
    Proposer,
    Source,
    Unpack,
    VramCounts,
    WandbMode,
)
from subspec.config.schema_inputs import (  # noqa: F401
    BenchmarkConfig,
    BitsByModule,
    EmbeddedTargetConfig,
    HiggsConfig,
    HqqConfig,
    HubData,
    HubTargetConfig,
    LoggerConfig,
    NoLoggerConfig,
    NoQuantConfig,
    PlantedTargetConfig,
    QuantConfig,
    ServeConfig,
    TargetConfig,
    WandbConfig,
)

# ----------------------------------------------------------------------------------------------- draft


@dataclass
class DraftConfig:
    """A draft model. ``temperature`` affects the draft tree, not the verification."""

    name: str = MISSING


@dataclass
class NoDraftConfig(DraftConfig):
    """Plain decoding: one target pass per token."""


@dataclass
class SubstituteDraftConfig(DraftConfig):
    """The quantized substitute of the target (SubSpec, arXiv 2509.18344).

    ``unpack`` applies to single modules (``offload=none``); ``auto`` replaces them by fused levels on a CPU where
    ``quant=hqq`` with ``axis=1`` allows it. ``kernel`` and ``overlap_launches`` apply to the captured
    levels of ``offload=stream``. ``vocab``: the ids that its LM head knows, a number or a file (null: all).
    ``proposer``: a draft that guesses up to ``proposed`` nodes for every pass; its weights are in ``proposer_path``
    (as ``draft.path`` of that draft; null: those that ship).
    """

    temperature: float = 0.2
    vocab: Any = None
    proposer: Proposer = Proposer.none
    proposer_path: str | None = None
    proposed: int = 10
    unpack: Unpack = Unpack.auto
    kernel: Kernel = Kernel.auto
    overlap_launches: bool = True


@dataclass
class Eagle2DraftConfig(DraftConfig):
    """An EAGLE head (arXiv 2401.15077, 2406.16858) for the target.

    ``path``: a folder or hub id (``ORG/NAME``) of a published head, ``planted`` (random weights in its shape, for
    planted targets), or null for the shipped head of the default target.
    """

    path: str | None = None
    temperature: float = 1.0


@dataclass
class Eagle3DraftConfig(Eagle2DraftConfig):
    """An EAGLE-3 head (arXiv 2503.01840) for the target."""


@dataclass
class BlockHeadDraftConfig(Eagle2DraftConfig):
    """A DFlash, JetSpec (arXiv 2602.06036, 2606.18394) or DSpark head for the target.

    ``config.json`` tells the kind of a published head; ``planted`` has DFlash's shape.
    """


@dataclass
class CheckpointDraftConfig(DraftConfig):
    """A causal language model with the target's vocabulary and its own KV cache.

    ``path``: a local folder, a hub id (``ORG/NAME``, at ``revision``), or ``planted:SHAPE`` (random weights, for
    planted targets). ``quantize``: whether ``quant`` is applied to it.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.auto
    temperature: float = 1.0
    quantize: bool = False


@dataclass
class SmallModelDraftConfig(CheckpointDraftConfig):
    """Any such model, a level per pass. ``path`` null: the shipped small model."""

    overlap_launches: bool = True


@dataclass
class PardDraftConfig(CheckpointDraftConfig):
    """A model trained to draft several tokens per pass (PARD, arXiv 2504.18583; PARD-2).

    ``block``: most tokens of a pass, and so levels of a tree.
    """

    block: int = 12


@dataclass
class LayerSkipDraftConfig(DraftConfig):
    """Self-speculation: some decoder layers of the target, with its embeddings, norm, head and KV cache.

    ``layers``: indices of the layers; ``keep``: their count instead, evenly spaced. Both null: half of the layers, or
    with ``offload=stream`` the resident ones.
    """

    temperature: float = 1.0
    layers: list[int] | None = None
    keep: int | None = None
    overlap_launches: bool = True


@dataclass
class PromptLookupDraftConfig(DraftConfig):
    """Continuations found in the prompt and in the text so far.

    ``longest``, ``shortest``: most and fewest tokens of a context that is looked up. ``earlier_texts``: look into the
    prompts and outputs of the run's earlier samples, too.
    """

    temperature: float = 1.0
    longest: int = 4
    shortest: int = 2
    earlier_texts: bool = False


# ------------------------------------------------------------------------------------------------ tree


@dataclass
class TreeConfig:
    """Shape of the draft tree. ``depth``: levels below the root; ``width``: nodes per level (K)."""

    name: str = MISSING
    depth: int = MISSING


@dataclass
class ChainTreeConfig(TreeConfig):
    """One node per level."""


@dataclass
class BeamTreeConfig(TreeConfig):
    """The paper's tree: the best ``width`` nodes of every level by cumulative log-probability."""

    width: int = MISSING


@dataclass
class AdaptiveTreeConfig(BeamTreeConfig):
    """A beam that stops when the expected gain of another level is below its cost.

    ``width`` null: 1 on a CPU, 4 on a GPU (:func:`subspec.config.defaults.fill_tree`). ``level_cost``: time of a draft
    level in units of a verification pass; null measures it while running. ``check_every``: levels between two checks of
    the draft's probabilities. ``min_depth``: levels always drafted; 0: none while plain decoding is faster, and a
    level's price includes its rows in the pass; null: 0 on a CPU, 1 on a GPU.
    """

    width: int | None = None
    level_cost: float | None = None
    check_every: int = 1
    min_depth: int | None = None


@dataclass
class Eagle2TreeConfig(TreeConfig):
    """EAGLE-2's tree: ``width`` children of each of the best ``width`` nodes of a level, re-ranked at the end.

    ``total_tokens``: maximum number of verified nodes, root included.
    """

    width: int = MISSING
    total_tokens: int = MISSING


# -------------------------------------------------------------------------------------------- decoding


@dataclass
class DecodingConfig:
    """Lengths in tokens. ``max_length`` bounds prompt + new tokens (the KV cache's committed region).

    ``bitwise``: ``auto``, ``true`` or ``false``: whether the target's passes are batch-invariant
    (:mod:`subspec.decoding.bitwise`). ``texts``: texts that run side by side and share every pass of the target, at
    most, or ``auto``: as many as pay (:data:`subspec.config.defaults.MOST_TEXTS` at most).
    """

    name: str = MISSING
    max_new_tokens: int | None = 128
    max_length: int = 2048
    prefill_chunk: int = 256
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    bitwise: Any = "auto"
    texts: Any = 1


@dataclass
class SamplingConfig(DecodingConfig):
    """Sampling from the target: ``top_k`` 0 and ``top_p`` 1 switch the respective filter off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


# --------------------------------------------------------------------------------------------- offload


@dataclass
class OffloadConfig:
    """Location of the target's weights."""

    name: str = MISSING


@dataclass
class BudgetedOffloadConfig(OffloadConfig):
    """Weights offloaded within a budget of device memory.

    ``vram_gib``: GiB, or ``auto`` for what the card has free. ``vram_counts``: whether it bounds PyTorch's allocations
    alone or what CUDA itself takes too.
    """

    vram_gib: Any = 8.0
    vram_counts: VramCounts = VramCounts.allocator


@dataclass
class StreamOffloadConfig(BudgetedOffloadConfig):
    """Exact weights in pinned host memory, streamed layer by layer to a GPU; with ``device=cpu`` on a disk, streamed to
    host memory (:mod:`subspec.planning.disk_plan`).

    ``resident_layers``: exact layers kept on the device (null: as many as fit). ``ring_slots``: layer buffers of the
    copies. ``embedding``: location of the embedding table. ``link_gb_per_s``: bandwidth for planning (null: measured,
    or the card's). ``card``: plan for this card instead of this machine's (with ``plan_only``). ``ram_gib``: limit of
    host memory, beyond which layers are read from a disk (null: free memory, and none is). ``disk_gb_per_s``: bandwidth
    of the disk for planning (null: measured when the run starts). ``codec``: whether exact weights are stored and
    streamed coded given their substitute.
    """

    resident_layers: int | None = None
    ring_slots: int = 2
    embedding: Placement = Placement.auto
    link_gb_per_s: float | None = None
    card: str | None = None
    ram_gib: float | None = None
    disk_gb_per_s: float | None = None
    codec: Codec = Codec.auto


@dataclass
class AccelerateOffloadConfig(BudgetedOffloadConfig):
    """Hugging Face accelerate's CPU offloading of the same target, as a baseline."""


# ------------------------------------------------------------------------------------------------- run


@dataclass
class Config:
    """One run: groups, and keys outside groups."""

    target: TargetConfig = MISSING
    draft: DraftConfig = MISSING
    quant: QuantConfig = MISSING
    tree: TreeConfig = MISSING
    decoding: DecodingConfig = MISSING
    offload: OffloadConfig = MISSING
    benchmark: BenchmarkConfig = MISSING
    logger: LoggerConfig = MISSING
    experiment: str | None = None
    hparams_search: str | None = None

    seed: int = 0
    device: Device = Device.auto
    run_dir: str = MISSING
    resume: bool = False
    warmup: int = 1
    audit: bool = False
    audit_margin: float | None = None
    baseline: str | None = None
    plan_only: bool = False
    profile: Profile = Profile.none
    optimise: Objective | None = None
    study: str | None = None


SCHEMAS: dict[str, type] = {
    "target/embedded": EmbeddedTargetConfig,
    "target/hub": HubTargetConfig,
    "target/planted": PlantedTargetConfig,
    "draft/none": NoDraftConfig,
    "draft/subspec": SubstituteDraftConfig,
    "draft/eagle2": Eagle2DraftConfig,
    "draft/eagle3": Eagle3DraftConfig,
    "draft/block_head": BlockHeadDraftConfig,
    "draft/small_model": SmallModelDraftConfig,
    "draft/pard": PardDraftConfig,
    "draft/layer_skip": LayerSkipDraftConfig,
    "draft/prompt_lookup": PromptLookupDraftConfig,
    "quant/none": NoQuantConfig,
    "quant/hqq": HqqConfig,
    "quant/higgs": HiggsConfig,
    "tree/chain": ChainTreeConfig,
    "tree/beam": BeamTreeConfig,
    "tree/adaptive": AdaptiveTreeConfig,
    "tree/eagle2": Eagle2TreeConfig,
    "decoding/greedy": DecodingConfig,
    "decoding/sampling": SamplingConfig,
    "offload/none": OffloadConfig,
    "offload/stream": StreamOffloadConfig,
    "offload/accelerate": AccelerateOffloadConfig,
    "benchmark/benchmark": BenchmarkConfig,
    "logger/none": NoLoggerConfig,
    "logger/wandb": WandbConfig,
}
"""Hidden schema group: ``conf/<group>/<option>.yaml`` begins with ``/schema/<key>@_here_``."""


@functools.cache
def register_schemas() -> None:
    """Register the schema with Hydra, once per process."""
    register_resolvers()
    store = ConfigStore.instance()
    store.store(name="schema_config", node=Config)
    for key, node in SCHEMAS.items():
        group, name = key.split("/")
        if node is BenchmarkConfig:
            node = OmegaConf.structured(BenchmarkConfig)
            node.max_samples = f"${{default_samples:{node.max_samples},${{.per_category}}}}"
        store.store(group=f"schema/{group}", name=name, node=node)


def to_config(cfg: DictConfig) -> Config:
    """The composed configuration as dataclass instances, with interpolations resolved."""
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return Config(**OmegaConf.to_object(plain))


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as builtin types, for records and loggers."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    offload = plain.get("offload") or {}
    if isinstance(offload.get("vram_gib"), int):  # 8 and 8.0 are one configuration
        offload["vram_gib"] = float(offload["vram_gib"])
    return plain
