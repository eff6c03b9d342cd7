"""Ready engines: the one place where an engine is built, around a target that is whole, streamed, or accelerate's."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspec.codec.coding import decoding_only, draft_head
from subspec.config.checks import streams_from_disk
from subspec.config.defaults import MOST_TEXTS
from subspec.config.enums import AUTO, Codec
from subspec.config.schema import (
    AccelerateOffloadConfig,
    BudgetedOffloadConfig,
    Config,
    NoDraftConfig,
    StreamOffloadConfig,
)
from subspec.decoding.bitwise_choice import Bitwise, choose_bitwise, why_not
from subspec.decoding.engine import Engine
from subspec.decoding.from_config import build_sampling, build_tree_policy
from subspec.decoding.pass_shapes import PassShapes
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.check_config import one_text_key
from subspec.drafts.registry import spec_of
from subspec.drafts.spec import BuiltDraft, DraftContext, DraftSpec
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB
from subspec.memory.device import bytes_of_others, index_of
from subspec.memory.draft_memory import kv_bytes
from subspec.offload.accelerate import AccelerateTarget, host_bytes
from subspec.offload.bandwidth import measure_link
from subspec.offload.disk import StoredLayer
from subspec.offload.loader import LoadedStream, load_streamed
from subspec.planning.budget import Budget, DeviceMemory, budget_of
from subspec.planning.disk_plan import plan_disk
from subspec.planning.plan import Plan, plan_run
from subspec.quant.quantize_model import Quantizer, QuantReport
from subspec.targets import Target, open_source, resolve_dtype
from subspec.targets.device import check_memory
from subspec.targets.load import weights_identity as target_identity
from subspec.targets.model_spec import ModelSpec
from subspec.targets.source import LayerSource
from subspec.utils.console import Note, print_note

CPU = torch.device("cpu")

ACCELERATE_RESERVE = 1.5
"""GiB of the budget that ``offload=accelerate`` leaves for activations, logits and the layer on its way."""


@dataclass
class Assembly:
    """A ready engine, with the facts of its parts for the record.

    Attributes:
        quant: the draft's quantization report; None: nothing was quantized.
        draft_facts, draft_summary: of ``BuiltDraft``.
        streamed: of a streamed target; owns its pinned memory.
        plan: that a streamed target was loaded by.
        budget: of accelerate's target; a streamed one has its plan's (:attr:`vram`).
    """

    engine: Engine
    bitwise: Bitwise
    quant: QuantReport | None = None
    draft_facts: dict[str, Any] = field(default_factory=dict)
    draft_summary: str = ""
    streamed: LoadedStream | None = None
    plan: Plan | None = None
    budget: Budget | None = None

    @property
    def vram(self) -> Budget | None:
        """The budget of device memory; None without offloading."""
        return self.budget if self.plan is None else self.plan.vram

    @property
    def target(self) -> TargetModel:
        """The engine's target."""
        return self.engine.target

    @property
    def sampling(self) -> Sampling:
        """The target's distribution."""
        return self.engine.sampler.sampling

    def facts(self) -> dict[str, Any]:
        """The effects of offloading, drafting and arithmetic, for the record."""
        engine, streamed = self.engine, self.streamed
        facts: dict[str, Any] = {
            "kv_cache_bytes": engine.cache.nbytes,
            "bitwise": self.bitwise.facts(),
            "captured_passes": self.target.captured,
            **self.target.facts(),
        }
        if self.vram is not None and self.target.device.type == "cuda":
            facts |= self.vram.facts()
        if self.plan is not None:
            facts["plan"] = self.plan.to_dict()
            facts["prefill_chunk"] = self.plan.prefill_chunk
            facts["codec"] = self.plan.codec.value
        if streamed is not None:
            facts |= streamed.facts()
        if self.draft_facts:
            facts["draft"] = self.draft_facts
        if engine.draft is not None:
            facts |= engine.draft.facts()
        return facts

    def close(self) -> None:
        """Free page-locked host memory; the engine must not be used any more."""
        if self.streamed is not None:
            self.streamed.close()


def assemble(
    config: Config,
    target: Target,
    note: Note = print_note,
    *,
    policy: TreePolicy | None = None,
    sampling: Sampling | None = None,
    quantizer: Quantizer | None = None,
) -> Assembly:
    """An engine around a target that is whole on one device.

    Args:
        note: told about long steps and about problems that do not end the run.
        policy, sampling, quantizer: used instead of those that ``config`` describes.
    """
    model, device = TargetModel(target.model), target.device
    bitwise = choose_bitwise(
        config.decoding.bitwise, target.model.config, target.dtype, device, note, loaded=target.model
    )
    bitwise.apply(model)
    built = None
    if (kind := spec_of(config.draft)) is not None:
        policy = policy or build_tree_policy(config.tree)
        context = _draft_context(config, policy, target, target.model.config, device)
        with kind(replace(context, quantizer=quantizer, note=note)) as spec:
            built = spec.build(model)
    texts = _whole_texts(config, target, built, policy)
    return _assembly(config, target, model, bitwise, built, policy, texts=texts, sampling=sampling)


