"""A CPU's draft level against the same quantized weights as modules: same logits, same cache rows."""

import pytest
import torch

from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.kernels.cpu import cpu_kernels
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.cpu_levels import CpuLevels, why_modules
from subspec.levels.dense import layer_views
from subspec.quant.cpu_linear import CpuFormat, CpuHeadFormat
from subspec.quant.hqq import hqq_quantizer
from subspec.quant.level_linear import Variant
from tests.helpers.drafts import begin
from tests.helpers.tiny import FAMILIES, tiny_model

compiled = pytest.mark.skipif(isinstance(cpu_kernels(), str), reason="no CPU kernels here")

PROMPT = [5, 17, 33, 99, 4, 8, 77, 12, 300]


def level_draft(model, kernel):
    builder = SubstituteBuilder(
        model.config,
        hqq_quantizer(format_class=CpuFormat),
        formats=dict.fromkeys(ROLES, CpuFormat()),
        kernel=dict.fromkeys(ROLES, Variant(kernel)),
        keep_exact=frozenset({"o_proj"}),
        dtype=torch.float32,
    )
    layers = [builder.build_layer(layer_views(layer), torch.device("cpu")) for layer in model.model.layers]
    head = CpuHeadFormat().linear(Variant("float32"), model.lm_head.weight.data, swiglu=False)
    return SubstituteDraft(CpuLevels(model, level_model(model, layers, head)))


def module_draft(model):
    substitute = share_parameters(model)
    for layer in substitute.model.layers:
        for name, module in list(layer.named_modules()):
            if name.endswith("_proj") and not name.endswith("o_proj"):
                weight = hqq_quantizer(format_class=CpuFormat).quantize(module.weight.data).dequantize()
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return SubstituteDraft(substitute)


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
    policy, drafts = Beam(3, 3), [module_draft(model), level_draft(model, kernel)]
    assert drafts[1].model.own == (kernel == "own_cpu")
    reference, *_ = engines = [
        Engine(TargetModel(model), draft, policy, max_length=64, prefill_chunk=16) for draft in drafts
    ]
    with torch.inference_mode():
        frontiers = [engine.tree.plant(begin(engine, PROMPT)) for engine in engines]
        for _ in range(policy.max_depth):
            logits = [e.draft.expand(e.tree, f) for e, f in zip(engines, frontiers, strict=True)]
            assert (logits[1] - logits[0]).norm() / logits[0].norm() < tolerance
            # The reference's tree for both, so that a near-tie does not end the comparison.
            frontiers = [policy.grow(e.tree, f, logits[0], 0.2) for e, f in zip(engines, frontiers, strict=True)]
    rows = [engine.cache.rows[:, :, :, : reference.cache.draft_rows] for engine in engines]
    assert rows[0].any()
    assert (rows[1] - rows[0]).norm() / rows[0].norm() < tolerance


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
