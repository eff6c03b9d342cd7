"""What the planner counts for a substitute is what its fused level holds, in every format."""

import math

import pytest
import torch

pytest.importorskip("triton")


from subspec.config.schema import BitsByModule, HiggsConfig, HqqConfig
from subspec.drafts.substitute_memory import substitute_allocations
from subspec.errors import ConfigError
from subspec.levels.build import SubstituteBuilder
from subspec.levels.quantization import level_quantization
from subspec.quant.choose_kernels import choose_kernels
from subspec.quant.level_linear import Dense
from subspec.targets.model_spec import ModelSpec
from tests.helpers.planning import planned, settings
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")


def quantization_of(model, quant, kernel="auto"):
    shapes = ModelSpec.of(model.config)
    return level_quantization(quant, shapes.layer, (shapes.vocab, shapes.hidden), kernel=kernel)


def model_of(family="qwen2", **options):
    shape = {"hidden_size": 128, "intermediate_size": 192, "heads": 4, "kv_heads": 2, "layers": 2}
    return tiny_model(family, **shape, **options).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("quant", "kernel"),
    [
        ({"bits": 8}, "auto"),
        ({"bits": 4}, "auto"),
        ({"bits": 3}, "auto"),
        ({"bits": 2, "group_size": 64}, "auto"),
        ({"bits": 4, "bits_by": BitsByModule(mlp=2, lm_head=8), "modules": ["attention", "mlp", "lm_head"]}, "auto"),
        ({"bits": 4, "modules": ["mlp"]}, "auto"),
        ({"bits": 4, "modules": ["q_proj", "down_proj"], "skip_layers": [1]}, "auto"),
    ],
)  # fmt: skip
def test_the_plans_bytes_are_those_of_the_tensors(quant, kernel):
    model, quant = model_of(), HqqConfig(name="hqq", **quant)
    quantization = quantization_of(model, quant, kernel)
    choice = choose_kernels(quantization.shapes, 3, CPU, formats=quantization.formats, kernel=kernel)
    options = {"formats": quantization.formats, "kernel": choice.variants, "keep_exact": quantization.keep_exact}
    builder = SubstituteBuilder(quantization.quantizer, **options)
    for index, layer in enumerate(model.model.layers):
        skipped = index in quant.skip_layers
        packed, dense = substitute_allocations(quantization, not skipped, skipped)
        fused = builder.build_layer(dict(layer.named_parameters()), CPU, exact=skipped, index=index)
        linears = fused.linears
        exact = sum(linear.weight.nbytes for linear in linears if isinstance(linear, Dense))
        assert exact == dense.bytes
        tensors = [tensor for linear in linears for tensor in linear.tensors]
        held = sum(tensor.nbytes for tensor in tensors)
        assert held == sum(linear.nbytes for linear in linears if not isinstance(linear, Dense))
        assert held == packed.bytes - quantization.head_bytes
        if tensors:  # moved into one allocation, each at a multiple of 256 bytes
            storages = {part._cdata: part.nbytes() for part in (t.untyped_storage() for t in tensors)}
            assert list(storages.values()) == [sum(math.ceil(t.nbytes / 256) * 256 for t in tensors)]
    head = builder.build_head(model.lm_head.weight)
    assert quantization.head_bytes == (0 if head is None else sum(tensor.nbytes for tensor in head.tensors))
    assert (head is None) == ("lm_head" not in (quant.modules or ()))


def test_bytes_on_disk_are_foreseen():
    model = model_of()
    quant = HqqConfig(name="hqq", bits_by=BitsByModule(mlp=3, lm_head=8), modules=["mlp", "lm_head"])
    quantization = quantization_of(model, quant)
    taken = 0
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            if "mlp" in name:
                codes = quantization.quantizer.quantize(parameter, f"{index}.{name.removesuffix('.weight')}")
                taken += sum(tensor.nbytes for tensor in codes.tensors().values())
    head = quantization.quantizer.quantize(model.lm_head.weight, "head.lm_head")
    taken += sum(tensor.nbytes for tensor in head.tensors().values())
    assert quantization.stored_bytes(layers=2) == taken