def assemble_streamed(
    config: Config,
    source: LayerSource,
    plan: Plan,
    device: torch.device,
    note: Note = print_note,
    *,
    stored: Sequence[StoredLayer] = (),
) -> Assembly:
    """Load a target as ``plan`` says and build an engine around it.

    Args:
        source: of the exact weights.
        plan: of :func:`plan_for`.
        stored: layers of the plan's that stream from files as they are.
        note: as of :func:`assemble`.
    """
    # While the device is empty: the first run on a GPU measures kernels.
    bitwise = choose_bitwise(config.decoding.bitwise, source.config, source.dtype, device, note)
    drafts, policy = not isinstance(config.draft, NoDraftConfig), build_tree_policy(config.tree)
    spec: DraftSpec | None = None
    # Without a draft, coded layers are restored by the substitute all the same.
    described = decoding_only(config) if plan.codec is Codec.substitute and not drafts else config
    described = draft_head(described, codes=plan.coded_head_bytes > 0, texts=plan.texts)
    if (kind := spec_of(described.draft)) is not None:
        context = _draft_context(described, policy, source, source.config, device)
        spec = kind(replace(context, plan=plan, note=note))
    if spec is None:
        streamed = load_streamed(source, plan, device, stored=stored, note=note)
    else:
        with spec:
            passes = None if bitwise.reason else PassShapes.of(source.config, source.dtype.itemsize, sliced=True)
            streamed = load_streamed(
                source, plan, device, builder=spec.builder, coded=spec.coded, stored=stored, passes=passes, note=note
            )
    bitwise.apply(streamed.target)
    built = spec.build(streamed.target) if spec is not None and drafts else None
    return _assembly(
        config, source, streamed.target, bitwise, built, policy, texts=plan.texts, streamed=streamed, plan=plan
    )


def assemble_accelerate(config: Config, device: torch.device, note: Note = print_note) -> tuple[Assembly, Target]:
    """Load a target that accelerate offloads and build an engine around it, for plain decoding."""
    offload = config.offload
    assert isinstance(offload, AccelerateOffloadConfig)
    vram = budget_of(offload, DeviceMemory.measured(device))
    if offload.vram_gib == AUTO:
        note(f"offload.vram_gib=auto: {vram.bytes / GIB:g} GiB")
    weight_bytes = vram.allocator - int(ACCELERATE_RESERVE * GIB)
    if weight_bytes <= 0:
        raise ConfigError(
            f"offload.vram_gib={offload.vram_gib} leaves {vram.allocator / GIB:.2f} GiB for PyTorch and nothing for "
            f"weights: accelerate needs more than {ACCELERATE_RESERVE} GiB"
        )
    cap_device(vram.allocator / GIB, device)
    source = open_source(config.target, resolve_dtype(config.target.dtype, device), device, note=note)
    what = f"offload=accelerate keeps {source.name} in host memory"
    check_memory(host_bytes(source, weight_bytes), CPU, what)
    target = AccelerateTarget(source, device, weight_bytes)
    bitwise = choose_bitwise(config.decoding.bitwise, source.config, source.dtype, device, note, accelerate=True)
    assembly = _assembly(config, source, target, bitwise, None, None)
    assembly.budget = vram
    return assembly, Target.of(source, target.model, device)


