"""Models that would not be decoded exactly are refused at every door: the command line's and the library's."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from subspec import build_engine, generate
from subspec.config.schema import register_schemas, to_config
from subspec.drafts.check_config import check_against_target
from subspec.errors import ConfigError
from subspec.targets.check_model import FAMILIES, check_model_config, shortest_window
from subspec.utils.paths import conf_dir
from tests.helpers.cli import cli, tiny_run
from tests.helpers.drafts import hf_greedy
from tests.helpers.tiny import edit_config, tiny_checkpoint, tiny_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
PROMPT = list(range(3, 15))


@pytest.fixture(scope="module")
def command_line():
    """Checks a model's configuration as the command line does, for texts of ``max_length`` tokens."""
    register_schemas()

    def check(model, max_length):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(
                "config",
                ["draft=none", f"decoding.max_length={max_length}", "decoding.max_new_tokens=2", "run_dir=x"],
            )
        check_against_target(to_config(cfg), model)

    return check


def built(config_class, model_class, **changes):
    torch.manual_seed(0)
    return model_class(config_class(**SIZES | changes)).eval()


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, **more}


def sliding(**more):
    return {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **more}


REFUSED = {
    "a mistral window": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": 8},
        "window of 8 .* {key} to 8",
    ),
    "a qwen2 window": (Qwen2Config, Qwen2ForCausalLM, sliding(), "window of 8 .* {key} to 8"),
    "a qwen3 window": (Qwen3Config, Qwen3ForCausalLM, sliding(), "window of 8 .* {key} to 8"),
    "one layer's window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        sliding(layer_types=["sliding_attention", "full_attention"]),
        "window of 8",
    ),
    "a window that only the KV cache has": (
        LlamaConfig,
        LlamaForCausalLM,
        {"sliding_window": 8},
        "window of 8",
    ),
    "few positions": (
        LlamaConfig,
        LlamaForCausalLM,
        {"max_position_embeddings": 40},
        "40 positions .* {key} to 40",
    ),
    "dynamic": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": rope("dynamic", factor=2.0)},
        "dynamic rotary",
    ),
    "longrope": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "rope_parameters": rope(
                "longrope",
                factor=2.0,
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                original_max_position_embeddings=32,
            )
        },
        "longrope rotary",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_doors_refuse_it_and_name_their_own_key(case, command_line):
    config_class, model_class, changes, message = REFUSED[case]
    model = built(config_class, model_class, **changes)
    with pytest.raises(ConfigError, match=message.format(key=r"decoding\.max_length")):
        command_line(model.config, 64)
    for draft in ("none", "subspec"):
        with pytest.raises(ConfigError, match=message.format(key="(?<!decoding.)max_length")) as refused:
            build_engine(model, draft=draft, max_length=64)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=message.format(key="(?<!decoding.)max_length")):
        generate(model, PROMPT, max_length=64)


@pytest.mark.parametrize("kind", ["su", "mrope", "ntk", "dynamic_ntk"])
def test_a_kind_of_rope_that_is_not_known_is_refused(kind, command_line):
    model = tiny_model("llama")
    model.config = copy.deepcopy(model.config)
    model.config.rope_parameters = rope(kind)
    for check in (lambda: command_line(model.config, 64), lambda: build_engine(model)):
        with pytest.raises(ConfigError, match=f"rope type {kind} is not supported"):
            check()


def test_rope_settings_by_kind_of_layer_are_refused(command_line):
    config = copy.deepcopy(tiny_model("llama").config)
    config.rope_parameters = {"full_attention": rope("default")}
    with pytest.raises(ConfigError, match=r"rope type .* is not supported"):
        command_line(config, 64)


def test_layers_of_another_kind_are_refused(command_line):
    config = copy.deepcopy(tiny_model("qwen2").config)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        command_line(config, 64)


