import pytest

from subspec.config.schema import BitsByModule
from subspec.errors import ConfigError
from subspec.quant.module_bits import bits_by_linear

LAYER = ["attention", "mlp"]


def test_a_linears_bits_are_its_own_then_its_classs_then_everybodys():
    bits = bits_by_linear(4, BitsByModule(mlp=3, down_proj=8), LAYER)
    assert bits == {
        "q_proj": 4,
        "k_proj": 4,
        "v_proj": 4,
        "o_proj": 4,
        "gate_proj": 3,
        "up_proj": 3,
        "down_proj": 8,
    }


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
    ],
)  # fmt: skip
def test_bits_that_nothing_has_are_refused(bits, by, modules, message):
    with pytest.raises(ConfigError, match=message):
        bits_by_linear(bits, by, modules)
