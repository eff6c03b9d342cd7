"""``draft=subspec``: the target's own layers, quantized, as modules or as a fused level."""

import time
from typing import Any

from subspec.codec.coded_cache import CodedCache, coded_folder
from subspec.codec.restore import KERNELS as DECODED_KERNELS
from subspec.config.enums import Codec, Kernel
from subspec.config.schema import Cache, SubstituteDraftConfig, Unpack
from subspec.drafts.base import BuiltDraft, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, LayerFuser
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.quantization import fused_quantization
from subspec.offload.loader import LoadedStream
from subspec.quant.affine_format import describe
from subspec.quant.base import QuantReport
from subspec.quant.choose_kernels import choose_kernels
from subspec.store.folder import open_store
from subspec.store.quantized_cache import CachedCodes
from subspec.store.substitutes import SubstituteStore


class SubstituteBuilder:
    """A :class:`~subspec.drafts.base.DraftBuilder`."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        draft, quant, decoder = context.config.draft, context.config.quant, context.decoder
        assert isinstance(draft, SubstituteDraftConfig)
        # Unpacking trades memory for time: on a CPU hqq unpacks in every forward, on a GPU memory is what is scarce.
        unpack = draft.unpack is Unpack.always or (
            draft.unpack is Unpack.auto and decoder.device.type == "cpu"
        )
        substitute = share_parameters(context.target.model)
        report = quantize_draft(
            substitute,
            quant,
            identity=context.target.identity,
            dtype=decoder.dtype,
            device=decoder.device,
            unpack=unpack,
            note=context.note,
            progress=context.progress,
        )
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
        draft = config.draft
        assert isinstance(draft, SubstituteDraftConfig)
        self._started = time.perf_counter()
        self._temperature = draft.temperature
        self._overlap = None if draft.overlap_launches else False
        self._quantization = quantization = fused_quantization(
            config.quant,
            source.layer_shapes(0),
            (source.config.vocab_size, source.config.hidden_size),
            kernel=draft.kernel.value,
        )
        coded = context.plan.codec is Codec.substitute
        try:
            kernels = choose_kernels(  # by measurement, while the device is still empty
                quantization.shapes,
                getattr(context.growth, "width", 1),
                context.device,
                formats=quantization.formats,
                kernel=draft.kernel.value,
                allowed=DECODED_KERNELS if coded else None,
                overlap=self._overlap,
                note=context.note,
            )
        except ConfigError as error:
            if not coded or draft.kernel is not Kernel.auto:
                raise
            raise ConfigError(f"{error}; offload.codec=none takes other kernels, too") from error
        self.skip_layers = frozenset(getattr(config.quant, "skip_layers", ()))
        self._quantizer = CachedCodes(quantization.quantizer, self._open_store(context))
        if context.plan.codec is Codec.substitute:
            self.coded = self._open_coded(context)
        self.fuser = LayerFuser(
            source.config,
            self._quantizer,
            formats=quantization.formats,
            kernel=kernels.variants,
            keep_exact=quantization.keep_exact,
        )
        self._report = QuantReport(config.quant.name, f"fused level, {kernels.summary()}")
        self._report.details["kernels"] = kernels.to_dict()
        self._report.details["formats"] = {
            role: describe(kept) for role, kept in quantization.formats.items()
        }

    def _open_store(self, context: StreamContext) -> SubstituteStore:
        """Its results of earlier runs, unless the configuration says otherwise."""
        quant = context.config.quant
        return open_store(
            getattr(quant, "cache", Cache.off),
            getattr(quant, "folder", None),
            self._facts(context),
            self._quantization.stored_bytes(self._layers(context)),
            context.note,
        )

    def _open_coded(self, context: StreamContext) -> CodedCache:
        """The exact layers as earlier runs coded them; in the cache, even of a substitute in ``quant.folder``."""
        facts, off = self._facts(context), getattr(context.config.quant, "cache", Cache.off) is Cache.off
        linears = [
            f"{name}.weight" for role in self._quantization.shapes if role != "head" for name in ROLES[role]
        ]
        return CodedCache(
            None if off else coded_folder(facts, linears),
            self._quantizer,
            linears,
            expected_bytes=self._layers(context) * context.plan.layer_bytes,
            facts=facts,
            note=context.note,
        )

    def _facts(self, context: StreamContext) -> dict[str, Any]:
        source = context.source
        return {
            "target": source.identity,
            "dtype": str(source.dtype),
            **self._quantization.quantizer.facts,
        }

    def _layers(self, context: StreamContext) -> int:
        return context.source.config.num_hidden_layers - len(self.skip_layers)

    def __exit__(self, *_: object) -> None:
        try:
            # Before the substitute: whoever waits for that one then finds all of both.
            if self.coded is not None:
                self.coded.close()
        finally:
            self._quantizer.close()

    def finish(self, streamed: LoadedStream) -> BuiltDraft:
        assert streamed.substitute is not None
        assert self.fuser is not None
        report, fuser = self._report, self.fuser
        report.modules, report.weights, report.stored_bytes = fuser.modules, fuser.weights, fuser.stored_bytes
        report.bits = fuser.bits
        report.details["cache"] = self._quantizer.report()
        report.seconds = time.perf_counter() - self._started
        draft = CapturedDraft(streamed.substitute, self._temperature, overlap=self._overlap)
        return BuiltDraft(draft, report)
