"""The fused level in every format of its weights: the same logits as the dequantized weights module by module."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.quant_checks import linear_names
from subspec.config.schema import BitsByModule, HqqConfig
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.levels.build import SubstituteBuilder, level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention
from subspec.levels.quantization import level_quantization
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.level_linear import Variant
from subspec.targets.model_spec import ModelSpec
from tests.helpers.drafts import begin, grow
from tests.helpers.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99, 4, 8, 77, 12, 300]

WITH_HEAD = ["attention", "mlp", "lm_head"]
SETTINGS = {
    "8 bit": {"bits": 8},
    "3 bit in 4": {"bits": 3},
    "2 bit, large groups": {"bits": 2, "group_size": 64},
    "mixed with a head": {"bits": 4, "bits_by": BitsByModule(mlp=3, lm_head=8), "modules": WITH_HEAD},
    "head of 4 bit alone": {"bits_by": BitsByModule(lm_head=4), "modules": ["lm_head"]},
}


def model_of(family, device, **shape):
    options = {"hidden_size": 128, "layers": 1, "heads": 4, "kv_heads": 2, "intermediate_size": 192, **shape}
    return tiny_model(family, **options).to(device, torch.bfloat16)


def quantization_of(model, quant, kernel="auto"):
    shapes = ModelSpec.of(model.config)
    return level_quantization(quant, shapes.layer, (shapes.vocab, shapes.hidden), kernel=kernel)


def fused_draft(model, quant, device, kernel="auto", variants=None):
    quantization = quantization_of(model, quant, kernel)
    if variants is None:
        # The kernels that have a reference: the others are measured, and tested for themselves.
        own = {role: kept.reference(role) for role, kept in quantization.formats.items()}
        variants = own if kernel == "auto" else {role: Variant(kernel, 2, 1) for role in own}
    options = {"formats": quantization.formats, "kernel": variants, "keep_exact": quantization.keep_exact}
    builder = SubstituteBuilder(model.config, quantization.quantizer, **options)
    exact = [dict(layer.named_parameters()) for layer in model.model.layers]
    layers = [builder.build_layer(tensors, device, index=index) for index, tensors in enumerate(exact)]
    head = builder.build_head(model.lm_head.weight.data)
    return CapturedDraft(level_model(model, layers, head), attention=Attention(splits=4))


def module_draft(model, quant):
    """The same quantized weights as plain modules."""
    substitute, quantizer = share_parameters(model), quantization_of(model, quant).quantizer
    for name, module in list(substitute.named_modules()):
        if name.rpartition(".")[2] in linear_names(quant.modules):
            weight = quantizer.quantize(module.weight.data, name).dequantize().to(torch.bfloat16)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return SubstituteDraft(substitute)


def first_levels(model, draft):
    """Logits of the root and of three fixed children, float32 [4, vocabulary]."""
    engine = Engine(TargetModel(model), draft, Beam(3, 3), max_length=64, prefill_chunk=16)
    with torch.inference_mode():
        frontier = engine.tree.plant(begin(engine, PROMPT))
        root = engine.draft.expand(engine.tree, frontier).float().clone()
        device = root.device
        frontier = engine.tree.append(
            torch.tensor([7, 8, 9], device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.tensor([-1.0, -2.0, -3.0], device=device),
        )
        return torch.cat([root, engine.draft.expand(engine.tree, frontier).float()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_level_is_the_dequantized_weights(name, device):
    device = torch.device(device)
    model, quant = model_of("qwen2", device), HqqConfig(name="hqq", **SETTINGS[name])
    expected = first_levels(model, module_draft(model, quant))
    got = first_levels(model, fused_draft(model, quant, device))
    assert (got - expected).norm() / expected.norm() < 0.08  # bfloat16 in another order
    plain = first_levels(model, SubstituteDraft(share_parameters(model)))
    if quant.bits < 8:  # 8 bits differ from the exact weights no more than bfloat16 does
        assert (got - plain).norm() > 1.5 * (got - expected).norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_quantized_head_grows_the_tree_inside_the_level(device, tie):
    """Vocabulary that fills no block, one level captured after another, and the exact head untouched."""
    device = torch.device(device)
    model = model_of("llama", device, vocab_size=5000, tie=tie)
    exact = model.get_output_embeddings().weight.clone()
    quant = HqqConfig(name="hqq", bits=4, modules=WITH_HEAD)
    policy, draft = Beam(2, 3), fused_draft(model, quant, device)
    assert draft.model.draft_head is not None
    engine = Engine(TargetModel(model), draft, policy, max_length=64, prefill_chunk=16)
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        tree = engine.tree
        fused = tree.tokens[: tree.size].clone(), tree.scores[: tree.size].clone()
        engine._level_step = None  # torch's policy, on the same logits
        engine.draft.commit(tree, None, None)
        grow(engine, root, 10)
    # Logits of bfloat16 may tie, and either order of two that do is right.
    assert torch.equal(fused[0].sort().values, tree.tokens[: tree.size].sort().values)
    torch.testing.assert_close(fused[1], tree.scores[: tree.size], rtol=1e-4, atol=1e-3)
    assert torch.equal(model.get_output_embeddings().weight, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_text_drafted_with_a_quantized_head_passes_the_audit(device):
    device = torch.device(device)
    model = model_of("qwen3", device, vocab_size=640)
    quant = HqqConfig(name="hqq", **SETTINGS["mixed with a head"])
    draft = fused_draft(model, quant, device)
    engine = Engine(TargetModel(model), draft, Beam(3, 3), max_length=96, prefill_chunk=16)
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
    model = model_of("llama", device, hidden_size=256, intermediate_size=512)
    quant = HqqConfig(name="hqq", bits=bits, group_size=group, modules=WITH_HEAD)
    expected = first_levels(model, module_draft(model, quant))
    tried = []
    for kernel in quantization_of(model, quant).formats["qkv"].kernels:
        shapes = quantization_of(model, quant).shapes
        kept = quantization_of(model, quant).formats["qkv"]
        if kept.unavailable(kernel, device) or any(kept.unfit(kernel, *shape) for shape in shapes.values()):
            continue
        got = first_levels(model, fused_draft(model, quant, device, kernel))
        assert (got - expected).norm() / expected.norm() < 0.08, kernel
        tried.append(kernel)
    assert "int4_mma" in tried


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_kernels_of_every_format_are_chosen_on_a_card(bits, tmp_path):
    device = torch.device("cuda")
    model = model_of("llama", device, hidden_size=256, intermediate_size=512, vocab_size=4096)
    quantization = quantization_of(model, HqqConfig(name="hqq", bits=bits, modules=WITH_HEAD))
    options = {"formats": quantization.formats, "folder": tmp_path, "note": print}
    choice = choose_kernels(quantization.shapes, 6, device, **options)
    assert set(choice.variants) == {"qkv", "out", "gate_up", "down", "head"}
    again = choose_kernels(quantization.shapes, 6, device, **options)
    assert (again.variants, again.measured) == (choice.variants, 0)
