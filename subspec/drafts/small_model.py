"""``draft=small_model``: another, smaller model on a cache of its own, as modules or as captured levels.

Any checkpoint that can be a target can be a draft, read by the same code (:mod:`subspec.targets`); it needs no
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
    NoQuantConfig,
    PlantedTargetConfig,
    SmallModelDraftConfig,
    StreamOffloadConfig,
    TargetConfig,
)
from subspec.decoding.draft import LevelDraft
from subspec.decoding.target_model import TargetModel
from subspec.drafts import shipped
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.spec import BuiltDraft, DraftSpec
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError, SubspecError
from subspec.levels.build import level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.dense import check_level_support, dense_layer, layer_views
from subspec.quant.modules import QuantReport
from subspec.targets.check_model import check_model_config
from subspec.targets.checkpoint import check_folder_config
from subspec.targets.checkpoint_source import CheckpointSource
from subspec.targets.device import check_memory, resolve_dtype
from subspec.targets.hub import locate
from subspec.targets.layer_bytes import flat_layer
from subspec.targets.load import weights_identity
from subspec.targets.meta_model import count_parameters, empty_model, fill
from subspec.targets.model_spec import ModelSpec
from subspec.targets.planted import SHAPES, PlantedSource, planted_config
from subspec.targets.prepared import prepare_draft
from subspec.targets.source import LayerSource
from subspec.targets.weight_files import SMALL_MODEL
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
        # With the target's seed it follows the target's own next-token map.
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
    """The shapes that a plan computes sizes from."""
    return _read(small_model_config(config))[1]


def _read(named: TargetConfig) -> tuple[PretrainedConfig, ModelSpec]:
    if isinstance(named, PlantedTargetConfig):
        return _describe(named.shape, None, planted=True)
    assert isinstance(named, HubTargetConfig)
    return _describe(named.path, named.revision, planted=False)


@functools.lru_cache(maxsize=8)
def _describe(path: str, revision: str | None, *, planted: bool) -> tuple[PretrainedConfig, ModelSpec]:
    """Cached: a plan computes sizes many times."""
    if planted:
        model = planted_config(PlantedTargetConfig(name=path, shape=path))
    else:
        with _about_draft():
            named = HubTargetConfig(name=path, path=path, revision=revision)
            model = check_folder_config(
                locate(named, lambda text: None, SMALL_MODEL, weights=False).folder, path, SMALL_MODEL
            )
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
    """Check the small model's configuration.

    Raises:
        ConfigError: naming the key.
    """
    check_model_config(
        model,
        name=f"the small model {small_model_config(config).name}",
        max_length=config.decoding.max_length,
        key="decoding.max_length",
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
    """Check that both models mean the same tokens by the ids that both have.

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
        flat: put every layer into one allocation, laid out for captured levels. False for a model whose Linears will
            be replaced one by one: the remaining parameters would keep the whole allocation alive.
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


def _cut(head: Tensor, vocab_size: int) -> Tensor:
    return head if head.shape[0] <= vocab_size else head[:vocab_size].clone()


@contextmanager
def _about_draft() -> Iterator[None]:
    """Name ``draft.path`` in the messages of the code that reads checkpoints."""
    try:
        yield
    except SubspecError as error:
        text = str(error)
        raise type(error)(text if "draft." in text else f"draft.path: {text}") from error


class SmallModelSpec(DraftSpec):
    """``draft=small_model``."""

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
        assert isinstance(draft, SmallModelDraftConfig)
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

    @classmethod
    def check_target(cls, config: Config, model: PretrainedConfig) -> None:
        assert isinstance(config.draft, SmallModelDraftConfig)
        check_shipped(config, model)
        small = load_small_config(config)
        check_small_model(config, small)
        if isinstance(config.offload, StreamOffloadConfig):
            target = resolve_dtype(config.target.dtype, torch.device("cuda"))
            check_level_support(
                small, small_dtype(config.draft, target), f"draft.path={small_model_config(config).name}"
            )

    @classmethod
    def quantized_model(cls, config: Config, model: PretrainedConfig) -> PretrainedConfig:
        return load_small_config(config)

    @classmethod
    def weights_identity(cls, config: Config, note: Note) -> str:
        named = small_model_config(config)
        with _about_draft():
            return weights_identity(named, SMALL_MODEL, note=note)

    def prepare(self) -> None:
        """Load the small model; captured levels and prompt passes read the same bytes.

        Raises:
            ConfigError: another vocabulary.
        """
        context, draft = self.context, self.context.config.draft
        assert isinstance(draft, SmallModelDraftConfig)
        device, streamed = context.device, context.plan is not None
        dtype = small_dtype(draft, context.dtype)
        self._source = source = open_small_model(context.config, dtype, device, context.note)
        check_small_model(context.config, source.config)
        vocab_size = context.model.vocab_size
        check_vocabularies(
            Vocabulary(source.name, source.config.vocab_size, source.tokenizer),
            Vocabulary(context.name, vocab_size, context.tokenizer),
        )
        if not streamed:  # else the plan has counted it
            check_memory(
                count_parameters(source.config) * dtype.itemsize, device, f"small model {source.name}"
            )
        self._model = load_small_model(source, vocab_size, device, flat=not draft.quantize)
        self._report: QuantReport | None = None
        if draft.quantize:
            self._report = quantize_draft(
                self._model,
                context.config.quant,
                identity=source.identity,
                dtype=dtype,
                device=device,
                unpack=device.type == "cpu",
                note=context.note,
                what=f"the small model {source.name}",
            )

    def build(self, target: TargetModel) -> BuiltDraft:
        context, source, config = self.context, self._source, self.context.config.draft
        assert isinstance(config, SmallModelDraftConfig)
        levels: LevelDraft
        if context.plan is None:
            kind, levels = "modules", SubstituteDraft(self._model, config.temperature)
            model = levels.model
        else:
            kind, model = "fused, bfloat16", TargetModel(self._model)
            parts = [dense_layer(layer_views(layer)) for layer in model.base.layers]
            overlap = None if config.overlap_launches else False
            levels = CapturedDraft(level_model(self._model, parts), config.temperature, overlap=overlap)
        draft = SeparateCacheDraft(
            levels,
            model,
            max_length=context.config.decoding.max_length,
            draft_rows=context.policy.draft_rows,
            vocab_size=target.vocab_size,
            width=context.policy.width,
        )
        parameters, dtype = count_parameters(source.config), str(source.dtype).removeprefix("torch.")
        facts = {
            "source": source.source,
            "planted": source.planted,
            "dtype": dtype,
            "layers": source.config.num_hidden_layers,
            "vocabulary": source.config.vocab_size,
            "parameters": parameters,
            "kv_cache_bytes": draft.cache.nbytes,
            "levels": kind,
        }
        summary = f"{source.source}, {parameters / 1e6:.1f} M parameters, {dtype}, {kind}"
        return BuiltDraft(draft, self._report, facts, summary)
