"""Quantized weights on disk: bit for bit what was quantized, and never those of another weight."""

from contextlib import suppress

import pytest
import torch

from subspec.config.schema import Cache
from subspec.errors import ConfigError
from subspec.levels.build import SubstituteBuilder, role_shapes
from subspec.quant.hqq import HqqFormat, HqqQuantizer, hqq_quantizer
from subspec.quant.integers import QuantizedIntegers
from subspec.quant.level_linear import Dense
from subspec.quant.quantize_model import quantize_model
from subspec.quant.weight_format import FormatQuantizer
from subspec.store.substitutes import CachedModules, CachedQuantizer, SubstituteStore
from subspec.utils.disk import MANIFEST
from tests.helpers.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS, FACTS = 1, {"target": "tiny"}
MODULES, COUNT = ["attention", "mlp", "lm_head"], 7 * LAYERS + 1


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    return SubstituteStore(FACTS).folder


@pytest.fixture(scope="module")
def original():
    """As quantizing takes time, the shapes are as small as kernels allow."""
    return tiny_model("qwen2", layers=LAYERS, hidden_size=64, heads=2, kv_heads=1, intermediate_size=64)


@pytest.fixture
def model(original):
    from subspec.drafts.substitute import share_parameters

    copied = share_parameters(original)
    copied.load_state_dict({n: t.clone() for n, t in original.state_dict().items()}, assign=True)
    return copied.to(torch.bfloat16)


@pytest.fixture
def no_hqq(monkeypatch):
    def arm():
        for name in ("hqq.core.quantize.Quantizer.quantize", "subspec.quant.hqq.HqqFormat.quantize"):
            monkeypatch.setattr(name, lambda *_, **__: pytest.fail("quantized again"))

    return arm


def built(model, *, exact=(), keep=frozenset(), **options):
    """Fused layers, the store that served them, and its notes."""
    notes = []
    with SubstituteStore(FACTS, note=notes.append, **options) as store:
        quantizer = CachedQuantizer(hqq_quantizer(), store)
        options = {"kernel": "int4_mma", "keep_exact": frozenset(keep)}
        builder = SubstituteBuilder(quantizer, **options)
        layers = []
        for index, layer in enumerate(model.model.layers):
            tensors = dict(layer.named_parameters())
            layers.append(builder.build_layer(tensors, model.device, exact=index in exact, index=index))
    return layers, store, notes


def assert_alike(one, other):
    for a, b in zip(one, other, strict=True):
        for role in ("qkv", "out", "gate_up", "down"):
            left, right = getattr(a, role), getattr(b, role)
            for x, y in zip(left.tensors, right.tensors, strict=True):
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            assert isinstance(left, Dense) == isinstance(right, Dense)


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_start_has_the_same_bits_without_hqq(model, folder, no_hqq, device):
    model = model.to(device)
    fresh, store, notes = built(model)
    assert (store.read, store.made, notes) == (0, 7 * LAYERS, [])
    files = [*(f"layer_{index:03}.safetensors" for index in range(LAYERS)), MANIFEST]
    assert sorted(file.name for file in folder.iterdir()) == files
    assert_alike(fresh, built(model, cache=Cache.off)[0])
    shapes = role_shapes({name: p.shape for name, p in model.model.layers[0].named_parameters()})
    foreseen = LAYERS * sum(HqqFormat().stored_bytes(*shape) for shape in shapes.values())
    taken = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert foreseen <= taken < foreseen + LAYERS * 4096  # headers and checksums
    no_hqq()
    again, store, notes = built(model)
    assert (store.read, store.made, notes) == (7 * LAYERS, 0, [])
    assert_alike(again, fresh)


def test_codes_of_other_weights_are_not_used(model):
    """One element is another: none that an evenly spread sample would have met."""
    built(model)
    model.model.layers[0].mlp.up_proj.weight.data[3, 7] += 1
    changed, store, notes = built(model)
    assert (store.read, store.made) == (7 * LAYERS - 1, 1)
    assert len(notes) == 1
    assert "layer 0, mlp.up_proj" in notes[0]
    assert "is of other weights" in notes[0]
    assert_alike(changed, built(model, cache=Cache.off)[0])
    assert built(model)[1].made == 0


def test_tensors_that_do_not_fit_are_not_used(model, monkeypatch):
    built(model)
    monkeypatch.setattr(HqqFormat, "restore", lambda *_: None)
    assert built(model)[1].made == 7 * LAYERS