def test_quantized_weights_are_refused(command_line):
    model = tiny_model("llama")
    model.config = copy.deepcopy(model.config)
    for settings in ({"quant_method": "gptq", "bits": 4}, "gptq"):
        model.config.quantization_config = settings
        for check in (lambda: command_line(model.config, 64), lambda: build_engine(model)):
            with pytest.raises(ConfigError, match=r"quantized weights \(gptq\)"):
                check()


@pytest.mark.parametrize("config", [GPT2Config(), MixtralConfig()], ids=lambda config: config.model_type)
def test_other_families_are_refused(config, command_line):
    with pytest.raises(ConfigError, match=f"'{config.model_type}'.*{', '.join(FAMILIES)}"):
        command_line(config, 64)


@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [
        (MistralConfig, MistralForCausalLM, {"sliding_window": 64}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        (Qwen2Config, Qwen2ForCausalLM, sliding(use_sliding_window=False)),
        (Qwen2Config, Qwen2ForCausalLM, sliding(max_window_layers=9)),
        (Qwen3Config, Qwen3ForCausalLM, sliding(sliding_window=64)),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": rope("linear", factor=2.0)}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": rope("proportional", partial_rotary_factor=0.5)}),
        (
            Qwen2Config,
            Qwen2ForCausalLM,
            {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=32)},
        ),
    ],
)
def test_what_both_doors_accept_is_the_models_own_text(config_class, model_class, changes, command_line):
    model = built(config_class, model_class, **changes)
    command_line(model.config, 64)
    engine = build_engine(model, draft="layer_skip", max_length=64)
    assert engine.generate(PROMPT, max_new_tokens=24).token_ids == hf_greedy(model, PROMPT, 24)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(sliding_window=8), 8),
        (
            MistralConfig(num_hidden_layers=1, sliding_window=8, layer_types=["full_attention"]),
            8,
        ),  # transformers reads no types here
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


def test_quantization_by_name_alone_is_refused_in_one_line(tmp_path):
    folder = tiny_checkpoint(tmp_path / "t")
    edit_config(folder, quantization_config="fp8")
    cli(*tiny_run(folder, tmp_path / "run"), "draft=none").refused(2, r"quantized weights \(fp8\)")


# ------------------------------------------------------------------------------------------- loaded models


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
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).eval(), "'gpt2'"),
        (lambda: LlamaModel(LlamaConfig(**SIZES)).eval(), "model is a LlamaModel.*LM head"),
        (
            lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval(),
            "LlamaForSequenceClassification",
        ),
        (lambda: built(LlamaConfig, LlamaForCausalLM).train(), r"training mode: call model\.eval\(\)"),
        (lambda: part_in_training(), "training mode"),
        (
            lambda: built(LlamaConfig, LlamaForCausalLM, attn_implementation="flex_attention"),
            "flex_attention.*sdpa",
        ),
        (lambda: built(LlamaConfig, LlamaForCausalLM).to("meta"), "meta.*one device"),
        (lambda: mixed(torch.float64), "float32, float64"),
        (lambda: mixed(torch.float8_e4m3fn), "float8"),
    ],
)
def test_what_is_no_model_to_decode_is_refused_in_one_line(make, message):
    model = make()
    with pytest.raises(ConfigError, match=message) as refused:
        build_engine(model, draft="none", max_length=64)
    assert "\n" not in str(refused.value)
    assert "model" in str(refused.value)


def part_in_training():
    model = built(LlamaConfig, LlamaForCausalLM)
    model.model.layers[1].train()
    return model


def mixed(dtype):
    model = built(LlamaConfig, LlamaForCausalLM)
    model.model.layers[1].mlp.to(dtype)
    return model


def test_eager_attention_and_half_precision_are_fine():
    model = built(LlamaConfig, LlamaForCausalLM, attn_implementation="eager").to(torch.bfloat16)
    build_engine(model, draft="none", max_length=64).generate(PROMPT, max_new_tokens=3)
