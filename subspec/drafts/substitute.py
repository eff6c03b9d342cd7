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
from subspec.drafts.spec import BuiltDraft, DraftSpec, check_target_levels, why_not_captured
from subspec.drafts.substitute_memory import SubstituteMemory
from subspec.drafts.vocabulary import draft_ids, file_digest, ids_digest, known_tokens
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.cpu_levels import CpuLevels
from subspec.levels.dense import layer_views
from subspec.levels.quantization import LevelQuantization, level_quantization
from subspec.memory.draft_memory import DraftMemory, SizingInputs
from subspec.quant.choose_kernels import KernelChoice, choose_kernels
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

    def __init__(
        self, substitute: PreTrainedModel | TargetModel, temperature: float = SubstituteDraftConfig.temperature
    ) -> None:
        super().__init__(temperature)
        self.model = substitute if isinstance(substitute, TargetModel) else TargetModel(substitute)
        self._rows: DraftRows | None = None
        self._whole_levels = True

    def begin(self, cache: KVCache) -> None:
        if self._rows is None or self._rows.cache is not cache:
            self._rows = DraftRows(cache, self.model.device)
        self._start_tree()

    def fork(self) -> "SubstituteDraft":
        return SubstituteDraft(self.model, self.temperature)

    def move(self, cache: KVCache) -> None:
        self.rows.cache = cache

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        return self.model.logits(self.model.forward(self._take(tree, frontier)).final)

    def extend_together(self, levels: Sequence[NextLevel], policy: TreePolicy) -> list[Tensor]:
        """One pass for all texts."""
        batches = []
        for own in levels:
            assert isinstance(own.draft, SubstituteDraft)
            batches.append(own.draft._take(own.tree, own.frontier))
        logits = self.model.logits(self.model.forward(join(batches)).final)
        rows = logits.split([own.frontier.numel() for own in levels])
        return [own.grow(policy, part) for own, part in zip(levels, rows, strict=True)]

    def _take(self, tree: Tree, frontier: Tensor) -> TokenBatch:
        self._whole_levels = self._whole_levels and frontier.numel() == tree.level_size
        return self.rows.take(tree, frontier)

    def commit(self, tree: Tree, path: Tensor, hidden: Tensor | None) -> None:
        """Drop the draft's approximate rows; the target has written exact ones for the accepted nodes."""
        self._start_tree()

    def _start_tree(self) -> None:
        self.rows.used, self._whole_levels = 0, True

    @property
    def rows(self) -> DraftRows:
        """The draft region of the cache."""
        if self._rows is None:
            raise RuntimeError("begin() comes first")
        return self._rows

    @property
    def whole_levels(self) -> bool:
        return self._whole_levels

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
        file_digest(getattr(config.draft, "vocab", None))  # reads a file of ids

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
        draft_ids(getattr(config.draft, "vocab", None), model.vocab_size, width)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str | None:
        return file_digest(getattr(config.draft, "vocab", None))

    def prepare(self) -> None:
        """Of a streamed target: choose the kernels by measurement, while the device is empty.

        Raises:
            ConfigError: no kernel computes with the quantizer's settings.
        """
        context, draft = self.context, self.context.config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        if context.plan is None:
            return
        if streams_from_disk(context.config):
            found = cpu_quantization(context.config, context.model)
            assert not isinstance(found, str)  # check_target
            self._open_cpu_builder(found)
            return
        self._started = time.perf_counter()
        coded = context.plan.codec is Codec.substitute
        self._quantization = self._captured_quantization()
        try:
            kernels = self._choose_kernels(draft, coded=coded)
        except ConfigError as error:
            if not coded or draft.kernel is not Kernel.auto:
                raise
            raise ConfigError(f"{error}; offload.codec=none takes other kernels, too") from error
        coded_bytes = context.plan.layer_bytes if coded else None
        self._open_builder(kernels, coded_bytes, torch.bfloat16)

    def _captured_quantization(self) -> LevelQuantization:
        config, model = self.context.config, self.context.model
        draft = config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        head = (known_tokens(draft, model.vocab_size), model.hidden_size)
        layer = parameter_shapes(model)[0]
        return level_quantization(config.quant, layer, head, kernel=draft.kernel.value)

    @functools.cached_property
    def _ids(self) -> Tensor | None:
        """The ids that the draft's LM head knows; None: all."""
        context = self.context
        ids = draft_ids(context.config.draft.vocab, context.model.vocab_size, context.policy.width)
        return None if ids is None else torch.tensor(ids)

    def _choose_kernels(self, draft: SubstituteDraftConfig, *, coded: bool = False) -> KernelChoice:
        context, quantization = self.context, self._quantization
        return choose_kernels(
            quantization.shapes,
            context.level_rows,
            context.device,
            formats=quantization.formats,
            kernel=draft.kernel.value,
            allowed=RESTORED_KERNELS if coded else None,
            overlap=None if draft.overlap_launches else False,
            note=context.note,
        )

    def _open_builder(self, kernels: KernelChoice, coded_bytes: int | None, dtype: torch.dtype) -> None:
        """Open the caches and the builder of levels.

        Args:
            coded_bytes: exact bytes of a layer that is to be coded; None: no layer is.
            dtype: of everything that is not quantized.
        """
        context, quantization = self.context, self._quantization
        quant = context.config.quant
        skip_layers = frozenset(getattr(quant, "skip_layers", ()))
        self._layers = context.model.num_hidden_layers - len(skip_layers)
        self._facts = {"target": context.identity, "dtype": str(context.dtype), **quantization.quantizer.facts}
        if self._ids is not None and "head" in quantization.shapes:
            self._facts["head_ids"] = ids_digest(self._ids.tolist())
        self._cache = getattr(quant, "cache", Cache.off)
        store = SubstituteStore(
            self._facts,
            cache=self._cache,
            folder=getattr(quant, "folder", None),
            expected_bytes=quantization.stored_bytes(self._layers),
            note=context.note,
        )
        self._quantizer = CachedQuantizer(quantization.quantizer, store)
        if coded_bytes is not None:
            self.coded = self._open_coded(coded_bytes)
        self.builder = SubstituteBuilder(
            context.model,
            self._quantizer,
            formats=quantization.formats,
            kernel=kernels.variants,
            keep_exact=quantization.keep_exact,
            skip_layers=skip_layers,
            dtype=dtype,
            ids=self._ids,
        )
        self._report = QuantReport(quant.name, f"fused level, {kernels.summary()}")
        self._report.details["kernels"] = kernels.to_dict()
        self._report.details["formats"] = {role: str(kept) for role, kept in quantization.formats.items()}

    def _open_coded(self, layer_bytes: int) -> CodedCache:
        """The exact layers as earlier runs coded them; in the cache, even of a substitute in ``quant.folder``."""
        roles = [role for role in self._quantization.shapes if role != "head"]
        linears = [f"{name}.weight" for role in roles for name in ROLES[role]]
        return CodedCache(
            self._facts,
            self._quantizer,
            linears,
            cache=self._cache,
            expected_bytes=self._layers * layer_bytes,
            note=self.context.note,
        )

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
        draft = self.context.config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        if self.context.plan is None:
            on_cpu = target.device.type == "cpu"
            found = self._cpu_quantization(target, draft) if on_cpu else self._take_whole(target, draft)
            if isinstance(found, str):
                return self._build_modules(target, draft, found)
            if found is not None:
                builder = self._open_cpu_builder(found)
                for index, layer in enumerate(target.base.layers):
                    builder.take(index, layer_views(layer))
                builder.head = builder.build_head(target.head.weight.data)
                return self._build_cpu_levels(target, draft)
        elif streams_from_disk(self.context.config):
            return self._build_cpu_levels(target, draft)
        assert self.builder is not None
        builder = self.builder
        model = level_model(target.model, builder.layers, builder.head, self._ids)
        overlap = None if draft.overlap_launches else False
        captured = CapturedDraft(model, draft.temperature, overlap=overlap)
        return BuiltDraft(captured, self._finish_report(builder), {"levels": "captured"})

    def _take_whole(self, target: TargetModel, draft: SubstituteDraftConfig) -> str | None:
        """Quantize the layers of a target on a GPU for captured levels; or why the substitute runs as modules."""
        context, self._started = self.context, time.perf_counter()
        if draft.unpack is not Unpack.auto:
            return f"draft.unpack={draft.unpack.value}"
        if context.quantizer is not None:
            return "the quantizer is for modules"
        kernel = getattr(context.config.quant, "kernel", HiggsKernel.auto)
        if kernel is not HiggsKernel.auto:
            return f"quant.kernel={kernel.value}"
        if why := why_not_captured(context, context.model, target.dtype):
            return why
        try:
            self._quantization = self._captured_quantization()
            kernels = self._choose_kernels(draft)
        except ConfigError as error:  # modules take it, or refuse it with their own reason
            return str(error)
        self._open_builder(kernels, None, torch.bfloat16)
        assert self.builder is not None
        for index, layer in enumerate(target.base.layers):
            self.builder.take(index, layer_views(layer))
        self.builder.head = self.builder.build_head(target.head.weight.data)
        return None

    def _finish_report(self, builder: SubstituteBuilder) -> QuantReport:
        report = self._report
        report.modules, report.weights = builder.modules, builder.weights
        report.stored_bytes, report.bits = builder.stored_bytes, builder.bits
        report.details["cache"] = self._quantizer.store.report()
        report.seconds = time.perf_counter() - self._started
        return report

    def _cpu_quantization(self, target: TargetModel, draft: SubstituteDraftConfig) -> LevelQuantization | str:
        """The quantization of fused levels beside a whole target; or why the substitute runs as modules."""
        if draft.unpack is not Unpack.auto:
            return f"draft.unpack={draft.unpack.value}"
        if self.context.quantizer is not None:
            return "fused levels on a CPU take quant=hqq with quant.axis=1"
        try:
            return cpu_quantization(self.context.config, self.context.model)
        except ConfigError:  # modules take it, or refuse it with their own reason
            return "its Linears that would be fused are quantized differently"

    def _open_cpu_builder(self, quantization: LevelQuantization) -> SubstituteBuilder:
        """Choose the kernels of fused levels, and open the builder."""
        self._started, self._quantization = time.perf_counter(), quantization
        context = self.context
        known = known_tokens(context.config.draft, context.model.vocab_size)
        self._cpu_kernels = kernels = choose_kernels(
            {"head": (known, context.model.hidden_size), **quantization.shapes},
            context.level_rows,
            context.device,
            formats={"head": head_format(context.config, context.model), **quantization.formats},
            bench=CpuBench(),
            note=context.note,
        )
        self._open_builder(kernels, None, torch.float32)
        assert self.builder is not None
        return self.builder

    def _build_cpu_levels(self, target: TargetModel, draft: SubstituteDraftConfig) -> BuiltDraft:
        """Fused levels of the layers that the builder has taken."""
        builder, quantization, kernels = self.builder, self._quantization, self._cpu_kernels.variants
        assert builder is not None
        own = builder.head
        if own is None:
            exact = target.head.weight.data
            rows = exact if self._ids is None else exact.index_select(0, self._ids)
            own = CpuHeadFormat().linear(kernels["head"], rows.float(), swiglu=False)
        report = self._finish_report(builder)
        # The integers' own size: kernels of a CPU hold them unpacked to whatever is the fastest.
        report.stored_bytes = quantization.stored_bytes(self._layers)
        report.bits = {
            role: round(8 * quantization.formats[role].stored_bytes(n, k) / (n * k), 4)
            for role, (n, k) in quantization.shapes.items()
        }
        levels = CpuLevels(target.model, level_model(target.model, builder.layers, own, self._ids))
        facts = {"levels": "fused, CPU", "kernel": {role: variant.kernel for role, variant in kernels.items()}}
        return BuiltDraft(SubstituteDraft(levels, draft.temperature), report, facts)

    def _build_modules(self, target: TargetModel, draft: SubstituteDraftConfig, why: str) -> BuiltDraft:
        context, on_cpu = self.context, target.device.type == "cpu"
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
