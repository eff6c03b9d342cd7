"""Models that would not be decoded exactly are refused at every door: the command line's and the library's."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from subspec import build_engine, generate
from subspec.cli.compose import compose_config
from subspec.config.schema import to_config
from subspec.drafts.check_config import check_against_target
from subspec.errors import ConfigError
from subspec.targets.check_model import FAMILIES, check_model_config, shortest_window
from tests.helpers.drafts import hf_greedy
from tests.helpers.tiny import tiny_model

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None}
SIZES |= {"initializer_range": 0.3}
PROMPT = list(range(3, 15))


def command_line(model):
    """Checks a model's configuration as the command line does, for texts of 64 tokens."""
    cfg = compose_config(["draft=none", "decoding.max_length=64", "decoding.max_new_tokens=2"])
    check_against_target(to_config(cfg), model)


def built(family="llama", attn_implementation=None, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, **more}


def sliding(**more):
    return {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **more}


LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
REFUSED = {
    "a mistral window": ("mistral", {"sliding_window": 8}, "window of 8 .* {key} to 8"),
    "a qwen2 window": ("qwen2", sliding(), "window of 8 .* {key} to 8"),
    "a qwen3 window": ("qwen3", sliding(), "window of 8 .* {key} to 8"),
    "one layer's": ("qwen2", sliding(layer_types=["sliding_attention", "full_attention"]), "window of 8"),
    "a window that only the KV cache has": ("llama", {"sliding_window": 8}, "window of 8"),
    "few positions": ("llama", {"max_position_embeddings": 40}, "40 positions .* {key} to 40"),
    "dynamic": ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}, "dynamic rotary"),
    "longrope": ("qwen2", {"rope_parameters": rope("longrope", factor=2.0, **LONGROPE)}, "longrope rotary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_doors_refuse_it_and_name_their_own_key(case):
    family, changes, message = REFUSED[case]
    model = built(family, **changes)
    with pytest.raises(ConfigError, match=message.format(key=r"decoding\.max_length")):
        command_line(model.config)
    library = pytest.raises(ConfigError, match=message.format(key="(?<!decoding.)max_length"))
    for draft in ("none", "subspec"):
        with library as refused:
            build_engine(model, draft=draft, max_length=64)
        assert "\n" not in str(refused.value)
    with library:
        generate(model, PROMPT, max_length=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"rope_parameters": rope(kind)}, f"rope type {kind} is") for kind in ("su", "mrope", "dynamic_ntk")),
        ({"rope_parameters": {"full_attention": rope("default")}}, r"rope type .* is not supported"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized weights \(gptq\)"),
        ({"quantization_config": "gptq"}, r"quantized weights \(gptq\)"),
    ],
)
def test_settings_that_no_model_is_built_with_are_refused_too(change, message):
    model = tiny_model("llama")
    for key, value in change.items():
        setattr(model.config, key, value)
    for check in (lambda: command_line(model.config), lambda: build_engine(model)):
        with pytest.raises(ConfigError, match=message):
            check()


@pytest.mark.parametrize("config", [GPT2Config(), MixtralConfig()], ids=lambda config: config.model_type)
def test_other_families_are_refused(config):
    with pytest.raises(ConfigError, match=f"'{config.model_type}'.*{', '.join(FAMILIES)}"):
        command_line(config)


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 64}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", sliding(use_sliding_window=False)),
        ("qwen2", sliding(max_window_layers=9)),
        ("qwen3", sliding(sliding_window=64)),
        ("llama", {"rope_parameters": rope("linear", factor=2.0)}),
        ("llama", {"rope_parameters": rope("proportional", partial_rotary_factor=0.5)}),
        ("qwen2", {"rope_parameters": YARN}),
    ],
)
def test_what_both_doors_accept_is_the_models_own_text(family, changes):
    model = built(family, **changes)
    command_line(model.config)
    engine = build_engine(model, draft="layer_skip", max_length=64)
    assert engine.generate(PROMPT, max_new_tokens=24).token_ids == hf_greedy(model, PROMPT, 24)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(sliding_window=8), 8),
        # transformers reads no types here:
        (MistralConfig(num_hidden_layers=1, sliding_window=8, layer_types=["full_attention"]), 8),
        (MistralConfig(sliding_window=8, use_sliding_window=False), 8),
        (MistralConfig(sliding_window=None), None),
        (LlamaConfig(sliding_window=8), 8),  # generate's KV cache reads it
        (LlamaConfig(attention_chunk_size=8), 8),
        (Qwen2Config(sliding_window=8), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0), 8),
    ],
)
def test_the_window_is_the_one_that_transformers_reads(config, window):
    assert shortest_window(config) == window
    if window:
        with pytest.raises(ConfigError, match="length=9 exceeds"):
            check_model_config(config, name="it", max_length=9, key="length")
    check_model_config(config, name="it", max_length=8, key="length")


# ------------------------------------------------------------------------------------------- loaded models


def with_layer(change):
    model = built()
    change(model.model.layers[1])
    return model


class Wrapped(torch.nn.Module):
    """As an adapter library wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def merge_and_unload(self):
        return self.model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "ORG/NAME", "model is a str.*from_pretrained"),
        (lambda: None, "model is a NoneType"),
        (lambda: torch.nn.Linear(3, 3), "model is a Linear"),
        (lambda: Wrapped(tiny_model()), r"model is a Wrapped.*merge_and_unload\(\)"),
        (lambda: torch.compile(tiny_model()), "model is a OptimizedModule"),
        (lambda: LlamaForCausalLM, "model is a type"),
        (lambda: built("gpt2"), "'gpt2'"),
        (lambda: LlamaModel(LlamaConfig(**SIZES)).eval(), "model is a LlamaModel.*LM head"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval(), "LlamaForSequenceClassification"),
        (lambda: built().train(), r"training mode: call model\.eval\(\)"),
        (lambda: with_layer(lambda layer: layer.train()), "training mode"),
        (lambda: built(attn_implementation="flex_attention"), "flex_attention.*sdpa"),
        (lambda: built().to("meta"), "meta.*one device"),
        (lambda: with_layer(lambda layer: layer.mlp.to(torch.float64)), "float32, float64"),
        (lambda: with_layer(lambda layer: layer.mlp.to(torch.float8_e4m3fn)), "float8"),
    ],
)
def test_what_is_no_model_to_decode_is_refused_in_one_line(make, message):
    model = make()
    with pytest.raises(ConfigError, match=message) as refused:
        build_engine(model, draft="none", max_length=64)
    assert "\n" not in str(refused.value)
    assert "model" in str(refused.value)


def test_eager_attention_and_half_precision_are_fine():
    model = built(attn_implementation="eager").to(torch.bfloat16)
    build_engine(model, draft="none", max_length=64).generate(PROMPT, max_new_tokens=3)
