"""The engine as a library, without Hydra, records or benchmarks.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from subspec import generate

    model = AutoModelForCausalLM.from_pretrained("ORG/NAME").eval()
    tokenizer = AutoTokenizer.from_pretrained("ORG/NAME")
    result = generate(model, tokenizer("Once upon a time").input_ids, tokenizer=tokenizer, max_new_tokens=64)
    print(result.text, result.stats.iterations)

For more than one text build the engine once with :func:`build_engine` and call its ``generate``. Any draft will do:

    engine = build_engine(model, tokenizer=tokenizer, draft="eagle2", draft_path="ORG/HEAD", growth=Eagle2(6, 10, 60))
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subspec.config.schema import Eagle2DraftConfig, EmbeddedTargetConfig, HubTargetConfig
from subspec.decoding.arguments import ArgumentError, finite_number, prompt_list, stop_list, whole_number
from subspec.decoding.bitwise_choice import AUTO, choose_bitwise
from subspec.decoding.draft import Draft
from subspec.decoding.engine import Engine, TokenCallback
from subspec.decoding.result import GenerationResult
from subspec.decoding.sampling import Sampling
from subspec.decoding.stopping import TextDecoder, eos_ids
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam, TreePolicy
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.eagle_checkpoint import load_head, locate_for, locate_head
from subspec.drafts.layer_skip import skip_layers, usual_layers
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.small_model import (
    Vocabulary,
    check_vocabularies,
    load_small_model,
    open_checkpoint,
    shipped_small_model,
)
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.quant.base import Quantizer, quantize_model
from subspec.quant.hqq import HqqQuantizer
from subspec.targets.check_model import check_loaded_model, check_model_config
from subspec.targets.generation_settings import not_applied
from subspec.utils.console import print_note

DraftName = Literal["none", "subspec", "small_model", "eagle2", "layer_skip"]
"""What proposes tokens, by the names of ``conf/draft``."""

SUBSTITUTE_TEMPERATURE = 0.2
"""Of the substitute's tree (the paper's); other drafts: 1."""

MAX_LENGTH = 2048
"""Most tokens of prompt and output together, unless the model has fewer positions."""


def build_engine(
    model: PreTrainedModel,
    *,
    tokenizer: TextDecoder | None = None,
    draft: DraftName = "subspec",
    draft_path: str | Path | None = None,
    quantizer: Quantizer | None = None,
    growth: TreePolicy | None = None,
    draft_temperature: float | None = None,
    sampling: Sampling | None = None,
    max_length: int | None = None,
    prefill_chunk: int = 256,
    bitwise: bool | Literal["auto"] = "auto",
) -> Engine:
    """An engine that reproduces ``model``'s output, whatever drafts.

    Args:
        model: a transformers causal LM (Llama, Qwen2, Qwen3 or Mistral family), in eval mode, whole on one device. It
            is not changed.
        tokenizer: for text and stop strings; a small model's own tokenizer, if it has one, is compared with it. One
            whose way of decoding is not known (see :mod:`subspec.decoding.growing_text`) streams no text before the
            end.
        draft: ``subspec``: a quantized substitute of the same model; ``small_model``: another, smaller model;
            ``eagle2``: an EAGLE head; ``layer_skip``: half of the model's own layers; ``none``: plain decoding, one
            pass per token.
        draft_path: folder or hub id of the small model or the EAGLE head; None: the one that ships with the project
            for SmolLM2-135M-Instruct.
        quantizer: of the substitute; None: HQQ, 4 bits, groups of 64.
        growth: the draft tree's shape; None: ``Beam(depth=16, width=4)``.
        draft_temperature: sharpens the draft tree; does not touch the output. None: 0.2 for the substitute, else 1.
        sampling: None: greedy. Settings in ``model.generation_config`` are not applied; a warning names those that
            would change the output.
        max_length: most tokens of prompt and output together; None: 2048, or the model's positions if they are fewer.
        prefill_chunk: prompt tokens per target pass.
        bitwise: whether every pass of the model gives a token the same bits (:mod:`subspec.decoding.bitwise`), so that
            the output is plain decoding's in bfloat16 and float16 too. ``auto``: where that is covered; the first
            engine on a card then measures kernels for some seconds. True: refused where it is not.

    Raises:
        ConfigError: a model whose tree passes would not be exact, no such draft, or one that is not this model's; an
            argument of another type or out of range (``ArgumentError``).
        SubspecError: the draft's files cannot be read or fetched. Messages may call ``draft_path`` by its name in
            configurations, ``draft.path``.
    """
    if draft not in get_args(DraftName):
        raise ConfigError(f"draft={draft}: no such draft; use {', '.join(get_args(DraftName))}")
    if draft_path is not None and draft not in ("small_model", "eagle2"):
        raise ConfigError(f"draft_path={draft_path}: draft={draft} has no weights of its own: leave it out")
    if quantizer is not None and draft != "subspec":
        raise ConfigError(f"draft={draft}: a quantizer is for draft=subspec: leave it out")
    check_loaded_model(model)
    max_length = _length(model, max_length)
    whole_number("prefill_chunk", prefill_chunk, least=1)
    _check_options(model, draft_path, quantizer, growth, draft_temperature, sampling, tokenizer)
    ignored = not_applied(
        model.generation_config.to_dict() if model.generation_config else {},
        own="the argument sampling",
        sampling=sampling,
    )
    if ignored:
        warnings.warn(f"settings in model.generation_config are not applied: {ignored}", stacklevel=2)
    target = TargetModel(model)
    if not (isinstance(bitwise, bool) or bitwise == AUTO):
        raise ArgumentError(f"bitwise={bitwise!r} must be True, False or {AUTO!r}")
    chosen = choose_bitwise(
        bitwise, model.config, target.dtype, target.device, print_note, loaded=model, key="bitwise"
    )
    chosen.apply(target)
    growth = None if draft == "none" else growth or Beam(depth=16, width=4)
    temperature = draft_temperature
    if temperature is None:
        temperature = SUBSTITUTE_TEMPERATURE if draft == "subspec" else 1.0
    built: Draft | None = None
    if draft == "subspec":
        built = SubstituteDraft(_substitute(model, quantizer, target), temperature)
    elif draft == "layer_skip":
        layers = usual_layers(model.config.num_hidden_layers)
        built = SubstituteDraft(skip_layers(model, layers), temperature)
    elif growth is not None:
        if draft == "eagle2":
            built = _eagle(draft_path, target, growth, temperature)
        else:
            built = _small_model(draft_path, target, tokenizer, growth, temperature, max_length)
    return Engine(
        target,
        built,
        growth,
        sampling=sampling,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        eos_token_ids=eos_ids(model.generation_config, model.config),
        tokenizer=tokenizer,
    )


def _length(model: PreTrainedModel, max_length: int | None) -> int:
    """Most tokens of prompt and output together; refuses a model that is not exact over that length."""
    if max_length is None:
        positions = getattr(model.config, "max_position_embeddings", None)
        max_length = min(MAX_LENGTH, positions or MAX_LENGTH)
    whole_number("max_length", max_length, least=2)
    check_model_config(model.config, name=_name(model), max_length=max_length, key="max_length")
    return max_length


def _check_options(
    model: PreTrainedModel,
    draft_path: str | Path | None,
    quantizer: Quantizer | None,
    growth: TreePolicy | None,
    draft_temperature: float | None,
    sampling: Sampling | None,
    tokenizer: TextDecoder | None,
) -> None:
    if draft_path is not None and not str(draft_path).strip():
        raise ArgumentError("draft_path is empty: pass a folder or hub id, or leave it out")
    if quantizer is not None and not hasattr(quantizer, "quantize"):
        raise ArgumentError(
            f"quantizer is a {type(quantizer).__name__}: pass a HqqQuantizer, or None for 4 bits"
        )
    if growth is not None and not isinstance(growth, TreePolicy):
        raise ArgumentError(
            f"growth is a {type(growth).__name__}: pass a tree, Beam(depth=16, width=4) for instance"
        )
    width, vocabulary = getattr(growth, "width", 1), model.config.vocab_size
    if width > vocabulary:
        raise ArgumentError(
            f"growth has width {width}, and the model a vocabulary of {vocabulary} tokens: lower the width"
        )
    if draft_temperature is not None and finite_number("draft_temperature", draft_temperature) <= 0:
        raise ArgumentError(f"draft_temperature={draft_temperature} must be positive")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ArgumentError(
            f"sampling is a {type(sampling).__name__}: pass Sampling(temperature=0.7), or None for greedy"
        )
    if tokenizer is not None and not hasattr(tokenizer, "decode"):
        raise ArgumentError(
            f"tokenizer is a {type(tokenizer).__name__}, which has no decode(): pass a tokenizer, or None"
        )


def _substitute(model: PreTrainedModel, quantizer: Quantizer | None, target: TargetModel) -> PreTrainedModel:
    substitute = share_parameters(model)
    quantizer = quantizer or HqqQuantizer(
        compute_dtype=target.dtype, device=target.device, unpack=target.device.type == "cpu"
    )
    quantize_model(substitute, quantizer, modules=["attention", "mlp"], skip_layers=[])
    return substitute


def _eagle(
    path: str | Path | None, target: TargetModel, growth: TreePolicy, temperature: float
) -> EagleDraft:
    if path is None:
        embedded = EmbeddedTargetConfig(name="smollm2_135m")
        files = locate_for(Eagle2DraftConfig(name="eagle2"), embedded, print_note)
    else:
        files = locate_head(str(path), print_note, key="draft_path")
    hidden, name = target.model.config.hidden_size, _name(target.model)
    loaded = load_head(files, hidden=hidden, target=name, dtype=target.dtype, device=target.device)
    return EagleDraft(loaded.head, target, growth, temperature)


def _small_model(
    path: str | Path | None,
    target: TargetModel,
    tokenizer: TextDecoder | None,
    growth: TreePolicy,
    temperature: float,
    max_length: int,
) -> SeparateCacheDraft:
    named = shipped_small_model() if path is None else HubTargetConfig(name=str(path), path=str(path))
    source = open_checkpoint(named, target.dtype, print_note)
    name = f"the small model {source.name}"
    check_model_config(source.config, name=name, max_length=max_length, key="max_length")
    theirs = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    check_vocabularies(
        Vocabulary(source.name, source.config.vocab_size, source.tokenizer),
        Vocabulary(_name(target.model), target.vocab_size, theirs),
    )
    levels = SubstituteDraft(load_small_model(source, target.vocab_size, target.device), temperature)
    return SeparateCacheDraft(
        levels,
        levels.decoder,
        max_length=max_length,
        draft_rows=growth.draft_rows,
        vocab_size=target.vocab_size,
        width=getattr(growth, "width", 1),
    )


def _name(model: PreTrainedModel) -> str:
    return model.config.name_or_path or type(model).__name__


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int] | torch.Tensor,
    *,
    tokenizer: TextDecoder | None = None,
    max_new_tokens: int | None = 128,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    on_tokens: TokenCallback | None = None,
    draft: DraftName = "subspec",
    draft_path: str | Path | None = None,
    sampling: Sampling | None = None,
    growth: TreePolicy | None = None,
    max_length: int | None = None,
) -> GenerationResult:
    """Continue one prompt, speculatively and losslessly.

    Args:
        prompt_ids: token ids, a sequence or an int64 tensor [n] or [1, n].
        max_new_tokens: most tokens to emit; None: until ``max_length``.
        stop: a string or several that end the text (need ``tokenizer``).
        seed: of the samples; the same seed gives the same text with and without speculation.
        on_tokens: called with every emitted block of ids and the text that became certain with it.

    Returns:
        Ids, text, finish reason and statistics. For the remaining arguments see :func:`build_engine`.

    Raises:
        ConfigError: as :func:`build_engine`; prompt_ids, stop, max_new_tokens or seed are not what they have to be
            (``ArgumentError``).
    """
    ids, stops = prompt_list(prompt_ids), stop_list(stop)
    if stops and tokenizer is None:
        raise ArgumentError(f"stop={list(stops)}: stop strings need a tokenizer")
    if max_new_tokens is not None:
        whole_number("max_new_tokens", max_new_tokens, least=1)
    whole_number("seed", seed, least=0)
    engine = build_engine(
        model,
        tokenizer=tokenizer,
        draft=draft,
        draft_path=draft_path,
        growth=growth,
        sampling=sampling,
        max_length=max_length,
    )
    return engine.generate(ids, max_new_tokens=max_new_tokens, stop=stops, seed=seed, on_tokens=on_tokens)