def _whole_texts(config: Config, target: Target, built: BuiltDraft | None, policy: TreePolicy | None) -> int:
    """Texts that run side by side on a whole target: ``auto`` is for GPUs, with caches in half of the free memory."""
    texts, decoding = config.decoding.texts, config.decoding
    if texts != AUTO:
        return texts
    if target.device.type != "cuda" or one_text_key(config):
        return 1
    shares = built is not None and built.draft.shares_cache and policy is not None
    rows = policy.draft_rows if shares and policy is not None else 0
    spec, tree = ModelSpec.of(target.model.config), policy.pass_nodes if policy is not None else 1
    cache = kv_bytes(spec, decoding.max_length, rows, tree, target.dtype.itemsize)
    return max(1, min(MOST_TEXTS, torch.cuda.mem_get_info(target.device)[0] // 2 // cache))


def _draft_context(
    config: Config, policy: TreePolicy, target: Target | LayerSource, model: PretrainedConfig, device: torch.device
) -> DraftContext:
    """The inputs of a draft's construction that are known of any target."""
    tokenizer = target.tokenizer if isinstance(target.tokenizer, PreTrainedTokenizerBase) else None
    return DraftContext(config, policy, target.name, model, tokenizer, target.dtype, target.identity, device)


def _assembly(
    config: Config,
    described: Target | LayerSource,
    target: TargetModel,
    bitwise: Bitwise,
    built: BuiltDraft | None,
    policy: TreePolicy | None,
    *,
    texts: int = 1,
    sampling: Sampling | None = None,
    streamed: LoadedStream | None = None,
    plan: Plan | None = None,
) -> Assembly:
    """Build the engine.

    Args:
        described: has the tokenizer and the ids that end a text.
    """
    engine = Engine(
        target,
        built.draft if built else None,
        policy if built else None,
        sampling=sampling or build_sampling(config),
        max_length=config.decoding.max_length,
        prefill_chunk=plan.prefill_chunk if plan else config.decoding.prefill_chunk,
        eos_token_ids=described.eos_token_ids,
        tokenizer=described.tokenizer,
        texts=texts,
    )
    if built is None:
        return Assembly(engine, bitwise, streamed=streamed, plan=plan)
    return Assembly(engine, bitwise, built.quant, built.facts, built.summary, streamed, plan)


def plan_for(config: Config, model: PretrainedConfig, device: torch.device | None) -> Plan:
    """The plan of a streamed run: for this machine's device, or, with ``device`` None, for a named GPU.

    The bandwidth of a disk is measured on the files that are read, so its plan has none yet.
    """
    if not isinstance(config.offload, StreamOffloadConfig):
        raise ConfigError(f"plan_only=true plans offload=stream, not offload={config.offload.name}")
    if streams_from_disk(config):
        return plan_disk(
            config,
            model,
            itemsize=resolve_dtype(config.target.dtype, CPU).itemsize,
            process_bytes=psutil.Process().memory_info().rss,
            host_free=psutil.virtual_memory().available,
        )
    link, memory = None, None
    if device is not None and device.type == "cuda":
        dtype = resolve_dtype(config.target.dtype, device)
        if why_not(config.decoding.bitwise, model, dtype, device):  # plan the arithmetic that will run
            config = replace(config, decoding=replace(config.decoding, bitwise=False))
        memory = DeviceMemory.measured(device)
        if config.offload.link_gb_per_s is None:
            link = measure_link(device)
    return plan_run(config, model, link_gb_per_s=link, host_free=psutil.virtual_memory().available, device=memory)


def check_offload(config: Config, device: torch.device) -> None:
    """Check the offloading against the device and the other groups.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    offload = config.offload
    if isinstance(offload, AccelerateOffloadConfig) and not isinstance(config.draft, NoDraftConfig):
        raise ConfigError("offload=accelerate is a baseline of plain decoding: set draft=none")
    if isinstance(offload, StreamOffloadConfig) and offload.card is not None:
        raise ConfigError(f"offload.card={offload.card} is for planning: add plan_only=true, or leave it out")
    if streams_from_disk(config):
        return
    if isinstance(offload, StreamOffloadConfig | AccelerateOffloadConfig) and device.type != "cuda":
        raise ConfigError(
            f"offload={offload.name} needs a CUDA device, and this run is on the {device.type}: set offload=none, "
            "offload=stream with device=cpu to stream from the disk, or plan_only=true with offload=stream to see the "
            "plan without one"
        )
    if isinstance(offload, BudgetedOffloadConfig):
        budget_of(offload, DeviceMemory.measured(device))


def check_draft(config: Config, model: PretrainedConfig, note: Note) -> None:
    """Check the draft's own files, before the target's weights are fetched or read.

    Args:
        model: the target's transformers configuration.

    Raises:
        SubspecError: in one line with the remedy.
    """
    if (spec := spec_of(config.draft)) is not None:
        spec.check_files(config, model, note)


def weights_identity(config: Config, note: Note = print_note) -> dict[str, str]:
    """Digests of the weights that a configuration refers to: ``target``, and ``draft`` if it has weights of its own.

    They are equal if and only if the contents are (large weights are sampled), wherever the files lie. Files are
    fetched first if need be; nothing is loaded.

    Raises:
        SubspecError: in one line with the remedy.
    """
    spec = spec_of(config.draft)
    draft = spec.weights_identity(config, note) if spec is not None else None
    return {"target": target_identity(config.target, note=note), **({"draft": draft} if draft else {})}


def cap_device(allocator_gib: float, device: torch.device) -> None:
    """Limit PyTorch's allocations."""
    index = index_of(device)  # the fraction needs a number
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allocator_gib * GIB / total), index)


def free_device(device: torch.device) -> None:
    """Release the memory of an earlier run of this process, its cap and its peaks."""
    if device.type != "cuda":
        return
    index = index_of(device)  # the fraction needs a number
    bytes_of_others(index)  # known only while this process holds nothing
    gc.collect()  # modules refer to each other
    torch.cuda.set_per_process_memory_fraction(1.0, index)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
