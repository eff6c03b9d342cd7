"""Block heads with random weights, as modules and as folders in the published formats."""

from pathlib import Path

from subspec.drafts.block_head import BlockShape
from tests.helpers.eagle import random_head, write_head

_SIZES = {
    "rope": {"rope_type": "default", "rope_theta": 1e6},
    "fc_inputs": 3 * 64,
    "qk_norm": True,
    "layers": (1, 4, 6),
    "target_layers": 8,
    "mask_id": 319,
}
BLOCKS = {
    "dflash": BlockShape(64, 4, 2, 24, 96, **_SIZES, decoder_layers=3, block=6),
    "jetspec": BlockShape(64, 4, 4, 16, 64, **_SIZES, decoder_layers=2, block=6, causal=True),
    "dspark": BlockShape(
        64, 8, 2, 8, 96, **_SIZES, decoder_layers=2, block=5, shifted=True, draft_vocab=320, embeddings=320,
        markov=(320, 12), confidence=64 + 12,
    ),
    # The target's tables, a confidence head that reads hidden states alone, and biases.
    "bare dspark": BlockShape(
        64, 4, 2, 16, 64, frozenset(f"layers.0.self_attn.{name}_proj.bias" for name in "qkv"), **_SIZES,
        decoder_layers=2, block=4, shifted=True, markov=(320, 8), confidence=64,
    ),
}  # fmt: skip
"""Heads for targets of hidden size 64, eight layers and 320 tokens."""


def published_block(folder: Path, name: str, **changes: object) -> Path:
    """Write ``BLOCKS[name]`` in bfloat16 as its authors publish such heads.

    Args:
        changes: as of :func:`~tests.helpers.eagle.write_head`; keys of ``dflash_config`` too.
    """
    shape = BLOCKS[name]
    tensors = {key: tensor.bfloat16() for key, tensor in random_head(shape, std=0.1).state_dict().items()}
    own = {"target_layer_ids": list(shape.layers), "mask_token_id": shape.mask_id}
    if shape.shifted:
        own |= {"markov_rank": shape.markov[1], "markov_head_type": "vanilla", "num_anchors": 512}
        own |= {"enable_confidence_head": True, "confidence_head_with_markov": shape.confidence > 64}
    else:
        own = {"dflash_config": own | ({"causal_head": True} if shape.causal else {})}
    written = {
        "architectures": ["Qwen3DSparkModel" if shape.shifted else "DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": bool(shape.biases),
        "block_size": shape.block,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "layer_types": ["full_attention"] * shape.decoder_layers,
        "max_position_embeddings": 40960,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.decoder_layers,
        "num_key_value_heads": shape.kv_heads,
        "num_target_layers": shape.target_layers,
        "rms_norm_eps": shape.eps,
        "rope_scaling": None,
        "rope_theta": shape.rope["rope_theta"],
        "tie_word_embeddings": False,
        "vocab_size": 320,
        **own,
    }
    if not shape.shifted:
        written["dflash_config"] |= changes.pop("dflash_config", {})
    return write_head(folder, tensors, written, changes)
