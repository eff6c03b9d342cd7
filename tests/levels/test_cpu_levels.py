"""A CPU's draft level against the same quantized weights as modules: same logits, same cache rows."""

import pytest
import torch

from subspec.config.quant_checks import linear_names
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft
from subspec.kernels.cpu import cpu_kernels
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.cpu_levels import CpuLevels, why_modules
from subspec.levels.dense import layer_views
from subspec.quant.cpu_linear import CpuFormat, CpuHeadFormat
from subspec.quant.hqq import hqq_quantizer
from subspec.quant.level_linear import Variant
from tests.helpers.levels import apart, grown_alike, module_draft
from tests.helpers.tiny import FAMILIES, tiny_model

compiled = pytest.mark.skipif(isinstance(cpu_kernels(), str), reason="no CPU kernels here")


def level_draft(model, kernel):
    builder = SubstituteBuilder(
        hqq_quantizer(format_class=CpuFormat),
        formats=dict.fromkeys(ROLES, CpuFormat()),
        kernel=dict.fromkeys(ROLES, Variant(kernel)),
        keep_exact=frozenset({"o_proj"}),
        dtype=torch.float32,
    )
    layers = [builder.build_layer(layer_views(layer), torch.device("cpu")) for layer in model.model.layers]
    head = CpuHeadFormat().linear(Variant("float32"), model.lm_head.weight.data, swiglu=False)
    return SubstituteDraft(CpuLevels(model, level_model(model, layers, head)))


@pytest.mark.parametrize(
    ("family", "kernel", "tolerance"),
    [
        *((family, "float32", 1e-4) for family in FAMILIES),
        *(pytest.param(family, "own_cpu", 0.1, marks=compiled) for family in FAMILIES),
        ("qwen3", "int4_cpu", 0.1),
        ("qwen2", "int8_cpu", 0.1),
    ],
)
def test_a_tree_is_the_module_by_module_substitutes(family, kernel, tolerance):
    model = tiny_model(family, hidden_size=128, layers=2, kv_heads=2, heads=4, intermediate_size=192)
    own, names = level_draft(model, kernel), {*linear_names(["attention", "mlp"])} - {"o_proj"}
    assert own.model.own == (kernel == "own_cpu")
    plain = module_draft(model, quantizer=hqq_quantizer(format_class=CpuFormat), names=names)
    engines, logits = grown_alike(model, [plain, own], Beam(3, 3))
    for expected, got in zip(*logits, strict=True):
        assert apart(expected, got) < tolerance
    rows = [engine.cache.rows[:, :, :, : engine.cache.draft_rows] for engine in engines]
    assert rows[0].any()
    assert apart(*rows) < tolerance


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"intermediate_size": 72}, "72"),
        ({"attention_bias": True}, "bias"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
    ],
)
def test_models_that_run_as_modules_are_told_apart(changes, why):
    config = tiny_model("llama").config
    for name, value in changes.items():
        setattr(config, name, value)
    found = why_modules(config)
    assert found is None if why is None else why in found
