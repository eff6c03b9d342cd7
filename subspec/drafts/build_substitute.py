"""``draft=subspec``: the target's own layers, quantized, as modules or as a fused level."""

import time

from subspec.config import Cache, HqqConfig, SubstituteDraftConfig, Unpack
from subspec.decoding.growth import Growth
from subspec.drafts.base import BuiltDraft, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.fused import FusedSubstitute
from subspec.drafts.fused_build import LayerFuser, role_shapes
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.kernels.choose import KernelChoice, choose_kernels
from subspec.offload.load import StreamedTarget
from subspec.quant.base import MODULE_CLASSES, QuantReport, linear_names, quantize_model
from subspec.quant.build import build_quantizer
from subspec.quant.code_cache import CachedCodes, cache_folder, stored_size
from subspec.quant.codes import HqqCodes
from subspec.targets.console import Note
from subspec.targets.source import LayerSource


class SubstituteBuilder:
    """A :class:`~subspec.drafts.base.DraftBuilder`."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        draft, quant, decoder = context.config.draft, context.config.quant, context.decoder
        assert isinstance(draft, SubstituteDraftConfig)
        # Unpacking trades memory for time: on a CPU hqq unpacks in every forward, on a GPU memory is what is scarce.
        unpack = draft.unpack is Unpack.always or (
            draft.unpack is Unpack.auto and decoder.device.type == "cpu"
        )
        started = time.perf_counter()
        substitute = share_parameters(context.target.model)
        report = quantize_model(
            substitute,
            build_quantizer(quant, decoder.dtype, decoder.device, unpack=unpack),
            modules=list(getattr(quant, "modules", [])),
            skip_layers=list(getattr(quant, "skip_layers", [])),
            progress=context.progress,
        )
        report.seconds = time.perf_counter() - started
        return BuiltDraft(SubstituteDraft(substitute, draft.temperature), report)

    def streamed(self, context: StreamContext) -> "StreamedSubstitute":
        return StreamedSubstitute(context)


class StreamedSubstitute(StreamedBuild):
    """Kernels are chosen while the device is empty, layers quantized while they pass through it.

    Raises:
        ConfigError: the quantizer's settings have no kernel.
    """

    def __init__(self, context: StreamContext) -> None:
        config, source = context.config, context.source
        quant, draft = config.quant, config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        if not isinstance(quant, HqqConfig) or (quant.bits, quant.group_size, quant.axis) != (4, 64, 1):
            raise ConfigError(
                "offload=stream runs its substitute with 4-bit kernels for groups of 64 along the inputs: set "
                "quant=hqq quant.bits=4 quant.group_size=64 quant.axis=1"
            )
        self._started = time.perf_counter()
        self._temperature = draft.temperature
        keep = {name for names in MODULE_CLASSES.values() for name in names} - linear_names(
            list(quant.modules)
        )
        keep_exact = frozenset(keep)
        kernels = _choose_kernels(draft, context.growth, source, keep_exact, context)
        self._quantizer = _open_cache(quant, source, keep_exact, context.note)
        self.fuser = LayerFuser(
            source.config, self._quantizer, kernel=kernels.variants, keep_exact=keep_exact
        )
        self.skip_layers = frozenset(quant.skip_layers)
        self._report = QuantReport(quant.name, f"fused level, {kernels.summary()}")
        self._report.details["kernels"] = kernels.to_dict()

    def __exit__(self, *_: object) -> None:
        self._quantizer.close()

    def finish(self, streamed: StreamedTarget) -> BuiltDraft:
        assert streamed.substitute is not None
        assert self.fuser is not None
        report, fuser = self._report, self.fuser
        report.modules, report.weights, report.stored_bytes = fuser.modules, fuser.weights, fuser.stored_bytes
        report.details["cache"] = self._quantizer.report()
        report.seconds = time.perf_counter() - self._started
        return BuiltDraft(FusedSubstitute(streamed.substitute, self._temperature), report)


def _choose_kernels(
    draft: SubstituteDraftConfig,
    growth: Growth,
    source: LayerSource,
    keep_exact: frozenset[str],
    context: StreamContext,
) -> KernelChoice:
    """By measurement, while the device is still empty."""
    shapes = role_shapes(source.layer_shapes(0), keep_exact)
    width = getattr(growth, "width", 1)
    return choose_kernels(shapes, width, context.device, kernel=draft.kernel.value, note=context.note)


def _open_cache(quant: HqqConfig, source: LayerSource, keep_exact: frozenset[str], note: Note) -> CachedCodes:
    """The quantizer, with its results of earlier runs unless the configuration says otherwise."""
    codes = HqqCodes(quant.bits, quant.group_size)
    facts = {"target": source.identity, "dtype": str(source.dtype), **codes.facts}
    layers = source.config.num_hidden_layers - len(quant.skip_layers)
    weights = sum(n * k for n, k in role_shapes(source.layer_shapes(0), keep_exact).values())
    return CachedCodes(
        codes,
        None if quant.cache is Cache.off else cache_folder(facts),
        expected_bytes=stored_size(layers * weights, quant.group_size),
        facts=facts,
        note=note,
    )
