"""Checks of a configuration's draft, quantizer and tree, by themselves and against the target.

Checks that need the configuration's values alone are in :mod:`subspec.config.checks`, those of one kind of draft in
its :class:`~subspec.drafts.spec.DraftSpec`. Each message names the keys and the remedy.
"""

import torch
from transformers import PretrainedConfig

from subspec.config.checks import check_skip_layers, check_values, quantizes, streams_from_disk
from subspec.config.enums import AUTO
from subspec.config.quant_checks import HEAD, bits_by_linear
from subspec.config.schema import (
    AccelerateOffloadConfig,
    Config,
    Eagle2DraftConfig,
    Eagle2TreeConfig,
    HiggsConfig,
    HqqConfig,
    PardDraftConfig,
    PromptLookupDraftConfig,
    StreamOffloadConfig,
)
from subspec.decoding.eagle2 import drafted_nodes
from subspec.drafts.registry import spec_of
from subspec.errors import ConfigError
from subspec.quant.hqq import check_group_size
from subspec.targets.check_model import check_model_config
from subspec.targets.meta_model import parameter_shapes


def check_config(config: Config) -> None:
    """Check a configuration without the target; raises a ConfigError about the first contradiction found."""
    check_values(config)
    spec = spec_of(config.draft)
    texts = config.decoding.texts
    if texts != AUTO and texts > 1 and (one := one_text_key(config)):
        raise ConfigError(
            f"decoding.texts={texts}, but {one} serves one text at a time: set decoding.texts=1, or take "
            "draft.proposer=none, and offload=none or stream"
        )
    if spec is None:
        return
    spec.check(config)
    if streams_from_disk(config) and not spec.from_disk:
        raise ConfigError(
            f"draft={config.draft.name} runs beside a target that streams to a GPU, not beside one that streams from a "
            "disk (offload=stream with device=cpu): set draft=subspec, eagle2, eagle3, block_head, "
            "prompt_lookup or none, or offload=none"
        )
    _check_tree(config)


def one_text_key(config: Config) -> str | None:
    """The key, with its value, that lets texts run one at a time only; None: several share every pass."""
    if isinstance(config.offload, AccelerateOffloadConfig):
        return f"offload={config.offload.name}"
    spec = spec_of(config.draft)
    if spec is None or spec.serves_texts(config):
        return None
    proposer = getattr(config.draft, "proposer", None)
    return f"draft={config.draft.name}" if proposer is None else f"draft.proposer={proposer.value}"


def _check_tree(config: Config) -> None:
    tree, draft = config.tree, config.draft
    if not isinstance(tree, Eagle2TreeConfig):
        return
    most = drafted_nodes(tree.depth, tree.width)
    if tree.total_tokens > most:
        raise ConfigError(
            f"tree.total_tokens={tree.total_tokens}, but tree.depth={tree.depth} levels of tree.width={tree.width} "
            f"draft {most} nodes: lower tree.total_tokens to at most {most}, or draft more"
        )
    captured = isinstance(config.offload, StreamOffloadConfig) and not streams_from_disk(config)
    if captured and not isinstance(draft, Eagle2DraftConfig | PardDraftConfig | PromptLookupDraftConfig):
        raise ConfigError(
            f"tree=eagle2 expands single nodes of a level, and draft={draft.name} with offload=stream "
            "drafts whole levels as captured graphs: set tree=beam or tree=adaptive"
        )


def check_against_target(config: Config, model: PretrainedConfig) -> None:
    """Check a configuration against the target's transformers configuration; raises as :func:`check_config`."""
    spec, width = spec_of(config.draft), getattr(config.tree, "width", None) or 1
    if spec is not None and width > model.vocab_size:
        raise ConfigError(
            f"tree.width={width} is wider than the target's vocabulary of {model.vocab_size} tokens: lower tree.width"
        )
    check_model_config(
        model, name=f"target {config.target.name}", max_length=config.decoding.max_length, key="decoding.max_length"
    )
    quantized = model
    if spec is not None:
        spec.check_target(config, model)
        quantized = spec.quantized_model(config, model)
    quant = config.quant
    if quantizes(config) and isinstance(quant, HqqConfig | HiggsConfig):
        kind = "target" if quantized is model else "small model"
        check_skip_layers(quant.skip_layers, quantized.num_hidden_layers, kind)
        if isinstance(quant, HqqConfig) and not isinstance(config.offload, StreamOffloadConfig):
            _check_groups(quant, quantized)


def _check_groups(quant: HqqConfig, model: PretrainedConfig) -> None:
    """Check the groups of every Linear that is quantized; a captured level checks its own."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(model)[0].items()}
    shapes[HEAD] = torch.Size([model.vocab_size, model.hidden_size])
    bits = bits_by_linear(quant.bits, quant.bits_by, quant.modules)
    for name, shape in shapes.items():
        if number := bits.get(name.rpartition(".")[2]):
            check_group_size(*shape, group_size=quant.group_size, axis=quant.axis, name=name, bits=number)
