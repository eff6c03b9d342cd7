"""``draft=subspec``: the substitute (SubSpec, arXiv 2509.18344, section 3), the target with quantized decoder Linears.

It shares the target's embeddings, norms, rotary tables, LM head and KV cache. Its own rows live in the cache's
draft region for one iteration only: the committed prefix it attends to always holds the target's exact keys and
values, which keeps its acceptance high. Beside a streamed target it is made of the layers while they pass through the
device. Its levels are captured on a GPU and fused on a CPU; where they cannot be, it is a second graph of modules.
"""

import copy
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from subspec.codec.coded_cache import CodedCache
from subspec.codec.restore import KERNELS as RESTORED_KERNELS
from subspec.config.checks import streams_from_disk
from subspec.config.enums import Codec, HiggsKernel, Kernel
from subspec.config.schema import Cache, Config, NoQuantConfig, SubstituteDraftConfig, Unpack
from subspec.decoding.batch import DraftRows, TokenBatch, join
from subspec.decoding.draft import LevelDraft, NextLevel
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.cpu_substitute import CpuSubstituteMemory, cpu_quantization, head_format
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.spec import BuiltDraft, DraftSpec, capture, check_target_levels, why_not_captured
from subspec.drafts.substitute_memory import SubstituteMemory
from subspec.drafts.vocabulary import draft_ids, file_digest, ids_digest, known_tokens
from subspec.errors import ConfigError
from subspec.levels.build import SubstituteBuilder, level_model
from subspec.levels.cpu_levels import CpuLevels
from subspec.levels.dense import layer_views
from subspec.levels.quantization import LevelQuantization, level_quantization
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.quant.choose_kernels import KernelChoice, choose_kernels, settings_rows
from subspec.quant.cpu_linear import CpuHeadFormat
from subspec.quant.kernel_times import CpuBench
from subspec.quant.quantize_model import QuantReport
from subspec.store.substitutes import CachedQuantizer, SubstituteStore
from subspec.targets.meta_model import parameter_shapes
from subspec.utils.console import Note


def share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A second module graph over the same parameters and buffers, whose modules can be replaced."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class SubstituteDraft(LevelDraft):
    """Drafts with a model of its own on the target's cache.

    Args:
        substitute: a graph made by :func:`share_parameters` whose decoder Linears were quantized, or
            :class:`~subspec.levels.cpu_levels.CpuLevels`.
        temperature: of the draft distribution.
    """

    shares_cache = True
    whole_levels = True
    rows: DraftRows | None = None  # the draft region of the cache, from begin() on

    def __init__(
        self, substitute: PreTrainedModel | TargetModel, temperature: float = SubstituteDraftConfig.temperature
    ) -> None:
        super().__init__(temperature)
        self.model = substitute if isinstance(substitute, TargetModel) else TargetModel(substitute)

    def begin(self, cache: KVCache) -> None:
        if self.rows is None or self.rows.cache is not cache:
            self.rows = DraftRows(cache, self.model.device)
        self._start_tree()

    def fork(self) -> "SubstituteDraft":
        return SubstituteDraft(self.model, self.temperature)

    def move(self, cache: KVCache) -> None:
        self.rows.cache = cache

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        return self.model.logits(self.model.forward(self._take(tree, frontier)).final)

    def extend_together(self, levels: Sequence[NextLevel], policy: TreePolicy) -> list[Tensor]:
        """One pass for all texts."""
        batches = [own.draft._take(own.tree, own.frontier) for own in levels]
        logits = self.model.logits(self.model.forward(join(batches)).final)
        rows = logits.split([own.frontier.numel() for own in levels])
        return [own.grow(policy, part) for own, part in zip(levels, rows, strict=True)]

    def _take(self, tree: Tree, frontier: Tensor) -> TokenBatch:
        self.whole_levels = self.whole_levels and frontier.numel() == tree.level_size
        return self.rows.take(tree, frontier)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Drop the draft's approximate rows; the target has written exact ones for the accepted nodes."""
        self._start_tree()

    def _start_tree(self) -> None:
        self.rows.used, self.whole_levels = 0, True

    @property
    def node_of_row(self) -> Tensor:
        return self.rows.node_of_row

    def rows_used(self, tree: Tree) -> int:
        return self.rows.used

    def append(self, tokens: Tensor) -> None:
        self.model.append(tokens, self.rows.cache)


