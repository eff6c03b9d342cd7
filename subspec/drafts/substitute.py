"""``draft=subspec``: the substitute (SubSpec, arXiv 2509.18344, section 3), the target with quantized decoder Linears.

It shares the target's embeddings, norms, rotary tables, LM head and KV cache. Its own rows live in the cache's
draft region for one iteration only: the committed prefix it attends to always holds the target's exact keys and
values, which keeps its acceptance high. Beside a whole target it is a second graph of modules; beside a streamed one
it is made of the layers while they pass through the device, and its levels are captured.
"""

import copy
import time

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from subspec.codec.coded_cache import CodedCache
from subspec.codec.restore import KERNELS as RESTORED_KERNELS
from subspec.config.enums import Codec, Kernel
from subspec.config.schema import Cache, Config, NoQuantConfig, SubstituteDraftConfig, Unpack
from subspec.decoding.batch import DraftRows
from subspec.decoding.draft import LevelDraft
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.spec import BuiltDraft, DraftSpec, check_target_levels
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.quantization import LevelQuantization, level_quantization
from subspec.memory.allocator import Allocation
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.draft_memory import CAPTURED_ITEMSIZE, DraftMemory, SizingInputs
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.quantize_model import QuantReport
from subspec.store.substitutes import CachedQuantizer, SubstituteStore
from subspec.targets.meta_model import parameter_shapes


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
        linears = fused_linears(quantization.exact, exact=True) + fused_linears(
            quantization.shapes, exact=False
        )
        self.level = captured_level_bytes(
            LevelShape.of(spec, linears, own_head=own_head), inputs.policy.width, inputs.sampling
        )
        shared_head = 0 if own_head else spec.vocab * spec.hidden * inputs.itemsize
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


def share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A second module graph over the same parameters and buffers, whose modules can be replaced."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


class SubstituteDraft(LevelDraft):
    """Drafts with a graph of modules on the target's cache.

    Args:
        substitute: a graph made by :func:`share_parameters` whose decoder Linears were quantized.
        temperature: of the draft distribution.
    """

    shares_cache = True

    def __init__(
        self, substitute: PreTrainedModel, temperature: float = SubstituteDraftConfig.temperature
    ) -> None:
        super().__init__(temperature)
        self.model = TargetModel(substitute)
        self._rows: DraftRows | None = None
        self._whole_levels = True

    def begin(self, cache: KVCache) -> None:
        if self._rows is None or self._rows.cache is not cache:
            self._rows = DraftRows(cache, self.model.device)
        self._start_tree()

    def expand(self, tree: Tree, frontier: Tensor) -> Tensor:
        hidden = self.model.forward(self.rows.take(tree, frontier))
        self._whole_levels = self._whole_levels and frontier.numel() == tree.level_size
        return self.model.logits(hidden.final)

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

    @classmethod
    def memory(cls, inputs: SizingInputs) -> DraftMemory:
        return SubstituteMemory(inputs)

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        check_target_levels(config, model)

    def prepare(self) -> None:
        """Of a streamed target: choose the kernels by measurement, while the device is empty.

        Raises:
            ConfigError: no kernel computes with the quantizer's settings.
        """
        context = self.context
        config, draft = context.config, context.config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        if context.plan is None:
            return
        self._started = time.perf_counter()
        coded = context.plan.codec is Codec.substitute
        self._quantization = quantization = level_quantization(
            config.quant,
            parameter_shapes(context.model)[0],
            (context.model.vocab_size, context.model.hidden_size),
            kernel=draft.kernel.value,
        )
        try:
            kernels = choose_kernels(
                quantization.shapes,
                context.policy.width,
                context.device,
                formats=quantization.formats,
                kernel=draft.kernel.value,
                allowed=RESTORED_KERNELS if coded else None,
                overlap=None if draft.overlap_launches else False,
                note=context.note,
            )
        except ConfigError as error:
            if not coded or draft.kernel is not Kernel.auto:
                raise
            raise ConfigError(f"{error}; offload.codec=none takes other kernels, too") from error
        skip_layers = frozenset(getattr(config.quant, "skip_layers", ()))
        self._layers = context.model.num_hidden_layers - len(skip_layers)
        self._facts = {
            "target": context.identity,
            "dtype": str(context.dtype),
            **quantization.quantizer.facts,
        }
        self._cache = getattr(config.quant, "cache", Cache.off)
        store = SubstituteStore(
            self._facts,
            cache=self._cache,
            folder=getattr(config.quant, "folder", None),
            expected_bytes=quantization.stored_bytes(self._layers),
            note=context.note,
        )
        self._quantizer = CachedQuantizer(quantization.quantizer, store)
        if coded:
            self.coded = self._open_coded(context.plan.layer_bytes)
        self.builder = SubstituteBuilder(
            context.model,
            self._quantizer,
            formats=quantization.formats,
            kernel=kernels.variants,
            keep_exact=quantization.keep_exact,
            skip_layers=skip_layers,
        )
        self._report = QuantReport(config.quant.name, f"fused level, {kernels.summary()}")
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
        if self.builder is None:
            return self._build_modules(target, draft)
        report, builder = self._report, self.builder
        report.modules, report.weights, report.stored_bytes = (
            builder.modules,
            builder.weights,
            builder.stored_bytes,
        )
        report.bits = builder.bits
        report.details["cache"] = self._quantizer.store.report()
        report.seconds = time.perf_counter() - self._started
        model = level_model(target.model, builder.layers, builder.head)
        overlap = None if draft.overlap_launches else False
        return BuiltDraft(CapturedDraft(model, draft.temperature, overlap=overlap), report)

    def _build_modules(self, target: TargetModel, draft: SubstituteDraftConfig) -> BuiltDraft:
        context, on_cpu = self.context, target.device.type == "cpu"
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
        return BuiltDraft(SubstituteDraft(substitute, draft.temperature), report)
