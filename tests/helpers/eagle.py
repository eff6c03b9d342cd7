"""EAGLE heads with random weights, as modules and as folders in the published format."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from subspec.decoding.engine import Engine
from subspec.drafts.block_head import BlockHead, BlockShape
from subspec.drafts.eagle3_head import Eagle3Head, Eagle3Shape
from subspec.drafts.eagle_head import OPTIONAL, EagleHead, EagleShape
from tests.helpers.drafts import begin, grow, verified

QWEN2_BIASES = frozenset(f"layers.0.self_attn.{name}_proj.bias" for name in "qkv")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES = {
    # As many KV heads as heads, where the tiny target has 2: as the published heads for Qwen2.
    "qwen2": EagleShape(64, 4, 4, 16, 128, QWEN2_BIASES),
    "llama3": EagleShape(64, 8, 2, 8, 96, frozenset({"fc.bias"}), 1e-5, LLAMA3_ROPE, 131_072),
    "wide heads": EagleShape(64, 2, 1, 40, 64, frozenset(OPTIONAL)),
}
"""Heads for targets of hidden size 64, by what they look like."""

QWEN3 = {"kv_heads": 2, "head_dim": 24, "rope": {"rope_type": "default", "rope_theta": 1e6}}

SHAPES3 = {
    # As published for Llama-3.1-8B: its positions end at 8 here, before the texts do.
    "official": Eagle3Shape(
        64, 8, 2, 8, 96, max_positions=8, fc_inputs=192, draft_vocab=160, mapped=True, last_id=319
    ),
    "speculators": Eagle3Shape(
        64, 4, intermediate=96, **QWEN3, fc_inputs=192, draft_vocab=100, mapped=True, last_id=319, embeddings=320,
        norm_before_residual=True,
    ),
    "deepspec": Eagle3Shape(
        64, 4, intermediate=96, **QWEN3, fc_inputs=320, draft_vocab=320, embeddings=320, qk_norm=True
    ),
    # A hidden size and ids of its own, every bias, and tables that are larger than the target's.
    "narrow": Eagle3Shape(
        40, 2, 1, 20, 64, frozenset(OPTIONAL), fc_inputs=64, draft_vocab=330, embeddings=333, layers=(4,)
    ),
    "shared": Eagle3Shape(64, 4, 4, 16, 64, fc_inputs=128, layers=(7, 0)),
}  # fmt: skip
"""EAGLE-3 heads for targets of hidden size 64, eight layers and 320 tokens."""


HEADS = {EagleShape: EagleHead, Eagle3Shape: Eagle3Head, BlockShape: BlockHead}


def random_head(shape: EagleShape, seed: int = 0, std: float = 0.15) -> EagleHead:
    """Random weights; norms are not 1 and biases not 0, so that code that forgets them does not pass by luck."""
    head = HEADS[type(shape)](shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(shape, Eagle3Shape) and shape.mapped:
            ids = torch.randperm(shape.last_id, generator=generator)[: shape.draft_vocab].sort().values
            ids[-1] = shape.last_id
            head.d2t.copy_(ids - torch.arange(shape.draft_vocab))
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)
    return head.eval().requires_grad_(False)


class Uncached:
    """In place of a cache: the keys and values of this pass alone."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return key, value


def causal(head: EagleHead, embeddings: Tensor, features: Tensor, first: int = 0) -> Tensor:
    """Predicted features [batch, n, hidden] of whole texts at once.

    Args:
        embeddings, features: [batch, n, hidden].
        first: position of the first row.
    """
    count = embeddings.shape[1]
    x = head.fc(torch.cat([embeddings, features], dim=-1))
    mask = torch.full((count, count), torch.finfo(x.dtype).min).triu(1)[None, None]
    tables = head.rotary(x, torch.arange(first, first + count)[None])
    return head.layers[0](x, attention_mask=mask, position_embeddings=tables, past_key_values=Uncached())


def write_head(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, object], changes: dict[str, Any], binary: bool = False
) -> Path:
    """Write a checkpoint: ``pytorch_model.bin`` if ``binary``, else ``model.safetensors``.

    Args:
        changes: ``drop``, ``extra``: tensors left out and added; ``prefix``: of all names; ``binary``; the rest are
            keys of the config.json.
    """
    drop, extra, prefix = changes.pop("drop", ()), changes.pop("extra", {}), changes.pop("prefix", "")
    binary = changes.pop("binary", binary)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: tensor for name, tensor in (tensors | extra).items() if name not in drop}
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def published(
    folder: Path,
    shape: EagleShape,
    *,
    vocab_size: int = 320,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    std: float = 0.15,
    **changes: object,
) -> Path:
    """Write a head as its authors publish them: with a copy of the embedding table, and a target's config.json.

    Args:
        changes: as of :func:`write_head`.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in random_head(shape, seed, std).state_dict().items()}
    tensors["embed_tokens.weight"] = torch.randn(vocab_size, shape.hidden).to(dtype)
    rope = dict(shape.rope)
    written = {
        "architectures": ["Qwen2ForCausalLM" if shape.biases >= QWEN2_BIASES else "LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": rope.pop("rope_theta", 10_000.0),
        "rope_scaling": rope or None,
        "vocab_size": vocab_size,
    }
    return write_head(folder, tensors, written, changes)


def published3(folder: Path, name: str, *, layout: str = "", **changes: object) -> Path:
    """Write the EAGLE-3 head ``SHAPES3[name]`` in bfloat16 as it would be published.

    Args:
        layout: ``official``: ``midlayer`` in a pickle; ``speculators``: its nested configuration; else ``layers.0``.
            Empty: as ``name``.
        changes: as of :func:`write_head`; tensors have their published names.
    """
    shape, layout = SHAPES3[name], layout or name
    tensors = {
        key: tensor if key == "d2t" else tensor.bfloat16() for key, tensor in random_head(shape).state_dict().items()
    }
    if shape.mapped:
        tensors["t2d"] = torch.zeros(320, dtype=torch.bool)
        tensors["t2d"][tensors["d2t"] + torch.arange(shape.draft_vocab)] = True
    if layout == "official":
        tensors = {key.replace("layers.0.", "midlayer."): tensor for key, tensor in tensors.items()}
    rope = dict(shape.rope)
    layer = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": shape.max_positions,
        "vocab_size": 320,
    }
    own = {"draft_vocab_size": shape.draft_vocab, "norm_before_residual": shape.norm_before_residual}
    if shape.layers:
        own["target_layer_ids"] = list(shape.layers)
    if layout == "speculators":
        own |= {"speculators_model_type": "eagle3", "speculators_config": {"algorithm": "eagle3"}}
        own |= {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer}
    else:
        own = layer | own
    return write_head(folder, tensors, own, changes, binary=layout == "official")


def drafted_paths(
    engine: Engine, prompt: Sequence[int], iterations: int = 3
) -> Iterator[tuple[list[int], list[tuple[tuple[int, ...], Tensor]]]]:
    """For every tree, the text before it and its paths with their logits, shortest first; the text grows between.

    The draft's ``seen`` holds the logits of every path that it ran.
    """
    text, root, seen = list(prompt), begin(engine, prompt), engine.draft.seen
    for _ in range(iterations):
        seen.clear()
        grow(engine, root, 10)
        paths = sorted(seen.items(), key=lambda item: len(item[0]))
        assert len(paths[-1][0]) > 3
        yield text, paths
        judged = verified(engine)
        accepted, _, _ = judged.acceptance.read()
        text += engine.tree.tokens[accepted].tolist()
        engine._commit(judged, len(accepted))
        root = judged.acceptance.bonus
