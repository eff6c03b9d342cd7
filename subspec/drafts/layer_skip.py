"""Self-speculation without training: some of the target's own layers draft, the others are skipped.

The draft is the target's module graph with a part of its decoder layers (Zhang et al., Draft & Verify, arXiv
2309.08168, section 3, without the search for the best part): residual streams make a model survive missing layers.
Embeddings, final norm, head and KV cache are the target's; every kept layer writes and reads the cache rows of its
own number, so the committed prefix holds exact keys and values for it.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from subspec.config.schema import LayerSkipDraftConfig
from subspec.drafts.substitute import share_parameters
from subspec.errors import ConfigError


def spread(layers: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``layers`` layer numbers, evenly, the first and the last among them (a single one is the first)."""
    if keep == 1:
        return (0,)
    return tuple(round(index * (layers - 1) / (keep - 1)) for index in range(keep))


def chosen_layers(draft: LayerSkipDraftConfig, layers: int) -> tuple[int, ...] | None:
    """The layers that ``draft`` names, ascending; None when it leaves the choice open.

    Args:
        layers: of the target.

    Raises:
        ConfigError: naming the key.
    """
    if draft.layers is not None and draft.keep is not None:
        raise ConfigError("draft.layers and draft.keep both choose the layers: set one of them to null")
    if draft.keep is not None:
        if not 1 <= draft.keep <= layers:
            raise ConfigError(
                f"draft.keep={draft.keep}: the target has {layers} layers, so keep between 1 and {layers}"
            )
        return spread(layers, draft.keep)
    if draft.layers is None:
        return None
    if not draft.layers:
        raise ConfigError("draft.layers is empty: a draft needs at least one layer, for instance [0]")
    for index in draft.layers:
        if not 0 <= index < layers:
            raise ConfigError(f"draft.layers: no layer {index} in a target with layers 0..{layers - 1}")
    if len(set(draft.layers)) < len(draft.layers):
        raise ConfigError(f"draft.layers={draft.layers} names a layer twice: give each once")
    return tuple(sorted(draft.layers))


def usual_layers(layers: int) -> tuple[int, ...]:
    """What drafts where nothing is chosen: half of the layers, rounded up, spread evenly."""
    return spread(layers, max(1, -(-layers // 2)))


def streamed_layers(draft: LayerSkipDraftConfig, resident: Sequence[int], layers: int) -> tuple[int, ...]:
    """What drafts under ``offload=stream``: the layers that were chosen, else the resident ones.

    Where every layer is resident all of them would be the target itself; then half of them draft.

    Args:
        resident: layers on the device; those that were chosen are among them.
        layers: of the target.
    """
    chosen = chosen_layers(draft, layers)
    if chosen is not None:
        return chosen
    return tuple(sorted(resident)) if len(resident) < layers else usual_layers(layers)


def skip_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A second graph over ``model``'s parameters with only the decoder layers ``layers``; ``model`` stays as it is."""
    skipping = share_parameters(model)
    base = skipping.get_decoder()
    # A layer knows its own number, by which it finds its rows of the cache.
    base.layers = nn.ModuleList([base.layers[index] for index in layers])
    return skipping
