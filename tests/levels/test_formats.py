"""The fused level in every format of its weights: the same logits as the dequantized weights module by module."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.schema import BitsByModule, HiggsConfig, HqqConfig
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.errors import ConfigError
from subspec.levels.build import ROLES
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.codebook_linear import HiggsFormat, higgs_quantizer
from subspec.quant.level_linear import Variant
from subspec.quant.weight_format import TILES
from tests.helpers.drafts import begin, grow
from tests.helpers.levels import (
    DEVICES,
    PROMPT,
    apart,
    fused_draft,
    grown_alike,
    model_of,
    module_draft,
    quantization_of,
)

WITH_HEAD = ["attention", "mlp", "lm_head"]
MIXED = HqqConfig(name="hqq", bits_by=BitsByModule(mlp=3, lm_head=8), modules=WITH_HEAD)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("quant", "family"),
    [
        (HqqConfig(name="hqq", bits=8), "qwen2"),
        (HqqConfig(name="hqq", bits=3), "qwen2"),
        (HqqConfig(name="hqq", bits=2, group_size=64), "qwen2"),
        (MIXED, "qwen2"),
        (HqqConfig(name="hqq", bits_by=BitsByModule(lm_head=4), modules=["lm_head"]), "qwen2"),
        (HiggsConfig(name="higgs", bits=4), "qwen2"),
        (HiggsConfig(name="higgs", bits=3), "llama"),
        (HiggsConfig(name="higgs", bits=2), "qwen3"),
    ],
    ids=["8 bit", "3 bit in 4", "2 bit", "mixed with a head", "head alone", "higgs 4", "higgs 3", "higgs 2"],
)  # fmt: skip
def test_the_level_is_the_dequantized_weights(quant, family, device):
    device = torch.device(device)
    model = model_of(family, device, layers=1)
    exact = SubstituteDraft(share_parameters(model))
    drafts = [module_draft(model, quant), fused_draft(model, device, quant), exact]
    expected, got, plain = (torch.cat(levels) for levels in grown_alike(model, drafts, Beam(2, 3))[1])
    assert apart(expected, got) < 0.08  # bfloat16 in another order
    if quant.bits < 8:  # 8 bits differ from the exact weights no more than bfloat16 does
        assert (got - plain).norm() > 1.5 * (got - expected).norm()
    if isinstance(quant, HiggsConfig):  # 16 bits of scale for each group of 128
        assert 8 * drafts[1].model.layers[0].qkv.nbytes == 256 * 128 * (quant.bits + 16 / 128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_quantized_head_grows_the_tree_inside_the_level(device, tie):
    """Vocabulary that fills no block, one level captured after another, and the exact head untouched."""
    device = torch.device(device)
    model = model_of("llama", device, vocab_size=5000, tie=tie, layers=1)
    exact = model.get_output_embeddings().weight.clone()
    policy, draft = Beam(2, 3), fused_draft(model, device, HqqConfig(name="hqq", modules=WITH_HEAD))
    assert draft.model.draft_head is not None
    engine = Engine(TargetModel(model), draft, policy, max_length=64, prefill_chunk=16)
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        tree = engine.tree
        fused = tree.tokens[: tree.size].clone(), tree.scores[: tree.size].clone()
        engine.draft.captures = lambda policy: False  # torch's policy, on the same logits
        engine.draft.commit(tree, None, None)
        grow(engine, root, 10)
    # Logits of bfloat16 may tie, and either order of two that do is right.
    assert torch.equal(fused[0].sort().values, tree.tokens[: tree.size].sort().values)
    torch.testing.assert_close(fused[1], tree.scores[: tree.size], rtol=1e-4, atol=1e-3)
    assert torch.equal(model.get_output_embeddings().weight, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_text_drafted_with_a_quantized_head_passes_the_audit(device):
    device = torch.device(device)
    model = model_of("qwen3", device, vocab_size=640, layers=1)
    engine = Engine(TargetModel(model), fused_draft(model, device, MIXED), Beam(3, 3), max_length=96, prefill_chunk=16)
    on_gpu = device.type == "cuda"
    count = 60 if on_gpu else 8
    for _ in range(2 if on_gpu else 1):  # the second text replays the first one's graphs
        result = engine.generate(PROMPT, max_new_tokens=count)
        assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert result.stats.iterations < count - 1


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 128), (3, 64), (2, 64), (2, 128)])
def test_every_kernel_of_a_format_drafts_the_same(bits, group):
    device = torch.device("cuda")
    model = model_of("llama", device, hidden_size=256, intermediate_size=512, layers=1)
    quant = HqqConfig(name="hqq", bits=bits, group_size=group, modules=WITH_HEAD)
    found, tried = quantization_of(model, quant), []
    kept = found.formats["qkv"]
    for kernel in kept.kernels:
        if kept.unavailable(kernel, device) or any(kept.unfit(kernel, *shape) for shape in found.shapes.values()):
            continue
        fused = fused_draft(model, device, quant, dict.fromkeys(found.formats, Variant(kernel, 2, 1)))
        expected, got = grown_alike(model, [module_draft(model, quant), fused], Beam(2, 3))[1]
        assert apart(torch.cat(expected), torch.cat(got)) < 0.08, kernel
        tried.append(kernel)
    assert "int4_mma" in tried


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_kernels_of_every_format_are_chosen_on_a_card(bits, tmp_path):
    device = torch.device("cuda")
    model = model_of("llama", device, hidden_size=256, intermediate_size=512, vocab_size=4096, layers=1)
    quantization = quantization_of(model, HqqConfig(name="hqq", bits=bits, modules=WITH_HEAD))
    options = {"formats": quantization.formats, "folder": tmp_path, "note": print}
    choice = choose_kernels(quantization.shapes, 6, device, **options)
    assert set(choice.variants) == {"qkv", "out", "gate_up", "down", "head"}
    again = choose_kernels(quantization.shapes, 6, device, **options)
    assert (again.variants, again.measured) == (choice.variants, 0)


# ---------------------------------------------------------------------------------------------------- higgs


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
    assert str(bits) in format_.key
    for kernel in format_.kernels:
        for variant in format_.variants(kernel, role, n, k):
            linear = format_.random_linear(variant, n, k, torch.device("cpu"), swiglu=role == "gate_up")
            assert linear.nbytes == format_.device_bytes(n, k)
    assert format_.reference(role) == Variant("lut_mma", TILES[role])


def test_the_planner_is_told_what_is_quantized():
    found = quantization_of(model_of("llama", "cpu"), HiggsConfig(name="higgs", bits=3, modules=["mlp"]))
    assert set(found.shapes) == {"gate_up", "down"}
    assert set(found.exact) == {"qkv", "out"}
    weights = 3 * 128 * 192
    # Groups of 128 for gate and up, of 192 for down.
    assert found.layer_bytes == weights * 3 // 8 + 2 * (2 * 192) + 2 * 128
    assert found.stored_bytes(2) == 2 * found.layer_bytes
    assert "mlp 3 bit" in found.summary()
    assert "HIGGS" in found.summary()


def test_kernels_of_other_formats_are_refused():
    model = model_of("llama", "cpu")
    with pytest.raises(ConfigError, match=r"draft\.kernel=gemlite cannot compute qkv: .* no look-up tables"):
        quantization_of(model, HiggsConfig(name="higgs"), "gemlite")
    with pytest.raises(ConfigError, match=r"draft\.kernel=lut_mma cannot compute qkv"):
        quantization_of(model, HqqConfig(name="hqq"), "lut_mma")
