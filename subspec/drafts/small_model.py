"""``draft=small_model``: another, smaller model on a cache of its own, as modules or as captured levels.

It needs no tokenizer. Its vocabulary may be padded otherwise than the target's: ids beyond either are never drafted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from subspec.config.schema import CheckpointDraftConfig, Config, Dtype, NoQuantConfig, StreamOffloadConfig
from subspec.decoding.draft import Draft, LevelDraft
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.target_model import TargetModel
from subspec.drafts.quantized import quantize_draft
from subspec.drafts.separate_cache import SeparateCacheDraft, prompt_rows
from subspec.drafts.small_checkpoint import load_small_config, open_small_model, small_identity, small_model_config
from subspec.drafts.spec import BuiltDraft, DraftSpec, capture, why_not_captured
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError
from subspec.levels.build import role_shapes
from subspec.levels.dense import check_level_support, dense_levels
from subspec.memory.allocator import Allocation
from subspec.memory.captured_level import LevelShape, captured_level_bytes, fused_linears
from subspec.memory.draft_memory import CAPTURED_ITEMSIZE, DraftMemory, SizingInputs, kv_bytes
from subspec.memory.trace import target_trace
from subspec.quant.quantize_model import QuantReport
from subspec.targets.check_model import check_model_config
from subspec.targets.device import check_memory, resolve_dtype
from subspec.targets.layer_bytes import flat_bytes, flat_layer
from subspec.targets.meta_model import count_parameters, empty_model, fill
from subspec.targets.model_spec import ModelSpec
from subspec.targets.source import LayerSource

EXTRA_SHARE = 0.01
"""Share of tokens that only one of two otherwise equal vocabularies may have: special tokens added later."""


def small_dtype(draft: CheckpointDraftConfig, target: torch.dtype) -> torch.dtype:
    """The small model's type; ``auto`` is the target's."""
    return target if draft.dtype is Dtype.auto else getattr(torch, draft.dtype.value)


def check_small_model(config: Config, model: PretrainedConfig) -> None:
    """Check the small model's configuration."""
    check_model_config(
        model,
        name=f"the small model {small_model_config(config).name}",
        max_length=config.decoding.max_length,
        key="decoding.max_length",
    )


def check_shipped(config: Config, target: PretrainedConfig) -> None:
    """Refuse the shipped small model, which has no tokenizer, for a target with logits of another width."""
    if config.draft.path is None:
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
    ours, theirs = ({i: token for token, i in model.tokenizer.get_vocab().items()} for model in (draft, target))
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


class OwnModelMemory(DraftMemory):
    """A model with a KV cache of its own of ``draft_rows`` + ``decoding.max_length`` + ``rows`` rows."""

    def __init__(self, inputs: SizingInputs, draft_rows: int, rows: int) -> None:
        config, target = load_small_config(inputs.config), inputs.spec
        self.model = model = ModelSpec.of(config)
        known = min(model.vocab, target.vocab)
        table = max(model.vocab, target.vocab) * model.hidden * CAPTURED_ITEMSIZE
        head = known * model.hidden * CAPTURED_ITEMSIZE
        layer = flat_bytes(model.layer, CAPTURED_ITEMSIZE)
        length = inputs.config.decoding.max_length
        self.trace = target_trace(config, CAPTURED_ITEMSIZE, bitwise=False)
        cache = kv_bytes(model, length, draft_rows, rows, CAPTURED_ITEMSIZE)
        self.allocations = (
            Allocation(
                "small model",
                ((layer, model.layers), (table, 1), (head, int(not model.tied)), (model.hidden * CAPTURED_ITEMSIZE, 1)),
                f"{model.layers} layers, {model.vocab} tokens, bfloat16",
            ),
            Allocation("small model's KV", ((cache, inputs.texts),), f"{draft_rows} + {length} + {rows} rows"),
        )
        self.read = layer * model.layers + head


class SmallModelMemory(OwnModelMemory):
    """It runs the prompt itself, and its levels as captured graphs."""

    def __init__(self, inputs: SizingInputs) -> None:
        vocab, policy, length = inputs.spec.vocab, inputs.policy, inputs.config.decoding.max_length
        rows = prompt_rows(length)
        super().__init__(inputs, policy.draft_rows, rows)
        model = replace(self.model, vocab=min(self.model.vocab, vocab))
        shape = LevelShape.of(model, fused_linears(role_shapes(model.layer), exact=True))
        self.level = captured_level_bytes(replace(shape, target_vocab=vocab), policy.width, inputs.sampling)
        self.workspaces = {f"the small model's prompt, {rows} tokens": self.trace.prefill_bytes(rows, length)}


class SmallModelSpec(DraftSpec):
    """``draft=small_model``."""

    from_disk = False
    memory = SmallModelMemory
    weights_identity = staticmethod(small_identity)

    @classmethod
    def check(cls, config: Config) -> None:
        draft = config.draft
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

    def prepare(self) -> None:
        """Load the small model; captured levels and prompt passes read the same bytes."""
        context, draft = self.context, self.context.config.draft
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
            check_memory(count_parameters(source.config) * dtype.itemsize, device, f"small model {source.name}")
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
        context, config, source = self.context, self.context.config.draft, self._source
        modules = config.quantize or why_not_captured(context, source.config, source.dtype)
        levels: LevelDraft
        if modules and context.plan is None:
            kind, levels = "modules", SubstituteDraft(self._model, config.temperature)
            model = levels.model
        else:
            kind, model = "fused, bfloat16", TargetModel(self._model)
            levels = capture(dense_levels(self._model, range(model.num_layers)), config)
        draft = SeparateCacheDraft(
            levels,
            model,
            max_length=context.config.decoding.max_length,
            draft_rows=context.policy.draft_rows,
            vocab_size=target.vocab_size,
            width=context.policy.width,
        )
        return self.built(draft, draft.cache, kind)

    def built(self, draft: Draft, cache: KVCache, kind: str) -> BuiltDraft:
        """``draft`` with its facts; ``cache``: its own. ``kind``: what runs its levels."""
        source = self._source
        parameters, dtype = count_parameters(source.config), str(source.dtype).removeprefix("torch.")
        facts = {"source": source.source, "planted": source.planted, "dtype": dtype, "parameters": parameters}
        facts |= {"layers": source.config.num_hidden_layers, "vocabulary": source.config.vocab_size}
        facts |= {"kv_cache_bytes": cache.nbytes, "levels": kind}
        summary = f"{source.source}, {parameters / 1e6:.1f} M parameters, {dtype}, {kind}"
        return BuiltDraft(draft, self._report, facts, summary)
