"""Tiny random checkpoints: the shape of a real target in a few hundred kilobytes, made in milliseconds.

Everything here is deterministic (same arguments, same weights, same vocabulary) and needs no network::

    model = tiny_model("qwen2", layers=3)              # fp32, eval, CPU
    tokenizer = tiny_tokenizer()                       # byte-level BPE with a ChatML template
    folder = tiny_checkpoint(tmp_path / "t", "llama")  # safetensors + tokenizer, as a hub folder holds them

The weights are noise, but noise with an opinion: their standard deviation is large enough (``std``) that the
logits are well apart and greedy text does not fall into a one-token loop at once.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
"""Every family that :func:`tiny_model` can build: the families a target may have."""

PAD_ID, START_ID, END_ID = 0, 1, 2
"""Ids of ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>`` (ends a text) in :func:`tiny_tokenizer`."""

MIN_VOCAB = 259
"""The three special tokens and one token per byte: the smallest vocabulary of :func:`tiny_tokenizer`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

_CORPUS = [
    "The user asks a question and the assistant answers it in a few short words.",
    "A tree of draft tokens is verified by the target in a single pass over its weights.",
    "def add(first, second):\n    return first + second\n",
    "There are 12 eggs in a box; how many eggs are there in 7 boxes? 12 * 7 = 84.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps on the warm stones.",
]


def tiny_model(
    family: str = "llama",
    vocab_size: int = 320,
    hidden_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int | None = None,
    tie: bool = False,
    max_positions: int = 512,
    std: float = 0.15,
) -> PreTrainedModel:
    """A random model of ``family``, in fp32, in eval mode, without gradients, with SDPA attention.

    Args:
        family: one of :data:`FAMILIES`.
        tie: whether the LM head shares the embedding's weight.
        std: standard deviation of every Linear and embedding weight.

    The global random state is left as it was.
    """
    config_class, model_class = _CLASSES[family]
    extra = {"head_dim": hidden_size // heads} if family in {"qwen3", "mistral", "llama"} else {}
    if family == "mistral":
        extra["sliding_window"] = None
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie,
        initializer_range=std,
        pad_token_id=PAD_ID,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        attn_implementation="sdpa",
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # Real biases and norms are not 0 and 1: code that forgets them must not pass by luck.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0.0, std)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
    model.generation_config.do_sample = False
    return model.float().eval().requires_grad_(False)


@functools.lru_cache
def _trained(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocab_size: int = 320, *, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can encode any text; at most ``vocab_size`` ids (all used up to 420).

    Args:
        vocab_size: at least :data:`MIN_VOCAB`.
        chat_template: whether it carries a ChatML template.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"a byte-level tokenizer needs vocab_size >= {MIN_VOCAB}, got {vocab_size}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_checkpoint(path: Path, family: str = "llama", *, chat_template: bool = True, **model: object) -> Path:
    """Write :func:`tiny_model` and :func:`tiny_tokenizer` into the folder ``path`` and return it.

    ``model`` goes to :func:`tiny_model` (``vocab_size``, ``layers``, ``seed``, ...).
    """
    built = tiny_model(family, **model)
    built.save_pretrained(path)
    tiny_tokenizer(built.config.vocab_size, chat_template=chat_template).save_pretrained(path)
    return Path(path)


def edit_config(path: Path, **changes: object) -> None:
    """Overwrite keys of the ``config.json`` in the checkpoint folder ``path``."""
    file = Path(path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard_weights(path: Path, **changes: Tensor) -> dict[str, dict[str, str]]:
    """Write the weights of the folder ``path``, with ``changes``, into two shards beside them; returns their index."""
    state = list((load_file(path / "model.safetensors") | changes).items())
    files = {}
    for part in range(2):
        own, file = dict(state[part::2]), f"model-{part + 1:05}-of-00002.safetensors"
        save_file(own, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(own, file)
    return {"weight_map": files}


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the one weight file of the checkpoint folder ``path`` after ``change(tensors)``."""
    file = Path(path) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
