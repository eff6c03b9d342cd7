import pytest
import torch

from subspec.config.quant_checks import bits_by_linear
from subspec.config.schema import BitsByModule
from subspec.drafts.substitute import share_parameters
from subspec.errors import ConfigError
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import quantize_model
from tests.helpers.tiny import tiny_model

LAYER = ["attention", "mlp"]
OPTIONS = {"compute_dtype": torch.float32, "device": torch.device("cpu"), "unpack": False}


def test_a_linears_bits_are_its_own_then_its_classs_then_everybodys():
    bits = bits_by_linear(4, BitsByModule(mlp=3, down_proj=8), LAYER)
    assert bits == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 3, "up_proj": 3, "down_proj": 8}


def test_only_what_is_quantized_has_bits():
    assert bits_by_linear(2, BitsByModule(), ["lm_head", "q_proj"]) == {"q_proj": 2, "lm_head": 2}
    assert bits_by_linear(2, BitsByModule(lm_head=8), ["lm_head"]) == {"lm_head": 8}
    assert bits_by_linear(2, BitsByModule(attention=8), ["q_proj"]) == {"q_proj": 8}


@pytest.mark.parametrize(
    ("bits", "by", "modules", "message"),
    [
        (4, BitsByModule(mlp=5), LAYER, r"quant\.bits_by\.mlp=5: use 8, 4, 3, 2 bits"),
        (6, BitsByModule(), LAYER, r"quant\.bits=6: use 8, 4, 3, 2 bits"),
        (4, BitsByModule(lm_head=8), LAYER, r"quant\.bits_by\.lm_head=8, but lm_head stays exact: add it"),
        (4, BitsByModule(attention=8), ["mlp"], r"quant\.bits_by\.attention=8, but attention stays exact"),
        (4, BitsByModule(k_proj=8), ["q_proj"], r"quant\.bits_by\.k_proj=8, but k_proj stays exact"),
        (4, BitsByModule(), ["head"], r"quant\.modules: unknown module 'head'; use attention, mlp, lm_head, down_proj"),
        (4, BitsByModule(), [], r"quant\.modules is empty"),
    ],
)  # fmt: skip
def test_bits_that_nothing_has_are_refused(bits, by, modules, message):
    with pytest.raises(ConfigError, match=message):
        bits_by_linear(bits, by, modules)


def test_modules_and_layers_are_chosen_by_name():
    model = tiny_model("qwen3", layers=3)
    substitute = share_parameters(model)
    report = quantize_model(
        substitute, HqqQuantizer(group_size=32, **OPTIONS), modules=["mlp", "q_proj"], skip_layers=[1]
    )
    kinds = {name: type(m).__name__ for name, m in substitute.named_modules() if name.endswith("_proj")}
    for name, kind in kinds.items():
        expected = "HQQLinear" if ("mlp" in name or "q_proj" in name) and ".1." not in name else "Linear"
        assert kind == expected, name
    assert report.modules == 8
    assert len(report.kept_exact) == 13
    assert 4 < report.bits_per_weight < 7


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"quant\.skip_layers: no layer 7 in a target with layers 0\.\.1"):
        quantize_model(share_parameters(tiny_model()), HqqQuantizer(**OPTIONS), modules=["mlp"], skip_layers=[7])
