"""``draft=layer_skip``: some of the target's own layers, as modules, or the resident ones as a fused level."""

from subspec.config.schema import LayerSkipDraftConfig
from subspec.decoding.draft import Draft
from subspec.drafts.base import BuiltDraft, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.layer_skip import chosen_layers, skip_layers, streamed_layers, usual_layers
from subspec.drafts.substitute import SubstituteDraft
from subspec.levels.build import fuse_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.dense import check_fused, dense_layer
from subspec.offload.loader import LoadedStream


class LayerSkipBuilder:
    """A :class:`~subspec.drafts.base.DraftBuilder`."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        draft, model = context.config.draft, context.target.model
        assert isinstance(draft, LayerSkipDraftConfig)
        count = model.config.num_hidden_layers
        layers = chosen_layers(draft, count) or usual_layers(count)
        skipping = SubstituteDraft(skip_layers(model, layers), draft.temperature)
        return _built(skipping, layers, count, "modules")

    def streamed(self, context: StreamContext) -> "StreamedLayerSkip":
        return StreamedLayerSkip(context)


class StreamedLayerSkip(StreamedBuild):
    """Reads the bytes of the target's resident layers where they lie.

    Raises:
        ConfigError: a shape the fused level does not know.
    """

    def __init__(self, context: StreamContext) -> None:
        draft, source = context.config.draft, context.source
        assert isinstance(draft, LayerSkipDraftConfig)
        check_fused(source.config, source.dtype, f"target {source.name}")
        self._source, self._temperature = source, draft.temperature
        self._overlap = None if draft.overlap_launches else False
        self._layers = streamed_layers(draft, context.plan.resident_layers, source.config.num_hidden_layers)

    def finish(self, streamed: LoadedStream) -> BuiltDraft:
        layers = [dense_layer(streamed.resident[index], cache_layer=index) for index in self._layers]
        decoder = streamed.decoder
        fused = fuse_model(self._source.config, layers, streamed.shared, decoder.base.rotary_emb)
        draft = CapturedDraft(fused, self._temperature, overlap=self._overlap)
        return _built(draft, self._layers, decoder.num_layers, "fused, bfloat16")


def _built(draft: Draft, layers: tuple[int, ...], count: int, levels: str) -> BuiltDraft:
    facts = {"layers": list(layers), "target_layers": count, "levels": levels}
    listed = ", ".join(map(str, layers))
    return BuiltDraft(
        draft, None, facts, f"{len(layers)} of the target's {count} layers ({listed}), {levels}"
    )
