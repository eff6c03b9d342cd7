"""``draft=small_model``: another, smaller model on a cache of its own, as modules or as a fused level."""

from transformers import PreTrainedModel

from subspec.config.schema import Config, SmallModelDraftConfig
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.base import BuiltDraft, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.small_model import (
    Vocabulary,
    check_vocabularies,
    layer_views,
    load_small_model,
    open_small_model,
    small_dtype,
)
from subspec.drafts.substitute import SubstituteDraft
from subspec.levels.build import fuse_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.dense import check_fused, dense_layer
from subspec.offload.loader import LoadedStream
from subspec.quant.base import QuantReport
from subspec.targets.device import check_memory
from subspec.targets.meta_model import count_parameters
from subspec.targets.source import LayerSource
from subspec.utils.console import Note


class SmallModelBuilder:
    """A :class:`~subspec.drafts.base.DraftBuilder`."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        config, target, decoder = context.config, context.target, context.decoder
        draft = config.draft
        assert isinstance(draft, SmallModelDraftConfig)
        dtype = small_dtype(draft, target.dtype)
        source = open_small_model(config, dtype, decoder.device, context.note)
        known = Vocabulary(target.name, decoder.vocab_size, target.tokenizer)
        check_vocabularies(Vocabulary(source.name, source.config.vocab_size, source.tokenizer), known)
        check_memory(
            count_parameters(source.config) * dtype.itemsize, decoder.device, f"small model {source.name}"
        )
        model = load_small_model(source, decoder.vocab_size, decoder.device, flat=not draft.quantize)
        report = _quantized(model, config, source, decoder, context.note) if draft.quantize else None
        levels = SubstituteDraft(model, draft.temperature)
        own = _own_cache(levels, levels.decoder, config, context.growth, decoder.vocab_size)
        return _built(own, source, report, "modules")

    def streamed(self, context: StreamContext) -> "StreamedSmallModel":
        return StreamedSmallModel(context)


class StreamedSmallModel(StreamedBuild):
    """Loaded before the target's layers; its fused levels and its prompt pass read the same bytes.

    Raises:
        ConfigError: another vocabulary, or a shape the fused level does not know.
    """

    def __init__(self, context: StreamContext) -> None:
        config, draft, target = context.config, context.config.draft, context.source
        assert isinstance(draft, SmallModelDraftConfig)
        dtype = small_dtype(draft, target.dtype)
        source = open_small_model(config, dtype, context.device, context.note)
        check_fused(source.config, dtype, f"draft.path={source.name}")
        vocab_size = target.config.vocab_size
        check_vocabularies(
            Vocabulary(source.name, source.config.vocab_size, source.tokenizer),
            Vocabulary(target.name, vocab_size, target.tokenizer),
        )
        model = load_small_model(source, vocab_size, context.device)
        decoder = TargetModel(model)
        layers = [dense_layer(layer_views(layer)) for layer in model.get_decoder().layers]
        shared = {
            "model.embed_tokens.weight": model.get_input_embeddings().weight.data,
            "model.norm.weight": model.get_decoder().norm.weight.data,
            "lm_head.weight": model.get_output_embeddings().weight.data,
        }
        fused = fuse_model(source.config, layers, shared, model.get_decoder().rotary_emb)
        levels = CapturedDraft(fused, draft.temperature, overlap=None if draft.overlap_launches else False)
        own = _own_cache(levels, decoder, config, context.growth, vocab_size)
        self._built = _built(own, source, None, "fused, bfloat16")

    def finish(self, streamed: LoadedStream) -> BuiltDraft:
        return self._built


def _own_cache(
    levels: SubstituteDraft | CapturedDraft,
    decoder: TargetModel,
    config: Config,
    growth: TreePolicy,
    vocab_size: int,
) -> SeparateCacheDraft:
    return SeparateCacheDraft(
        levels,
        decoder,
        max_length=config.decoding.max_length,
        draft_rows=growth.draft_rows,
        vocab_size=vocab_size,
        width=getattr(growth, "width", 1),
    )


def _quantized(
    model: PreTrainedModel, config: Config, source: LayerSource, decoder: TargetModel, note: Note
) -> QuantReport:
    """Quantize the small model in place; kept, and found again, under its own identity, not the target's."""
    return quantize_draft(
        model,
        config.quant,
        identity=source.identity,
        dtype=source.dtype,
        device=decoder.device,
        unpack=decoder.device.type == "cpu",
        note=note,
        what=f"the small model {source.name}",
    )


def _built(
    draft: SeparateCacheDraft, source: LayerSource, quant: QuantReport | None, levels: str
) -> BuiltDraft:
    parameters = count_parameters(source.config)
    dtype = str(source.dtype).removeprefix("torch.")
    facts = {
        "source": source.source,
        "planted": source.planted,
        "dtype": dtype,
        "layers": source.config.num_hidden_layers,
        "vocabulary": source.config.vocab_size,
        "parameters": parameters,
        "kv_cache_bytes": draft.cache.nbytes,
        "levels": levels,
    }
    return BuiltDraft(
        draft, quant, facts, f"{source.source}, {parameters / 1e6:.1f} M parameters, {dtype}, {levels}"
    )
