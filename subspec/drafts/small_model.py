"""The small model of ``draft=small_model``: where it comes from, whether its tokens are the target's, its weights.

Any checkpoint that can be a target can be a draft, through the same doors (:mod:`subspec.targets`); it only needs no
tokenizer. Its vocabulary may be padded otherwise than the target's: ids beyond either are never drafted.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from subspec.config.schema import (
    Config,
    Dtype,
    HubTargetConfig,
    PlantedTargetConfig,
    SmallModelDraftConfig,
    TargetConfig,
)
from subspec.drafts import shipped
from subspec.errors import ConfigError, SubspecError
from subspec.targets.check_model import MOVING_ROPE, rope_kind
from subspec.targets.checkpoint import check_folder_config
from subspec.targets.hub import locate
from subspec.targets.layer_bytes import flat_layer
from subspec.targets.layers import CheckpointSource
from subspec.targets.meta_model import empty_model, fill
from subspec.targets.model_spec import ModelSpec
from subspec.targets.planted import SHAPES, PlantedSource, planted_config
from subspec.targets.prepared import prepare_draft
from subspec.targets.source import LayerSource
from subspec.targets.target import attention_window
from subspec.utils.console import Note

SHIPPED = shipped.SMALL_MODEL
"""The small model that ships with the project; it has no tokenizer."""

PLANTED = "planted:"

EXTRA_SHARE = 0.01
"""Share of tokens that only one of two otherwise equal vocabularies may have: special tokens added later."""


def small_model_config(config: Config) -> TargetConfig:
    """The small model as a target's configuration.

    Raises:
        ConfigError: ``draft.path`` names nothing.
    """
    draft = config.draft
    assert isinstance(draft, SmallModelDraftConfig)
    if draft.path is None:
        return shipped_small_model(draft.dtype)
    if draft.path.startswith(PLANTED):
        shape = draft.path.removeprefix(PLANTED)
        if shape not in SHAPES:
            raise ConfigError(f"draft.path={draft.path}: no such planted shape; use {', '.join(SHAPES)}")
        # The target's seed plants the target's own next-token map.
        seed = getattr(config.target, "seed", 0)
        return PlantedTargetConfig(name=draft.path, dtype=draft.dtype, shape=shape, seed=seed)
    return HubTargetConfig(name=draft.path, dtype=draft.dtype, path=draft.path, revision=draft.revision)


def shipped_small_model(dtype: Dtype = Dtype.auto) -> HubTargetConfig:
    """The small model that ships with the project, as a target's configuration.

    Raises:
        ConfigError: this installation has none.
    """
    if not (SHIPPED / "config.json").is_file():
        raise ConfigError(
            "draft=small_model: the small model for the default target is not in this installation "
            "(subspec/drafts/weights/small_model): make one with scripts/distill_draft.py and set draft.path to its "
            "folder"
        )
    return HubTargetConfig(name="the shipped small model", dtype=dtype, path=str(SHIPPED))


def load_small_config(config: Config) -> PretrainedConfig:
    """The small model's own configuration, without its weights.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    return _read(small_model_config(config))[0]


def small_shapes(config: Config) -> ModelSpec:
    """What a plan counts the small model by."""
    return _read(small_model_config(config))[1]


def _read(named: TargetConfig) -> tuple[PretrainedConfig, ModelSpec]:
    if isinstance(named, PlantedTargetConfig):
        return _describe(named.shape, None, planted=True)
    assert isinstance(named, HubTargetConfig)
    return _describe(named.path, named.revision, planted=False)


@functools.lru_cache(maxsize=8)
def _describe(path: str, revision: str | None, *, planted: bool) -> tuple[PretrainedConfig, ModelSpec]:
    """A plan is laid out many times over; the folder is looked up once."""
    if planted:
        model = planted_config(PlantedTargetConfig(name=path, shape=path))
    else:
        with _about_draft():
            named = HubTargetConfig(name=path, path=path, revision=revision)
            model = check_folder_config(locate(named, lambda text: None, weights=False).folder, path)
    return model, ModelSpec.of(model)