class SubstituteSpec(DraftSpec):
    """``draft=subspec``."""

    @classmethod
    def check(cls, config: Config) -> None:
        if isinstance(config.quant, NoQuantConfig):
            raise ConfigError(
                "draft=subspec without a quantizer would be the target itself: set quant=hqq, "
                "or draft=none for plain decoding"
            )
        file_digest(config.draft.vocab)  # reads a file of ids

    @classmethod
    def memory(cls, inputs: SizingInputs) -> DraftMemory:
        return (CpuSubstituteMemory if streams_from_disk(inputs.config) else SubstituteMemory)(inputs)

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        if not streams_from_disk(config):
            check_target_levels(config, model)
        elif isinstance(why := cpu_quantization(config, model), str):
            raise ConfigError(
                f"draft=subspec with offload=stream and device=cpu drafts with fused levels: {why}; set another draft, "
                "or offload=none"
            )
        width = getattr(config.tree, "width", None) or 1  # null until the device is known
        draft_ids(config.draft.vocab, model.vocab_size, width)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        return file_digest(config.draft.vocab)

    @property
    def _on_cpu(self) -> bool:
        """Whether levels are fused for a CPU, instead of captured."""
        context = self.context
        return streams_from_disk(context.config) or (context.plan is None and context.device.type == "cpu")

    @functools.cached_property
    def _ids(self) -> Tensor | None:
        """The ids that the draft's LM head knows; None: all."""
        context = self.context
        ids = draft_ids(context.config.draft.vocab, context.model.vocab_size, context.policy.width)
        return None if ids is None else torch.tensor(ids)

    def prepare(self) -> None:
        """Of a streamed target: choose the kernels by measurement, while the device is empty.

        Raises:
            ConfigError: no kernel computes with the quantizer's settings.
        """
        plan = self.context.plan
        if plan is None:
            return
        coded, found = plan.codec is Codec.substitute, self._find_quantization()
        assert not isinstance(found, str)  # check_target
        try:
            kernels = self._choose_kernels(found, coded=coded)
        except ConfigError as error:
            if not coded or self.context.config.draft.kernel is not Kernel.auto:
                raise
            raise ConfigError(f"{error}; offload.codec=none takes other kernels, too") from error
        self._open_builder(found, kernels, plan.layer_bytes if coded else None)

    def _find_quantization(self) -> LevelQuantization | str:
        """The quantization of fused levels; or why there are none.

        Raises:
            ConfigError: settings contradict the target.
        """
        config, model = self.context.config, self.context.model
        if self._on_cpu:
            return cpu_quantization(config, model)
        head = (known_tokens(config.draft, model.vocab_size), model.hidden_size)
        return level_quantization(config.quant, parameter_shapes(model)[0], head, kernel=config.draft.kernel.value)

    def _choose_kernels(self, quantization: LevelQuantization, *, coded: bool = False) -> KernelChoice:
        self._started = time.perf_counter()
        context, draft, model = self.context, self.context.config.draft, self.context.model
        shapes, formats, options = quantization.shapes, quantization.formats, {}
        if self._on_cpu:
            shapes = {"head": (known_tokens(draft, model.vocab_size), model.hidden_size), **shapes}
            formats = {"head": head_format(context.config, model), **formats}
            options["bench"] = CpuBench()
        else:
            options = {"kernel": draft.kernel.value, "allowed": RESTORED_KERNELS if coded else quantization.kernels}
            options["overlap"] = None if draft.overlap_launches else False
        rows = settings_rows(context.level_rows, context.policy.width, formats.values(), context.device)
        return choose_kernels(shapes, rows, context.device, formats=formats, note=context.note, **options)

    def _open_builder(
        self, quantization: LevelQuantization, kernels: KernelChoice, coded_bytes: int | None = None
    ) -> None:
        """Open the caches and the builder of levels.

        Args:
            coded_bytes: exact bytes of a layer that is to be coded; None: no layer is.
        """
        context, quant = self.context, self.context.config.quant
        self._quantization, self._kernels = quantization, kernels.variants
        skip_layers = frozenset(getattr(quant, "skip_layers", ()))
        self._layers = context.model.num_hidden_layers - len(skip_layers)
        facts = {"target": context.identity, "dtype": str(context.dtype), **quantization.quantizer.facts}
        if self._ids is not None and "head" in quantization.shapes:
            facts["head_ids"] = ids_digest(self._ids.tolist())
        kept: dict[str, Any] = {"cache": getattr(quant, "cache", Cache.off), "note": context.note}
        stored_bytes, folder = quantization.stored_bytes(self._layers), getattr(quant, "folder", None)
        store = SubstituteStore(facts, folder=folder, expected_bytes=stored_bytes, **kept)
        self._quantizer = CachedQuantizer(quantization.quantizer, store)
        self.builder = SubstituteBuilder(
            self._quantizer,
            formats=quantization.formats,
            kernel=kernels.variants,
            keep_exact=quantization.keep_exact,
            skip_layers=skip_layers,
            dtype=torch.float32 if self._on_cpu else torch.bfloat16,
            ids=self._ids,
        )
        if coded_bytes is not None:  # in the cache, even of a substitute in ``quant.folder``
            coded_bytes *= self._layers
            self.coded = CodedCache(facts, self._quantizer, self.builder.linears, expected_bytes=coded_bytes, **kept)
        self._report = QuantReport(quant.name, f"fused level, {kernels.summary()}")
        self._report.details["kernels"] = kernels.to_dict()
        self._report.details["formats"] = {role: str(kept) for role, kept in quantization.formats.items()}

    def close(self) -> None:
        if self.builder is None:
            return
        try:
            # Before the substitute: a process that waits for the substitute then finds all of both.
            if self.coded is not None:
                self.coded.close()
        finally:
            self._quantizer.store.close()

    def build(self, target: TargetModel) -> BuiltDraft:
        if self.context.plan is None:
            if why := self._open_whole(target.dtype):
                return self._build_modules(target, why)
            for index, layer in enumerate(target.base.layers):
                self.builder.take(index, layer_views(layer))
            self.builder.head = self.builder.build_head(target.head.weight.data)
        builder, draft = self.builder, self.context.config.draft
        report = self._report
        report.modules, report.weights = builder.modules, builder.weights
        report.stored_bytes, report.bits = builder.stored_bytes, builder.bits
        report.details["cache"] = self._quantizer.store.report()
        report.seconds = time.perf_counter() - self._started
        if self._on_cpu:
            return self._build_cpu_levels(target)
        model = level_model(target.model, builder.layers, builder.head, self._ids)
        return BuiltDraft(capture(model, draft), report, {"levels": "captured"})

    def _open_whole(self, dtype: torch.dtype) -> str:
        """Open the builder beside a target in ``dtype`` that is whole; or why the substitute runs as modules."""
        context, unpack = self.context, self.context.config.draft.unpack
        kernel = getattr(context.config.quant, "kernel", HiggsKernel.auto)
        if unpack is not Unpack.auto:
            return f"draft.unpack={unpack.value}"
        if context.quantizer is not None:
            return "the quantizer is for modules"
        if not self._on_cpu and kernel is not HiggsKernel.auto:
            return f"quant.kernel={kernel.value}"
        if not self._on_cpu and (why := why_not_captured(context, context.model, dtype)):
            return why
        try:
            found = self._find_quantization()
            if isinstance(found, str):
                return found
            kernels = self._choose_kernels(found)
        except ConfigError as error:  # modules take it, or refuse it with their own reason
            return "its Linears that would be fused are quantized differently" if self._on_cpu else str(error)
        self._open_builder(found, kernels)
        return ""

    def _build_cpu_levels(self, target: TargetModel) -> BuiltDraft:
        """Fused levels of the layers that the builder has taken."""
        builder, quantization, own, report = self.builder, self._quantization, self.builder.head, self._report
        if own is None:
            exact = target.head.weight.data
            rows = exact if self._ids is None else exact.index_select(0, self._ids)
            own = CpuHeadFormat().linear(self._kernels["head"], rows.float(), swiglu=False)
        # The integers' own size: kernels of a CPU hold them unpacked to whatever is the fastest.
        report.stored_bytes = quantization.stored_bytes(self._layers)
        report.bits = {
            role: round(8 * quantization.formats[role].stored_bytes(n, k) / (n * k), 4)
            for role, (n, k) in quantization.shapes.items()
        }
        levels = CpuLevels(target.model, level_model(target.model, builder.layers, own, self._ids))
        facts = {"levels": "fused, CPU", "kernel": {role: variant.kernel for role, variant in self._kernels.items()}}
        return BuiltDraft(SubstituteDraft(levels, self.context.config.draft.temperature), report, facts)

    def _build_modules(self, target: TargetModel, why: str) -> BuiltDraft:
        context, draft, on_cpu = self.context, self.context.config.draft, target.device.type == "cpu"
        if self._ids is not None:
            raise ConfigError(f"draft.vocab is for fused and captured levels ({why}): leave it at null")
        substitute = share_parameters(target.model)
        report = quantize_draft(
            substitute,
            context.config.quant,
            quantizer=context.quantizer,
            identity=context.identity,
            dtype=target.dtype,
            device=target.device,
            # hqq on a CPU dequantizes in every forward, so memory is traded for time; a GPU's memory is scarce.
            unpack=draft.unpack is Unpack.always or (draft.unpack is Unpack.auto and on_cpu),
            note=context.note,
        )
        facts = {"levels": "modules", "kernel": report.backend, "reason": why}
        return BuiltDraft(SubstituteDraft(substitute, draft.temperature), report, facts)
