"""The engine as a library, without Hydra, records or benchmarks.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from subspec import generate

    model = AutoModelForCausalLM.from_pretrained("ORG/NAME").eval()
    tokenizer = AutoTokenizer.from_pretrained("ORG/NAME")
    result = generate(model, tokenizer("Once upon a time").input_ids, tokenizer=tokenizer, max_new_tokens=64)
    print(result.text, result.stats.iterations)

For more than one text build the engine once with :func:`build_engine` and call its ``generate``.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from subspec.config_checks import MOVING_ROPE, rope_kind
from subspec.decoding.decoder import Decoder
from subspec.decoding.engine import Engine, TokenCallback
from subspec.decoding.growth import Beam, Growth
from subspec.decoding.result import GenerationResult
from subspec.decoding.sampling import Sampling
from subspec.decoding.stopping import TextDecoder, eos_ids
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.quant.base import Quantizer, quantize_model
from subspec.quant.hqq import HqqQuantizer


def build_engine(
    model: PreTrainedModel,
    *,
    tokenizer: TextDecoder | None = None,
    speculative: bool = True,
    quantizer: Quantizer | None = None,
    growth: Growth | None = None,
    draft_temperature: float = 0.2,
    sampling: Sampling | None = None,
    max_length: int = 2048,
    prefill_chunk: int = 256,
) -> Engine:
    """An engine that reproduces ``model``'s output, drafting with a quantized substitute of the same model.

    Args:
        model: a transformers causal LM (Llama, Qwen2, Qwen3 or Mistral family), in eval mode. It is not changed.
        tokenizer: for text and stop strings.
        speculative: False decodes plainly, one pass per token.
        quantizer: of the substitute; None: HQQ, 4 bits, groups of 64.
        growth: the draft tree's shape; None: ``Beam(depth=16, width=4)``.
        draft_temperature: sharpens the draft tree; does not touch the output.
        sampling: None: greedy.
        max_length: most tokens of prompt and output together.
        prefill_chunk: prompt tokens per target pass.
    """
    target = Decoder(model)
    kind = rope_kind(model.config)
    if kind in MOVING_ROPE:
        raise ConfigError(
            f"{kind} rotary embeddings depend on how far a pass reaches: a tree would change them"
        )
    draft = None
    if speculative:
        substitute = share_parameters(model)
        quantizer = quantizer or HqqQuantizer(
            compute_dtype=target.dtype, device=target.device, unpack=target.device.type == "cpu"
        )
        quantize_model(substitute, quantizer, modules=["attention", "mlp"], skip_layers=[])
        draft = SubstituteDraft(substitute, draft_temperature)
    return Engine(
        target,
        draft,
        (growth or Beam(depth=16, width=4)) if speculative else None,
        sampling=sampling,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        eos_token_ids=eos_ids(model.generation_config, model.config),
        tokenizer=tokenizer,
    )


def generate(
    model: PreTrainedModel,
    prompt_ids: Sequence[int] | torch.Tensor,
    *,
    tokenizer: TextDecoder | None = None,
    max_new_tokens: int | None = 128,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_tokens: TokenCallback | None = None,
    speculative: bool = True,
    sampling: Sampling | None = None,
    growth: Growth | None = None,
    max_length: int = 2048,
) -> GenerationResult:
    """Continue one prompt, speculatively and losslessly.

    Args:
        prompt_ids: token ids, a sequence or an int64 tensor [n] or [1, n].
        max_new_tokens: most tokens to emit; None: until ``max_length``.
        stop: strings that end the text (need ``tokenizer``).
        seed: of the samples; the same seed gives the same text with and without speculation.
        on_tokens: called with every emitted block of ids and the text that became certain with it.

    Returns:
        Ids, text, finish reason and statistics. For the remaining arguments see :func:`build_engine`.
    """
    ids = prompt_ids.flatten().tolist() if isinstance(prompt_ids, torch.Tensor) else list(prompt_ids)
    engine = build_engine(
        model,
        tokenizer=tokenizer,
        speculative=speculative,
        growth=growth,
        sampling=sampling,
        max_length=max_length,
    )
    return engine.generate(ids, max_new_tokens=max_new_tokens, stop=stop, seed=seed, on_tokens=on_tokens)