def open_small_model(config: Config, dtype: torch.dtype, device: torch.device, note: Note) -> LayerSource:
    """The small model's weights, fetched first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    named = small_model_config(config)
    if isinstance(named, PlantedTargetConfig):
        return PlantedSource(named, dtype, device)
    return open_checkpoint(named, dtype, note)


def open_checkpoint(named: HubTargetConfig, dtype: torch.dtype, note: Note) -> CheckpointSource:
    """A small model's weights on disk, fetched first if need be.

    Raises:
        SubspecError: anything the user can repair, in one line with the remedy.
    """
    with _about_draft():
        checkpoint = prepare_draft(named, note)
        if checkpoint.folder == SHIPPED:
            checkpoint = replace(checkpoint, source=shipped.shipped_source(SHIPPED / "model.safetensors"))
        source = CheckpointSource(checkpoint, dtype)
    for line in source.notes:
        note(line)
    return source


def small_dtype(draft: SmallModelDraftConfig, target: torch.dtype) -> torch.dtype:
    """The small model's type; ``auto`` is the target's."""
    return target if draft.dtype is Dtype.auto else getattr(torch, draft.dtype.value)


def check_small_model(config: Config, model: PretrainedConfig) -> None:
    """What the small model's configuration rules out as a draft.

    Raises:
        ConfigError: with the key.
    """
    name, length = small_model_config(config).name, config.decoding.max_length
    positions = getattr(model, "max_position_embeddings", None)
    limit = min(limit for limit in (positions, attention_window(model), length) if limit)
    if limit < length:
        raise ConfigError(
            f"decoding.max_length={length} exceeds the {limit} tokens that the small model {name} attends to: lower "
            f"decoding.max_length to {limit}, or set draft.path to another model"
        )
    kind = rope_kind(model)
    if kind in MOVING_ROPE:
        raise ConfigError(
            f"draft.path={name} has {kind} rotary embeddings, whose frequencies depend on how far a pass reaches: "
            "take another small model"
        )


def check_shipped(config: Config, target: PretrainedConfig) -> None:
    """Refuse the shipped small model, which has no tokenizer, for a target with logits of another width.

    Raises:
        ConfigError: names both models and ``draft.path``.
    """
    draft = config.draft
    if isinstance(draft, SmallModelDraftConfig) and draft.path is None:
        own, known = load_small_config(config).vocab_size, target.vocab_size
        if own != known:
            raise ConfigError(
                f"draft=small_model ships a model for the embedded default target, with {own} tokens, and target "
                f"{config.target.name} has {known}: set draft.path to a small model with this target's vocabulary"
            )


@dataclass(frozen=True)
class Vocabulary:
    """A model's vocabulary: its name for messages, the width of its logits, its tokenizer if it has one."""

    name: str
    size: int
    tokenizer: PreTrainedTokenizerBase | None


def check_vocabularies(draft: Vocabulary, target: Vocabulary) -> None:
    """Whether the draft's ids mean the target's tokens, as far as both have them.

    With both tokenizers, every id that both define must be the same token, and nearly all must be defined by both:
    logits beyond the tokens are padding. Without one of them, the logits must be equally wide.

    Raises:
        ConfigError: they are different vocabularies.
    """
    remedy = "set draft.path to a model with the target's tokenizer"
    both = f"draft.path={draft.name} ({draft.size} tokens) and target {target.name} ({target.size} tokens)"
    if draft.tokenizer is None or target.tokenizer is None:
        if draft.size != target.size:
            raise ConfigError(f"{both} have different vocabularies: {remedy}")
        return
    ours, theirs = (
        {number: token for token, number in tokenizer.get_vocab().items()}
        for tokenizer in (draft.tokenizer, target.tokenizer)
    )
    common = ours.keys() & theirs.keys()
    alone = len(ours) + len(theirs) - 2 * len(common)
    different = [number for number in common if ours[number] != theirs[number]]
    if not different and alone > EXTRA_SHARE * len(theirs):
        raise ConfigError(f"{both} have different vocabularies ({alone} tokens that only one has): {remedy}")
    if different:
        first = min(different)
        raise ConfigError(
            f"{both} number their tokens differently ({len(different)} ids, for instance {first}: {ours[first]!r} and "
            f"{theirs[first]!r}): {remedy}"
        )


def load_small_model(
    source: LayerSource, vocab_size: int, device: torch.device, *, flat: bool = True
) -> PreTrainedModel:
    """The small model on ``device``.

    Args:
        vocab_size: of the target. A wider LM head is cut to it; a narrower embedding table gets zero rows, so that
            every token of the target can be looked up.
        flat: put every layer into one allocation, laid out for the fused level. False for a model whose Linears are to
            be replaced one by one: what remains of a layer would keep the whole of it alive.
    """
    config, tied = source.config, source.config.tie_word_embeddings
    model = empty_model(config, source.dtype, device)
    shared = dict(source.shared(device))
    table, head = shared["model.embed_tokens.weight"], shared.get("lm_head.weight")
    known = table.shape[0]
    if known < vocab_size:
        table = torch.cat([table, table.new_zeros(vocab_size - known, table.shape[1])])
    head = table[: min(known, vocab_size)] if tied or head is None else _cut(head, vocab_size)
    fill(model, {"model.embed_tokens.weight": table, "model.norm.weight": shared["model.norm.weight"]})
    del shared
    model.get_output_embeddings().weight = nn.Parameter(head, requires_grad=False)
    for index, layer in enumerate(model.get_decoder().layers):
        tensors = source.layer(index, device)
        fill(layer, flat_layer(tensors, source.dtype, device) if flat else tensors)
    return model


def layer_views(layer: nn.Module) -> dict[str, Tensor]:
    """A loaded layer's parameters by name."""
    return {name: parameter.data for name, parameter in layer.named_parameters()}


def _cut(head: Tensor, vocab_size: int) -> Tensor:
    return head if head.shape[0] <= vocab_size else head[:vocab_size].clone()


@contextmanager
def _about_draft() -> Iterator[None]:
    """The doors to checkpoints speak of targets; here they are asked for a draft."""
    try:
        yield
    except SubspecError as error:
        text = str(error).replace("target.path", "draft.path").replace("target.revision", "draft.revision")
        raise type(error)(text if "draft." in text else f"draft.path: {text}") from error
