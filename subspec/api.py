"""The engine as a library, without Hydra, records or benchmarks.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from subspec import generate

    model = AutoModelForCausalLM.from_pretrained("ORG/NAME").eval()
    tokenizer = AutoTokenizer.from_pretrained("ORG/NAME")
    result = generate(model, tokenizer("Once upon a time").input_ids, tokenizer=tokenizer, max_new_tokens=64)
    print(result.text, result.stats.iterations)

For more than one text build the engine once with :func:`build_engine` and call its ``generate``. Any draft will do:

    engine = build_engine(model, draft="eagle2", draft_path="ORG/HEAD", tree_policy=Eagle2(6, 10, 60))
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from subspec.config.defaults import whole_tree
from subspec.config.enums import Cache
from subspec.config.schema import (
    BlockHeadDraftConfig,
    Config,
    DecodingConfig,
    DraftConfig,
    Eagle2DraftConfig,
    Eagle3DraftConfig,
    EmbeddedTargetConfig,
    HqqConfig,
    LayerSkipDraftConfig,
    NoDraftConfig,
    OffloadConfig,
    PardDraftConfig,
    PromptLookupDraftConfig,
    SmallModelDraftConfig,
    SubstituteDraftConfig,
)
from subspec.decoding.adaptive import Adaptive
from subspec.decoding.arguments import ArgumentError, finite_number, prompt_list, stop_list, whole_number
from subspec.decoding.bitwise_choice import AUTO
from subspec.decoding.engine import Engine
from subspec.decoding.result import GenerationResult
from subspec.decoding.sampling import Sampling
from subspec.decoding.stopping import TextDecoder, eos_ids
from subspec.decoding.text import TokenCallback
from subspec.decoding.tree_policy import TreePolicy
from subspec.errors import ConfigError, reworded
from subspec.quant.quantize_model import Quantizer
from subspec.session import assemble
from subspec.targets import Target
from subspec.targets.check_model import check_loaded_model, check_model_config
from subspec.targets.generation_settings import not_applied

DraftName = Literal[
    "none", "subspec", "small_model", "eagle2", "eagle3", "block_head", "pard", "layer_skip", "prompt_lookup"
]
"""The kinds of draft, by their names in ``conf/draft``."""

PATHS = {
    "small_model": SmallModelDraftConfig,
    "eagle2": Eagle2DraftConfig,
    "eagle3": Eagle3DraftConfig,
    "block_head": BlockHeadDraftConfig,
    "pard": PardDraftConfig,
}
"""The drafts that have files of their own."""

Bitwise = bool | Literal["auto"]

MAX_LENGTH = 2048
"""Most tokens of prompt and output together, unless the model has fewer positions."""

ARGUMENTS = {"draft.path": "draft_path", "decoding.max_length": "max_length", "decoding.bitwise": "bitwise"}
"""Names of arguments, by the keys of configurations that messages name."""


def build_engine(
    model: PreTrainedModel,
    *,
    tokenizer: TextDecoder | None = None,
    draft: DraftName = "subspec",
    draft_path: str | Path | None = None,
    quantizer: Quantizer | None = None,
    tree_policy: TreePolicy | None = None,
    draft_temperature: float | None = None,
    sampling: Sampling | None = None,
    max_length: int | None = None,
    prefill_chunk: int = 256,
    bitwise: Bitwise = "auto",
) -> Engine:
    """Build an engine that reproduces ``model``'s output with any draft.

    Args:
        model: a transformers causal LM (Llama, Qwen2, Qwen3 or Mistral family), in eval mode, whole on one device. It
            is not changed.
        tokenizer: for text and stop strings; compared with a small model's own tokenizer. If its way of decoding is
            not known (see :mod:`subspec.decoding.growing_text`), no text is streamed before the end.
        draft: ``subspec``: a quantized substitute of the same model; ``small_model``: another, smaller model;
            ``eagle2``, ``eagle3``: an EAGLE head; ``block_head``: a DFlash, JetSpec or DSpark head; ``pard``: a PARD
            model; ``layer_skip``: half of the model's own layers; ``prompt_lookup``: continuations found in the text;
            ``none``: plain decoding, one pass per token.
        draft_path: folder or hub id of the small model or the head; None: the one that ships with the project for
            SmolLM2-135M-Instruct (none for ``pard``).
        quantizer: of the substitute; None: HQQ, 4 bits, groups of 64.
        tree_policy: the draft tree's shape; None: ``Adaptive(16, 4)``, on a CPU ``Adaptive(16, 1, min_depth=0)``.
        draft_temperature: sharpens the draft tree; does not touch the output. None: 0.2 for the substitute, else 1.
        sampling: None: greedy. Settings in ``model.generation_config`` are not applied; a warning names those that
            would change the output.
        max_length: most tokens of prompt and output together; None: 2048, or the model's positions if they are fewer.
        prefill_chunk: prompt tokens per target pass.
        bitwise: whether every pass of the model gives a token the same bits (:mod:`subspec.decoding.bitwise`), so that
            the output is plain decoding's in bfloat16 and float16 too. ``auto``: if it is supported; the first engine
            on a GPU then measures kernels for some seconds. True: refused if it is not supported.

    Raises:
        ConfigError: a model whose tree passes would not be exact; a draft that is unknown or was made for another
            model; an argument of another type or out of range (``ArgumentError``).
        SubspecError: the draft's files cannot be read or fetched.
    """
    if draft not in get_args(DraftName):
        raise ConfigError(f"draft={draft}: no such draft; use {', '.join(get_args(DraftName))}")
    if draft_path is not None and draft not in PATHS:
        raise ConfigError(f"draft_path={draft_path}: draft={draft} has no weights of its own: leave it out")
    if quantizer is not None and draft != "subspec":
        raise ConfigError(f"draft={draft}: a quantizer is for draft=subspec: leave it out")
    check_loaded_model(model)
    max_length = _length(model, max_length)
    whole_number("prefill_chunk", prefill_chunk, least=1)
    _check_options(model, draft_path, quantizer, tree_policy, draft_temperature, sampling, tokenizer)
    if not (isinstance(bitwise, bool) or bitwise == AUTO):
        raise ArgumentError(f"bitwise={bitwise!r} must be True, False or {AUTO!r}")
    ignored = not_applied(
        model.generation_config.to_dict() if model.generation_config else {},
        own="the argument sampling",
        sampling=sampling,
    )
    if ignored:
        warnings.warn(f"settings in model.generation_config are not applied: {ignored}", stacklevel=2)
    drafted: DraftConfig = _draft_config(draft, draft_path)
    if draft_temperature is not None and draft != "none":
        drafted = replace(drafted, temperature=draft_temperature)
    embedding = model.get_input_embeddings().weight
    target = Target(
        name=_name(model),
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=eos_ids(model.generation_config, model.config),
        dtype=embedding.dtype,
        device=embedding.device,
        source="",
        identity="",
    )
    config = Config(
        target=EmbeddedTargetConfig(name=target.name),
        draft=drafted,
        quant=HqqConfig(name="hqq", cache=Cache.off),
        decoding=DecodingConfig(name="library", max_length=max_length, prefill_chunk=prefill_chunk, bitwise=bitwise),
        offload=OffloadConfig(name="none"),
    )
    with reworded(_argument_names):
        kind = target.device.type
        policy = tree_policy or Adaptive(16, **whole_tree(kind))
        return assemble(config, target, policy=policy, sampling=sampling, quantizer=quantizer).engine


def _draft_config(draft: DraftName, path: str | Path | None) -> DraftConfig:
    given = None if path is None else str(path)
    if draft in PATHS:
        return PATHS[draft](name=draft, path=given)
    kinds = {
        "none": NoDraftConfig,
        "subspec": SubstituteDraftConfig,
        "layer_skip": LayerSkipDraftConfig,
        "prompt_lookup": PromptLookupDraftConfig,
    }
    return kinds[draft](name=draft)


def _argument_names(text: str) -> str:
    """Replace keys of configurations in a message by the names of arguments."""
    for key, argument in ARGUMENTS.items():
        text = text.replace(key, argument)
    return text


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
    tree_policy: TreePolicy | None,
    draft_temperature: float | None,
    sampling: Sampling | None,
    tokenizer: TextDecoder | None,
) -> None:
    if draft_path is not None and not str(draft_path).strip():
        raise ArgumentError("draft_path is empty: pass a folder or hub id, or leave it out")
    if quantizer is not None and not hasattr(quantizer, "quantize"):
        raise ArgumentError(f"quantizer is a {type(quantizer).__name__}: pass a HqqQuantizer, or None for 4 bits")
    if tree_policy is not None and not isinstance(tree_policy, TreePolicy):
        raise ArgumentError(f"tree_policy is a {type(tree_policy).__name__}: pass Beam(depth=16, width=4) for instance")
    vocabulary = model.config.vocab_size
    if tree_policy is not None and tree_policy.width > vocabulary:
        raise ArgumentError(
            f"tree_policy has width {tree_policy.width}, and the model a vocabulary of {vocabulary} tokens: lower the "
            "width"
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
    tree_policy: TreePolicy | None = None,
    max_length: int | None = None,
    bitwise: Bitwise = "auto",
) -> GenerationResult:
    """Continue one prompt, speculatively and losslessly.

    Args:
        prompt_ids: token ids, a sequence or an int64 tensor [n] or [1, n].
        max_new_tokens: most tokens to emit; None: until ``max_length``.
        stop: a string or several that end the text (need ``tokenizer``).
        seed: of the samples; the same seed gives the same text with and without speculation.
        on_tokens: called with every emitted block of ids and the text that became final with it.

    Returns:
        Ids, text, finish reason and statistics. For the remaining arguments see :func:`build_engine`.

    Raises:
        ConfigError: as :func:`build_engine`; prompt_ids, stop, max_new_tokens or seed have another type or are out of
            range (``ArgumentError``).
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
        tree_policy=tree_policy,
        sampling=sampling,
        max_length=max_length,
        bitwise=bitwise,
    )
    return engine.generate(ids, max_new_tokens=max_new_tokens, stop=stops, seed=seed, on_tokens=on_tokens)