def test_modules_that_were_exact_before_are_added(model, folder):
    built(model, exact=(0,))
    assert not folder.exists()
    built(model, keep={"q_proj", "k_proj", "v_proj", "o_proj"})
    _, store, _ = built(model)
    assert (store.read, store.made) == (3, 4)
    assert built(model)[1].read == 7


def test_without_names_nothing_is_kept(folder):
    weight = torch.randn(16, 64)
    with SubstituteStore(FACTS) as store:
        quantizer = CachedQuantizer(hqq_quantizer(), store)
        one = quantizer.quantize(weight)
        quantizer.end_layer()
    assert torch.equal(one.dequantize(), HqqFormat().quantize(weight).dequantize())
    assert not folder.exists()


def test_scales_that_float16_would_round_are_kept_whole():
    class Fine(HqqFormat):
        def quantize(self, weight):
            q = torch.arange(16, dtype=torch.uint8).repeat(4 * 8).view(4, 128)
            return QuantizedIntegers(q, torch.full((4, 2), 0.1), torch.full((4, 2), 7.5), 64, 4)

    weight = torch.zeros(4, 128)
    for _ in range(2):
        with SubstituteStore(FACTS) as store:
            quantizer = CachedQuantizer(FormatQuantizer(Fine()), store)
            codes = quantizer.quantize(weight, "0.x")
            quantizer.end_layer()
        expected = Fine().quantize(weight)
        assert all(torch.equal(getattr(codes, n), getattr(expected, n)) for n in ("q", "scale", "zero"))
    assert store.read == 1


# ------------------------------------------------------------------------------------------- modules


def quantizer_of(*, unpack=False, dtype=torch.bfloat16, **options):
    options = {"bits": 4, "bits_by": {"down_proj": 3, "lm_head": 8}, "group_size": 32, **options}
    return HqqQuantizer(compute_dtype=dtype, device=torch.device("cpu"), unpack=unpack, **options)


def quantize(model, *, folder=None, **options):
    """A substitute's tensors by name, its logits, and the store that served it."""
    from subspec.drafts.substitute import share_parameters

    substitute, quantizer = share_parameters(model), quantizer_of(**options)
    with CachedModules(quantizer, SubstituteStore(quantizer.facts, folder=folder)) as cached:
        report = quantize_model(substitute, cached, modules=MODULES, skip_layers=[])
    assert report.modules == COUNT
    tensors = {}
    for name, module in substitute.named_modules():
        if name.endswith(("_proj", "lm_head")):
            packed = hasattr(module, "W_q")
            parts = (module.W_q, module.meta["scale"], module.meta["zero"]) if packed else (module.weight,)
            tensors[name] = [part for part in (*parts, module.bias) if part is not None]
    return tensors, substitute(torch.tensor([[5, 17, 33, 99]])).logits, cached.store


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("axis", "unpack", "dtype"), [(0, True, torch.float32), (1, False, torch.float32), (1, False, torch.bfloat16)]
)
def test_a_second_start_has_the_same_modules(model, tmp_path, no_hqq, axis, unpack, dtype, own):
    model, options = model.to(dtype), {"axis": axis, "unpack": unpack, "dtype": dtype}
    options["folder"] = tmp_path / "mine" if own else None
    fresh, logits, first = quantize(model, **options)
    assert (first.read, first.made) == (0, COUNT)
    no_hqq()
    again, same, second = quantize(model, **options)
    assert (second.read, second.made) == (COUNT, 0)
    assert fresh.keys() == again.keys()
    for name, parts in fresh.items():
        for a, b in zip(parts, again[name], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
    assert torch.equal(logits, same)


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    quantize(model, folder=tmp_path / "mine")
    other = tiny_model("qwen2", layers=LAYERS, hidden_size=64, heads=2, kv_heads=1, intermediate_size=128)
    for weights in (other.to(torch.bfloat16), model):
        weights.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1
        with pytest.raises(ConfigError, match=r"quant\.folder=.*its layer 0, .* was made from other weights"):
            quantize(weights, folder=tmp_path / "mine")


def test_an_interrupted_layer_is_not_kept(model):
    store = SubstituteStore(FACTS)
    with suppress(KeyboardInterrupt), CachedModules(quantizer_of(), store) as cached:
        cached.quantize(model.model.layers[0].mlp.up_proj, "layers.0.mlp.up_proj")
        raise KeyboardInterrupt
    assert not list(store.folder.glob("*.safetensors"))
