"""Models that captured levels do not support are refused by the one check that plans and runs share."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from subspec.config.schema import Dtype, HqqConfig, OffloadConfig
from subspec.drafts.check_config import check_against_target
from subspec.errors import ConfigError
from subspec.levels.quantization import level_quantization
from subspec.targets.meta_model import parameter_shapes
from tests.helpers.planning import settings

SHAPE = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 80}, "target planted has heads of 80 numbers"),
        ({"head_dim": 8}, "target planted has heads of 8 numbers"),
        ({"attention_bias": True}, r"target planted has a bias in self_attn\.o_proj"),
        ({"mlp_bias": True}, r"target planted has a bias in mlp\."),
        ({"hidden_act": "gelu"}, "target planted has the activation gelu"),
        ({"rope_parameters": HALF_ROPE}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("draft", ["subspec", "layer_skip"])
def test_a_target_whose_layers_cannot_be_captured(changes, words, draft):
    model = LlamaConfig(num_hidden_layers=2, **(SHAPE | changes))
    config = settings(draft=draft, quant={"group_size": 32})
    with pytest.raises(ConfigError, match=words):
        check_against_target(config, model)
    check_against_target(replace(config, offload=OffloadConfig(name="none")), model)
    check_against_target(settings(draft="none"), model)


@pytest.mark.parametrize("draft", ["subspec", "layer_skip", "small_model"])
def test_captured_levels_are_for_bfloat16(draft):
    config = settings(draft=draft)
    config = replace(config, target=replace(config.target, dtype=Dtype.float32))
    with pytest.raises(ConfigError, match=r"in float32.*target\.dtype"):
        check_against_target(config, LlamaConfig(**SHAPE | {"vocab_size": 151_936}))


def test_a_substitute_that_only_restores_layers_has_no_bias_either():
    shapes, _ = parameter_shapes(LlamaConfig(**SHAPE, mlp_bias=True))
    with pytest.raises(ConfigError, match=r"bias in mlp\."):
        level_quantization(HqqConfig(name="hqq"), shapes, (320, 128))