@pytest.mark.parametrize(
    ("quant", "kernel", "message"),
    [
        ({"axis": 0}, "auto", r"quant\.axis=0: offload=stream .* set quant\.axis=1"),
        ({"bits_by": BitsByModule(v_proj=8)}, "auto", r"one Linear of q_proj and k_proj and v_proj, .* v_proj 8\)"),
        ({"bits_by": BitsByModule(up_proj=2)}, "auto", r"quant\.bits_by: .* \(gate_proj 4, up_proj 2\)"),
        ({"group_size": 48}, "auto", r"quant\.group_size=48 does not divide the 128 inputs of .*instance 32"),
        ({"group_size": 32}, "int4_mma", r"draft\.kernel=int4_mma .* multiples of 64, not 32; set draft\.kernel=auto"),
        ({"group_size": 16}, "auto", r"quant\.group_size=16: no kernel of offload=stream takes 4 bits"),
        ({"bits": 2, "group_size": 16}, "gemlite", r"draft\.kernel=gemlite .* not 16"),
    ],
)  # fmt: skip
def test_what_has_no_kernel_is_refused(quant, kernel, message):
    with pytest.raises(ConfigError, match=message):
        quantization_of(model_of(), HqqConfig(name="hqq", **quant), kernel)


def test_inputs_that_fill_no_word_are_refused():
    model = tiny_model("llama", hidden_size=72, intermediate_size=192, heads=9, kv_heads=3)
    with pytest.raises(ConfigError, match=r"no kernel of offload=stream takes 2 bits for the 72 inputs of self_attn"):
        quantization_of(model, HqqConfig(name="hqq", bits=2, group_size=8))


def substitute_of(plan):
    return next(item for item in plan.items if item.name == "substitute")


def test_the_plan_says_what_is_kept_how():
    weights, head = 28 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944), 152064 * 3584
    four = substitute_of(planned(settings(12.0)))
    assert four.bytes == weights * 4.25 / 8
    assert four.note == "attention 4 bit, mlp 4 bit; groups of 64"
    quant = {"bits_by": BitsByModule(mlp=3, lm_head=8), "modules": ["attention", "mlp", "lm_head"]}
    mixed = substitute_of(planned(settings(16.0, quant=quant)))
    assert mixed.bytes == four.bytes + head * 8.5 / 8
    assert mixed.note == "attention 4 bit, mlp 3 bit in 4-bit words, lm_head 8 bit; groups of 64"


def test_another_kernel_is_planned_as_it_holds_its_weights():
    """gemlite has a scale and a zero of 16 bits each; `auto` takes it where that is no more than ours has."""
    shapes, head = model_of().model.layers[0].state_dict(), (320, 128)
    shapes = {name: tensor.shape for name, tensor in shapes.items()}
    bits = {}
    for kernel in ("auto", "gemlite"):
        found = level_quantization(HqqConfig(name="hqq"), shapes, head, kernel=kernel)
        bits[kernel] = 8 * found.layer_bytes / sum(n * k for n, k in found.shapes.values())
        assert ("gemlite" in found.kernels) == (kernel == "gemlite")
    assert bits == {"auto": 4.25, "gemlite": 4.5}
    for quant in (HqqConfig(name="hqq", bits=8), HqqConfig(name="hqq", group_size=32)):
        assert "gemlite" in level_quantization(quant, shapes, head).kernels


def test_fewer_bits_leave_room_for_layers():
    residents = [len(planned(settings(12.0, quant={"bits": bits})).resident_layers) for bits in (8, 4)]
    assert residents[0] < residents[1]


def test_a_quantized_head_is_read_instead_of_the_targets():
    plain = planned(settings(12.0))
    head = planned(settings(12.0, quant={"modules": ["attention", "mlp", "lm_head"]}))
    table = 152064 * 3584
    assert plain.level_read_bytes - head.level_read_bytes == table * 2 - table * 4.25 / 8


@pytest.mark.parametrize("quant", [HqqConfig(name="hqq", group_size=40), HiggsConfig(name="higgs")])
def test_gate_and_up_that_cannot_take_turns_are_refused_before_loading(quant):
    """16 rows of either in turn: what a fused level and its activation are built for."""
    shapes = {f"mlp.{name}_proj.weight": torch.Size((200, 320)) for name in ("gate", "up")}
    shapes |= {f"self_attn.{name}_proj.weight": torch.Size((320, 320)) for name in "qkvo"}
    shapes["mlp.down_proj.weight"] = torch.Size((320, 200))
    with pytest.raises(ConfigError, match=r"mlp\.gate_proj.*200.*multiple of 16.*offload="):
        level_quantization(quant, shapes, (1000, 320))
