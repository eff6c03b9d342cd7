"""``quant=higgs`` in the fused level: the same logits as module by module, sizes as planned, codes kept on disk."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.schema import HiggsConfig, HqqConfig
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.levels.build import ROLES, SubstituteBuilder, level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention
from subspec.levels.quantization import level_quantization
from subspec.quant.codebook_linear import HiggsFormat, higgs_quantizer
from subspec.quant.level_linear import Variant
from subspec.quant.weight_format import TILES
from tests.helpers.drafts import begin
from tests.helpers.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99, 4, 8, 77, 12, 300]


def model_of(family, device):
    shape = {"hidden_size": 128, "layers": 1, "heads": 4, "kv_heads": 2, "intermediate_size": 192}
    return tiny_model(family, **shape).to(device, torch.bfloat16)


def fused_draft(model, device, kernel, bits=4):
    options = {"kernel": kernel, "keep_exact": frozenset(), "formats": dict.fromkeys(ROLES, HiggsFormat(bits))}
    builder = SubstituteBuilder(model.config, higgs_quantizer(bits), **options)
    layers = [builder.build_layer(dict(layer.named_parameters()), device) for layer in model.model.layers]
    return CapturedDraft(level_model(model, layers), attention=Attention(splits=4)), builder


def module_draft(model, bits=4):
    """The same quantized weights, rotated back, as plain modules."""
    substitute = share_parameters(model)
    for layer in substitute.model.layers:
        for name, module in layer.named_modules():
            if name.endswith("_proj"):
                weight = higgs_quantizer(bits).quantize(module.weight.data).dequantize()
                module.weight = torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return SubstituteDraft(substitute)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "kernel", "bits"), [("qwen2", "lut_mma", 4), ("llama", "lut_mma", 3), ("qwen3", "lut_mma", 2)]
)
def test_two_levels_are_the_module_by_module_substitutes(family, kernel, bits, device):
    device = torch.device(device)
    model = model_of(family, device)
    logits = []
    draft, builder = fused_draft(model, device, kernel, bits)
    with torch.inference_mode():
        tree = None
        for other in (module_draft(model, bits), draft):
            engine = Engine(TargetModel(model), other, Beam(2, 3), max_length=64, prefill_chunk=16)
            frontier = engine.tree.plant(begin(engine, PROMPT))
            first = engine.draft.expand(engine.tree, frontier).float().clone()
            if tree is None:
                frontier = engine.policy.grow(engine.tree, frontier, first, 0.2)
                tree = engine.tree
            else:  # the reference's nodes, so that a near-tie does not end the comparison
                frontier = engine.tree.append(tree.tokens[1:4], tree.parents[1:4], tree.scores[1:4])
            logits.append(torch.cat([first, engine.draft.expand(engine.tree, frontier).float()]))
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.08  # bfloat16 in another order
    assert builder.bits["qkv"] == pytest.approx(bits + 16 / 128, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(128, 512), (64, 576), (96, 100)])
def test_codes_come_back_from_their_tensors(bits, shape):
    format_, cpu = HiggsFormat(bits), torch.device("cpu")
    codes = format_.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    stored = codes.tensors()
    assert sum(t.numel() * t.element_size() for t in stored.values()) == format_.stored_bytes(*shape)
    again = format_.restore(stored, shape, cpu)
    assert torch.equal(again.dequantize(), codes.dequantize())
    assert format_.restore(stored, (shape[0] + 1, shape[1]), cpu) is None
    assert format_.restore({"pairs": stored["pairs"]}, shape, cpu) is None


def test_facts_tell_settings_apart():
    settings = [(4, 2, 256, 512), (3, 2, 256, 512), (4, 1, 256, 512), (4, 2, 64, 512), (4, 2, 256, 64)]
    assert len({str(sorted(higgs_quantizer(*own).facts.items())) for own in settings}) == len(settings)


@pytest.mark.parametrize("role", [*ROLES, "head"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_variant_takes_the_bytes_the_planner_counts(role, bits):
    format_, n, k = HiggsFormat(bits), 128, 576
    swiglu = role == "gate_up"
    assert str(bits) in format_.key
    for kernel in format_.kernels:
        for variant in format_.variants(kernel, role, n, k):
            linear = format_.random_linear(variant, n, k, torch.device("cpu"), swiglu=swiglu)
            assert linear.nbytes == format_.device_bytes(n, k)
    assert format_.reference(role) == Variant("lut_mma", TILES[role])


def quantization(quant, kernel="auto"):
    layer = model_of("llama", "cpu").model.layers[0]
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    return level_quantization(quant, shapes, (320, 128), kernel=kernel)


def test_the_planner_is_told_what_is_quantized():
    found = quantization(HiggsConfig(name="higgs", bits=3, modules=["mlp"]))
    assert set(found.shapes) == {"gate_up", "down"}
    assert set(found.exact) == {"qkv", "out"}
    weights = 3 * 128 * 192
    # Groups of 128 for gate and up, of 192 for down.
    assert found.layer_bytes == weights * 3 // 8 + 2 * (2 * 192) + 2 * 128
    assert found.stored_bytes(2) == 2 * found.layer_bytes
    assert "mlp 3 bit" in found.summary()
    assert "HIGGS" in found.summary()


def test_kernels_of_other_formats_are_refused():
    with pytest.raises(ConfigError, match=r"draft\.kernel=gemlite cannot compute qkv: .* no look-up tables"):
        quantization(HiggsConfig(name="higgs"), "gemlite")
    with pytest.raises(ConfigError, match=r"draft\.kernel=lut_mma cannot compute qkv"):
        quantization(HqqConfig(name="hqq"), "lut_mma")
