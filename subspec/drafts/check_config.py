"""Checks of a configuration against the draft, the quantizer and the target, before anything large is loaded.

What needs nothing but the configuration is checked in :mod:`subspec.config.checks`. Each refusal names the keys and the
remedy.
"""

from collections.abc import Mapping

from transformers import PretrainedConfig

from subspec.config.checks import check_values, quantizes
from subspec.config.schema import (
    AdaptiveTreeConfig,
    Config,
    Dtype,
    Eagle2DraftConfig,
    Eagle2TreeConfig,
    HiggsConfig,
    HqqConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    NoQuantConfig,
    SmallModelDraftConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.errors import ConfigError


def check_config(config: Config) -> None:
    """Everything that can be told without the target.

    Raises:
        ConfigError: with the first contradiction found.
    """
    check_values(config)
    _check_draft(config)


def _check_draft(config: Config) -> None:
    if isinstance(config.draft, NoDraftConfig):
        return
    if isinstance(config.draft, SubstituteDraftConfig) and isinstance(config.quant, NoQuantConfig):
        raise ConfigError(
            "draft=subspec without a quantizer would be the target itself: set quant=hqq, "
            "or draft=none for plain decoding"
        )
    if isinstance(config.draft, SmallModelDraftConfig):
        _check_small_model(config, config.draft)
    if isinstance(config.quant, HqqConfig) and quantizes(config):
        from subspec.quant.hqq import check_hqq
        from subspec.quant.module_bits import bits_by_linear

        check_hqq(config.quant.bits, config.quant.group_size, config.quant.axis)
        bits_by_linear(config.quant.bits, config.quant.bits_by, config.quant.modules)
    if isinstance(config.quant, HiggsConfig):
        from subspec.quant.base import linear_names
        from subspec.quant.higgs import check_higgs

        quant = config.quant
        check_higgs(quant.bits, quant.vector_dim, quant.group_size, quant.hadamard_size)
        linear_names(quant.modules)
    streamed = isinstance(config.offload, StreamOffloadConfig)
    tree = config.tree
    if isinstance(tree, Eagle2TreeConfig):
        _check_eagle2_tree(config, tree, streamed)
    if isinstance(config.draft, Eagle2DraftConfig):
        _check_eagle2_draft(config, config.draft)
    if isinstance(tree, AdaptiveTreeConfig) and tree.min_depth > tree.depth:
        raise ConfigError(
            f"tree.min_depth={tree.min_depth} exceeds tree.depth={tree.depth}: lower the former"
        )


def _check_eagle2_tree(config: Config, tree: Eagle2TreeConfig, streamed: bool) -> None:
    from subspec.decoding.eagle2 import drafted_nodes

    most = drafted_nodes(tree.depth, tree.width)
    if tree.total_tokens > most:
        raise ConfigError(
            f"tree.total_tokens={tree.total_tokens}, but tree.depth={tree.depth} levels of tree.width={tree.width} "
            f"draft {most} nodes: lower tree.total_tokens to at most {most}, or draft more"
        )
    if streamed and not isinstance(config.draft, Eagle2DraftConfig):
        raise ConfigError(
            f"tree=eagle2 goes on from single nodes of a level, and draft={config.draft.name} with offload=stream "
            "drafts whole levels as captured graphs: set tree=beam or tree=adaptive"
        )


def _check_eagle2_draft(config: Config, draft: Eagle2DraftConfig) -> None:
    if draft.path is None:
        from subspec.drafts.eagle_checkpoint import check_default

        check_default(config.target)
    elif not draft.path.strip():
        raise ConfigError("draft.path is empty: set it to a folder or hub id, or leave it out")
    else:
        from subspec.drafts.planted_head import PLANTED, PlantedHead

        if draft.path == PLANTED:
            PlantedHead.of(config.target)


def _check_small_model(config: Config, draft: SmallModelDraftConfig) -> None:
    if draft.quantize and isinstance(config.quant, NoQuantConfig):
        raise ConfigError("draft.quantize=true needs a quantizer: set quant=hqq, or draft.quantize=false")
    if not isinstance(config.offload, StreamOffloadConfig):
        return
    if draft.quantize:
        raise ConfigError(
            "draft.quantize=true is not built for offload=stream, which runs a small model in bfloat16: set "
            "draft.quantize=false, or offload=none"
        )
    if draft.dtype not in (Dtype.auto, Dtype.bfloat16):
        raise ConfigError(
            f"draft.dtype={draft.dtype.value}: offload=stream runs a small model in bfloat16; leave it at auto"
        )


def check_against_target(config: Config, model: PretrainedConfig) -> None:
    """What the target's own configuration rules out.

    Args:
        model: the target's transformers configuration; no weights are needed.

    Raises:
        ConfigError: with the first contradiction found.
    """
    from subspec.targets.check_model import check_model_config

    drafting = not isinstance(config.draft, NoDraftConfig)
    tree = config.tree
    width = getattr(tree, "width", 1)
    if drafting and width > model.vocab_size:
        raise ConfigError(
            f"tree.width={width} is wider than the target's vocabulary of {model.vocab_size} tokens: "
            f"lower tree.width"
        )
    check_model_config(
        model,
        name=f"target {config.target.name}",
        max_length=config.decoding.max_length,
        key="decoding.max_length",
    )
    if isinstance(config.draft, LayerSkipDraftConfig):
        from subspec.drafts.layer_skip import chosen_layers

        chosen_layers(config.draft, model.num_hidden_layers)
    quantized = model
    if isinstance(config.draft, SmallModelDraftConfig):
        from subspec.drafts.small_model import check_shipped, check_small_model, load_small_config

        check_shipped(config, model)
        quantized = load_small_config(config)
        check_small_model(config, quantized)
    quant = config.quant
    if quantizes(config) and isinstance(quant, HqqConfig | HiggsConfig):
        layers = quantized.num_hidden_layers
        wrong = [index for index in quant.skip_layers if not 0 <= index < layers]
        if wrong:
            raise ConfigError(
                f"quant.skip_layers: no layer {wrong[0]} in a {'target' if quantized is model else 'small model'} "
                f"with layers 0..{layers - 1}"
            )


MOVING_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embeddings that transformers computes anew from the largest position of a pass."""

FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embeddings that depend on a token's position alone."""


def rope_kind(model: PretrainedConfig) -> str:
    """The kind of rotary embeddings, as the model's configuration spells it; ``default`` where it says nothing."""
    settings = getattr(model, "rope_parameters", None) or getattr(model, "rope_scaling", None) or {}
    kind = settings.get("rope_type", settings.get("type"))
    if kind is None and any(isinstance(value, Mapping) for value in settings.values()):
        return "by kind of layer"
    return "default" if kind is None else str(kind)
