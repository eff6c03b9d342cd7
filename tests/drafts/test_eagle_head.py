import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from subspec.decoding.kv_cache import KVCache
from subspec.drafts.eagle_head import EagleHead, EagleShape
from subspec.errors import ConfigError
from tests.helpers.eagle import LLAMA3_ROPE, QWEN2_BIASES, SHAPES, causal, random_head


def inputs(shape, batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, count, shape.hidden, generator=generator)


@pytest.mark.parametrize("name", SHAPES)
def test_the_layer_is_a_llama_layer_without_input_norm(name):
    """The independent reference: transformers' own layer, with the same tensors and its input norm taken out."""
    shape = SHAPES[name]
    head = random_head(shape)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.eps,
        max_position_embeddings=shape.max_positions,
        rope_parameters=dict(shape.rope),
        attention_bias=True,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0)
    layer.input_layernorm = torch.nn.Identity()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            ours = dict(head.layers[0].named_parameters())
            parameter.copy_(ours[key] if key in ours else torch.zeros_like(parameter))
    embeddings, features = inputs(shape, 2, 11)
    positions = torch.arange(3, 14)[None].expand(2, -1)
    x = head.fc(torch.cat([embeddings, features], dim=-1))
    mask = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)[None, None]
    tables = LlamaRotaryEmbedding(config=config)(x, positions)
    expected = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=tables)
    torch.testing.assert_close(causal(head, embeddings, features, first=3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_a_cache_in_pieces_gives_what_one_causal_pass_gives(name):
    shape = SHAPES[name]
    head = random_head(shape)
    embeddings, features = inputs(shape, 1, 12)
    cache = KVCache(
        layers=1,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_length=16,
        draft_rows=0,
        target_rows=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pieces = []
    with torch.no_grad():
        for start, end in ((0, 1), (1, 6), (6, 12)):
            visible = torch.ones(end - start, end, dtype=torch.bool).tril(start)
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
            view = cache.target_view(end - start)
            pieces.append(head(embeddings[0, start:end], features[0, start:end], torch.arange(start, end), mask, view))
            cache.extend(end - start)
        expected = causal(head, embeddings, features)[0]
    torch.testing.assert_close(torch.cat(pieces), expected, rtol=1e-4, atol=1e-5)


def test_training_reaches_every_parameter():
    shape = SHAPES["wide heads"]
    head = EagleHead(shape)
    causal(head, *inputs(shape, 2, 5)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in head.named_parameters() if "k_proj.bias" not in name)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_read_back_from_the_weights(name):
    shape = SHAPES[name]
    head = random_head(shape)
    again = EagleHead.from_tensors(head.state_dict(), shape.config())
    assert again.shape.shapes() == shape.shapes()
    assert (again.shape.kv_heads, again.shape.head_dim) == (shape.kv_heads, shape.head_dim)
    assert {name: tensor.shape for name, tensor in head.state_dict().items()} == shape.shapes()
    pair = inputs(shape, 1, 7)
    assert torch.equal(causal(again, *pair), causal(head, *pair))


def test_full_size_shapes_of_published_heads_are_read_from_the_weights_not_the_configuration():
    """Qwen2-7B's head: 28 KV heads in the weights, 4 in the config.json, which is a copy of the target's."""
    shape = EagleShape(3584, 28, 28, 128, 18944, QWEN2_BIASES)
    with torch.device("meta"):
        tensors = EagleHead(shape).state_dict()
    assert tensors["layers.0.self_attn.k_proj.weight"].shape == (3584, 3584)
    config = {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    read = EagleHead.from_tensors(tensors, config).shape
    assert (read.kv_heads, read.head_dim, read.intermediate) == (28, 128, 18944)
    assert read.biases == shape.biases
    assert read.rope == {"rope_type": "default", "rope_theta": 1e6}
    llama = EagleShape(4096, 32, 8, 128, 14336, frozenset({"fc.bias"}))
    with torch.device("meta"):
        tensors = EagleHead(llama).state_dict()
    read = EagleHead.from_tensors(tensors, {"num_attention_heads": 32, "rope_scaling": LLAMA3_ROPE}).shape
    assert (read.kv_heads, read.rope) == (8, LLAMA3_ROPE)


def test_frequencies_stay_float32_when_the_head_does_not():
    head = random_head(SHAPES["llama3"])
    before = head.rotary.inv_freq.clone()
    head.to(torch.bfloat16)
    assert torch.equal(head.rotary.inv_freq, before)
    assert head.fc.weight.dtype == torch.bfloat16
    assert causal(head, *inputs(SHAPES["llama3"], 1, 4).bfloat16()).dtype == torch.bfloat16


def test_initial_weights_follow_the_seed_alone():
    shape = SHAPES["qwen2"]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    same, other = EagleHead(shape, 3).state_dict(), EagleHead(shape, 4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    for name, tensor in EagleHead(shape, 3).state_dict().items():
        assert torch.equal(tensor, same[name])
    assert not torch.equal(same["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "num_attention_heads=None"),
        ({"num_attention_heads": 3}, "which 3 heads"),
        ({"num_attention_heads": 4, "hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"num_attention_heads": 4, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic rotary"),
    ],
)
def test_configurations_that_do_not_fit_the_weights_are_refused(config, message):
    tensors = EagleHead(SHAPES["qwen2"]).state_dict()
    with pytest.raises(ConfigError, match=message):
        EagleHead.from_tensors(tensors, config)


def test_a_tensor_of_the_wrong_shape_is_named():
    tensors = dict(EagleHead(SHAPES["qwen2"]).state_dict())
    tensors["layers.0.mlp.up_proj.weight"] = torch.zeros(127, 64)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight as \[127, 64\] where \[128, 64\]"):
        EagleHead.from_tensors(tensors, SHAPES["qwen2"].config())
