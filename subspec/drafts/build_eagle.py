"""``draft=eagle2``: a published, the shipped or a planted EAGLE head beside the target."""

from typing import Any

from subspec.config.schema import Eagle2DraftConfig
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import TreePolicy
from subspec.drafts.base import BuiltDraft, StreamContext, StreamedBuild, WholeContext
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.eagle_checkpoint import LoadedHead, load_head, locate_for
from subspec.offload.loader import LoadedStream


class EagleBuilder:
    """A :class:`~subspec.drafts.base.DraftBuilder`."""

    def whole(self, context: WholeContext) -> BuiltDraft:
        config, target = context.config, context.target
        draft = config.draft
        assert isinstance(draft, Eagle2DraftConfig)
        loaded = load_head(
            locate_for(draft, config.target, context.note),
            hidden=target.hidden_size,
            target=target.name,
            dtype=context.decoder.dtype,
            device=context.decoder.device,
        )
        return _built(loaded, context.decoder, context.growth, draft.temperature)

    def streamed(self, context: StreamContext) -> "StreamedEagle":
        return StreamedEagle(context)


class StreamedEagle(StreamedBuild):
    """The head lies on the device, in the budget, before the target's layers come; it takes nothing of them.

    Raises:
        SubspecError: the head cannot be found or read, or is another target's.
    """

    def __init__(self, context: StreamContext) -> None:
        config, source = context.config, context.source
        draft = config.draft
        assert isinstance(draft, Eagle2DraftConfig)
        self._growth, self._temperature = context.growth, draft.temperature
        self._loaded = load_head(
            locate_for(draft, config.target, context.note),
            hidden=source.config.hidden_size,
            target=source.name,
            dtype=source.dtype,
            device=context.device,
        )

    def finish(self, streamed: LoadedStream) -> BuiltDraft:
        return _built(self._loaded, streamed.decoder, self._growth, self._temperature)


def _built(loaded: LoadedHead, decoder: TargetModel, growth: TreePolicy, temperature: float) -> BuiltDraft:
    shape = loaded.head.shape
    parameters = sum(parameter.numel() for parameter in loaded.head.parameters())
    dtype = str(decoder.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {
        "head": loaded.source,
        "planted": loaded.planted,
        "dropped": loaded.dropped,
        "dtype": dtype,
        "parameters": parameters,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "graphs_captured": 0,  # its levels are single kernel launches
    }
    summary = f"head {loaded.source}, {parameters / 1e6:.1f} M parameters, {dtype}"
    return BuiltDraft(EagleDraft(loaded.head, decoder, growth, temperature), facts=facts, summary=summary)
