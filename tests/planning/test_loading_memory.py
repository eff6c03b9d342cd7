"""What loading takes of the device for a moment: the figures against what the code allocates, and the plan's room."""

import gc
from types import SimpleNamespace

import pytest
import torch

from subspec.codec import coded_layer, format
from subspec.codec.coded_head import encode_head
from subspec.codec.format import encode
from subspec.config.enums import Codec
from subspec.config.schema import HiggsConfig, HqqConfig, Placement
from subspec.kernels import int4
from subspec.levels import build
from subspec.levels.build import SubstituteBuilder
from subspec.levels.quantization import level_quantization
from subspec.memory.allocator import GIB, headroom, rounded
from subspec.memory.trace import MemoryTrace
from subspec.offload import loader
from subspec.planning import loading_memory
from subspec.planning.choose import choose
from subspec.planning.loading_memory import ENCODING, PACKING, head_loading_bytes, loading_bytes
from subspec.planning.memory_layout import POST_LOAD, MemoryLayout
from subspec.quant import grids, hqq
from subspec.quant.codebook_linear import HiggsFormat, higgs_quantizer
from subspec.quant.hqq import hqq_quantizer
from subspec.quant.pairs import ROUNDING_BYTES
from subspec.targets.planted import SHAPES
from tests.codec.test_coded_layer import ROOM, builder_of, tiny
from tests.helpers.planning import settings, with_higgs
from tests.offload.test_streaming import ModelSource, plan_for

CPU = torch.device("cpu")
WITH_HEAD = ["attention", "mlp", "lm_head"]


def gaussian(n=128, k=1024):
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def counted(function, *known):
    """Most bytes that a call holds beside ``known``, and what it leaves."""
    with torch.inference_mode(), MemoryTrace() as live:
        result = function()
    return live.peak, live.live, result


def planned_budgets(layout):
    """Budgets that hold a run, and their decisions."""
    for tenths in range(50, 240, 5):
        budget = int(tenths / 10 * GIB)
        if (choice := choose(layout, budget)) is not None:
            yield budget, choice


@pytest.fixture
def small_blocks(monkeypatch):
    """Weights are encoded 4096 at a time, and nothing but coding takes memory."""
    for module in (format, loading_memory):
        monkeypatch.setattr(module, "BLOCK", 1 << 12)
    monkeypatch.setattr(loading_memory, "PACKING", 0)
    for kind in (hqq.HqqFormat, HiggsFormat):
        monkeypatch.setattr(kind, "peak_bytes", lambda *_: 0)


def parts(codes):
    return [value for value in vars(codes).values() if isinstance(value, torch.Tensor)]


def test_hqqs_optimiser_holds_what_is_counted():
    """Here everything is float32; on a GPU all but the weight and its rounding is half as wide."""
    weight, quantizer = gaussian(), hqq_quantizer()
    peak, kept, _ = counted(lambda: quantizer.quantize(weight), weight)
    assert kept <= quantizer.default.quantized_bytes(128, 1024) <= 1.13 * weight.numel()
    on_gpu = 4 + (peak / weight.numel() - 4) / 2
    assert 0.9 * hqq.OPTIMISER_BYTES < on_gpu < hqq.OPTIMISER_BYTES


def test_a_large_weight_is_quantized_in_parts(monkeypatch):
    monkeypatch.setattr(hqq, "SLICE_WEIGHTS", 1 << 14)
    weight, quantizer = gaussian(64), hqq_quantizer()
    peak, _, _ = counted(lambda: quantizer.quantize(weight), weight)
    rows = (1 << 14) // 1024
    assert quantizer.default.peak_bytes(64, 1024) == hqq.OPTIMISER_BYTES * rows * 1024
    assert quantizer.default.peak_bytes(2 * rows, 1024) == hqq.OPTIMISER_BYTES * 2 * rows * 1024
    assert peak < 2 * quantizer.default.peak_bytes(64, 1024) + 2 * quantizer.default.quantized_bytes(64, 1024)


@pytest.mark.parametrize(("bits", "dim"), [(4, 2), (4, 1), (2, 2)])
def test_higgs_holds_what_is_counted(bits, dim):
    weight, quantizer = gaussian(), higgs_quantizer(bits, dim, 256, 512)
    _, _, codes = counted(lambda: quantizer.quantize(weight), weight)
    assert sum(part.nbytes for part in parts(codes)) == quantizer.default.quantized_bytes(128, 1024)
    table = grids._cells(bits) if dim == 2 else weight  # which stays, whatever is quantized
    peak, _, _ = counted(lambda: quantizer.quantize(weight), weight, table)
    assert 0.6 * ROUNDING_BYTES < peak / weight.numel() < ROUNDING_BYTES


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_and_encoding_hold_what_is_counted(bits, monkeypatch):
    weight = gaussian()
    codes = hqq_quantizer(bits).quantize(weight)
    monkeypatch.setattr(int4, "PACKED_AT_ONCE", 1 << 16)
    peak, kept, _ = counted(lambda: int4.pack(*parts(codes), tiles=2, bits=bits), *parts(codes))
    assert peak - kept < PACKING * (1 << 16)
    monkeypatch.setattr(format, "BLOCK", 1 << 16)
    peak, kept, _ = counted(lambda: encode(weight, codes, codes.margin), weight, *parts(codes))
    assert 0.9 * ENCODING < (peak - kept) / (1 << 16) < ENCODING


@pytest.mark.usefixtures("small_blocks")
def test_coding_a_layer_holds_what_the_formula_says(monkeypatch):
    """With everything on the way: the code of all Linears, the decoded one, and the run of bytes."""
    model = tiny(layers=1)
    tensors = {name: p.data for name, p in model.model.layers[0].named_parameters()}
    # The torch decoder's own temporaries are a CPU's affair.
    monkeypatch.setattr(coded_layer, "restore_into", lambda out, coded, linear, rows: out.copy_(exact[out.shape]))
    exact = {tensor.shape: tensor for tensor in tensors.values()}
    quantized = {}
    substitute = builder_of(model).build_layer(tensors, CPU, keep=quantized)
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    known = [*tensors.values(), *(part for own in quantized.values() for part in parts(own))]
    known += [t for role in ("qkv", "out", "gate_up", "down") for t in getattr(substitute, role).tensors]
    peak, _, (layer, _) = counted(lambda: coded_layer.encode_layer(tensors, quantized, substitute), *known)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    head = (model.config.vocab_size, model.config.hidden_size)
    quantization = level_quantization(HqqConfig(name="hqq"), shapes, head)
    stays = sum(tensor.nbytes for tensor in known[: len(tensors)])
    stays += sum(part.nbytes for own in quantized.values() for part in parts(own))
    formula = loading_bytes(quantization, shapes, head, 2, layer.nbytes)
    assert peak + stays <= formula + 14 * 256 + 4096
    assert formula < 1.4 * (peak + stays)


@pytest.mark.parametrize(("quantizer", "kind"), [("hqq", Codec.none), ("hqq", Codec.substitute), ("higgs", Codec.none)])
@pytest.mark.parametrize("shape", ["qwen2_5_7b", "qwen2_5_32b"])
def test_a_layer_in_the_making_fits_every_budget_that_is_planned(shape, quantizer, kind):
    config = settings(8.0, codec=kind)
    if quantizer == "higgs":
        config = with_higgs(config)
    layout = MemoryLayout(config, SHAPES[shape]())
    waited = set()
    for budget, choice in planned_budgets(layout):
        items = [item for item in layout.allocations(choice) if item.place is Placement.device]
        waiting = layout.staged_layers(choice)
        there = sum(item.bytes for item in items if item.name not in POST_LOAD)
        there -= waiting * layout.packed_bytes
        assert there + layout.loading_bytes <= budget - headroom(budget)
        assert waiting < layout.spec.layers
        waited.add(waiting)
    assert 0 in waited
    assert len(waited) > 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("quant", ["hqq", "higgs"])
def test_making_and_coding_a_head_holds_what_the_formula_says(quant, monkeypatch):
    """With everything but the quantizer's temporaries, which have tests of their own."""
    model = tiny(layers=1)
    weight = gaussian(2003, 128)
    own = {"hqq": HqqConfig, "higgs": HiggsConfig}[quant](name=quant, modules=WITH_HEAD)
    shapes = {name: p.shape for name, p in model.model.layers[0].named_parameters()}
    quantization = level_quantization(own, shapes, (2003, 128))
    kernel, formats = {"hqq": "int4_mma", "higgs": "lut_mma"}[quant], quantization.formats
    options = {"kernel": kernel, "keep_exact": frozenset(), "formats": formats}
    builder = SubstituteBuilder(quantization.quantizer, **options)
    kept = []
    head = builder.build_head(weight, kept)
    # The torch decoder's own temporaries are a CPU's affair.
    exact = lambda out, coded, linear, own: out.copy_(weight[own.first : own.first + out.shape[0]])  # noqa: E731
    monkeypatch.setattr(coded_layer, "restore_into", exact)
    known, room = [weight, *parts(kept[0]), *head.tensors], 2 * 128 * 700
    peak, stays, code = counted(lambda: encode_head(weight, kept[0], head, room), *known)
    assert [part.shape[0] for part in code.parts] == [672, 672, 659]
    assert code.nbytes <= stays <= code.nbytes + 4096  # of a grid a table stays
    there = weight.nbytes + sum(part.nbytes for part in parts(kept[0]))
    formula = head_loading_bytes(quantization, (2003, 128), room, code.nbytes)
    assert peak + there <= formula + 14 * 256 + 4096
    assert formula < 1.4 * (peak + there)


@pytest.mark.parametrize("shape", ["qwen2_5_7b", "qwen2_5_32b"])
def test_making_a_coded_head_fits_every_budget_that_is_planned(shape):
    """It comes first, when the embedding table is all that is there."""
    config = settings(8.0, codec=Codec.substitute, quant={"modules": WITH_HEAD})
    layout = MemoryLayout(config, SHAPES[shape]())
    assert layout.head_loading_bytes > 2.7 * layout.table_bytes
    planned = list(planned_budgets(layout))
    assert len(planned) > 5
    for budget, choice in planned:
        own = layout.table_bytes * (choice.embedding is Placement.device)
        assert layout.head_loading_bytes + own <= layout.device_bytes(choice) <= budget - headroom(budget)


def test_where_a_head_in_the_making_needs_more_than_the_run_the_plan_says_so():
    """A large vocabulary before small layers."""
    model = SHAPES["tiny"]()
    model.vocab_size = 200_000
    config = settings(4.0, codec=Codec.substitute, quant={"modules": WITH_HEAD})
    layout = MemoryLayout(config, model)
    choice = choose(layout, 4 * GIB)
    items = {item.name: item for item in layout.allocations(choice)}
    device = [item for item in items.values() if item.place is Placement.device]
    others = sum(item.bytes for item in device if item.name != "coding the LM head")
    own = layout.table_bytes * (choice.embedding is Placement.device)
    assert others + items["coding the LM head"].bytes == layout.head_loading_bytes + own > others


def test_at_the_papers_budgets_nothing_waits():
    for shape, gib in {"qwen2_5_7b": 8, "llama3_1_8b": 8, "qwen2_5_14b": 12, "qwen2_5_32b": 24}.items():
        for kind in (Codec.none, Codec.substitute):
            layout = MemoryLayout(settings(gib, codec=kind), SHAPES[shape]())
            assert layout.staged_layers(choose(layout, gib * GIB)) == 0


def test_host_memory_counts_the_layers_that_wait():
    layout = MemoryLayout(settings(5.8), SHAPES["qwen2_5_7b"]())
    choice = choose(layout, int(5.8 * GIB))
    waiting = layout.staged_layers(choice)
    host = {item.name: item for item in layout.allocations(choice) if item.place is Placement.host}
    assert waiting > 0
    assert f"{waiting} of the substitute" in host["loading and process"].note
    layout.loading_bytes = 0
    less = {item.name: item for item in layout.allocations(choice) if item.place is Placement.host}
    difference = host["loading and process"].bytes - less["loading and process"].bytes
    assert difference == waiting * layout.packed_bytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers_that_waited_are_the_same(device, monkeypatch):
    if device == "cpu":  # the torch reference takes a step per weight of a chunk
        monkeypatch.setattr(format, "CHUNK", 16)
    model, device = tiny(layers=2, device=device), torch.device(device)
    moves, results, compact = [], [], build.compact
    monkeypatch.setattr(
        loader, "compact", lambda layers, to=None: moves.append((len(layers), to)) or compact(layers, to)
    )
    for waiting in (0, 2):
        plan = plan_for((1,), 1, codec=Codec.substitute, layer_bytes=ROOM)
        object.__setattr__(plan, "waiting_layers", waiting)
        loaded = loader.load_streamed(ModelSource(model), plan, device, builder=builder_of(model))
        decoding = loaded.target.restorer
        decoding.restore(1, decoding.resident[1])
        layers = loaded.substitute.layers
        linears = [linear for each in layers for linear in each.linears]
        results.append([tensor.clone() for tensor in decoding.parameters.values()])
        results[-1] += [tensor for linear in linears for tensor in linear.tensors]
        assert all(tensor.device.type == device.type for tensor in results[-1])
        loaded.close()
    together = [(2, device)] if device.type == "cuda" else []
    assert moves == [*together, (1, CPU), (1, CPU), *(together or [(1, device)] * 2)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.gpu
def test_layers_that_wait_make_room():
    """The peak of loading, which has all layers of the substitute on the device, or one."""
    device = torch.device("cuda")
    model = tiny(layers=6, device=device)
    peaks = []
    for waiting in (0, 6):
        gc.collect()  # what earlier tests left must not go in between
        plan = plan_for((), 1, codec=Codec.none)
        object.__setattr__(plan, "waiting_layers", waiting)
        held = []
        builder = builder_of(model)
        fuse = builder.build_layer

        def watched(*arguments, fuse=fuse, held=held, **options):
            held.append(torch.cuda.memory_allocated())
            return fuse(*arguments, **options)

        builder.build_layer = watched
        loaded = loader.load_streamed(ModelSource(model), plan, device, builder=builder)
        peaks.append(held[-1] - held[0])
        packed = sum(t.nbytes for t in loaded.substitute.layers[0].gate_up.tensors)
        loaded.close()
        del loaded
    assert peaks[0] - peaks[1] > 4 * packed


@pytest.mark.parametrize("quant", [{}, {"skip_layers": [0]}, {"skip_layers": [5, 9]}, {"modules": ["mlp"]}])
@pytest.mark.parametrize("vram", [7.5, 8.0, 12.0])
def test_rounding_is_spared_by_the_layers_that_loading_lays_together(quant, vram, monkeypatch):
    layout = MemoryLayout(settings(vram, quant=quant), SHAPES["qwen2_5_7b"]())
    resident = choose(layout, int(vram * GIB)).resident
    packed = SimpleNamespace(tensors=[torch.empty(layout.packed_bytes, dtype=torch.uint8, device="meta")])
    exact = SimpleNamespace(tensors=[])
    skipped = quant.get("skip_layers", ())
    layers = [SimpleNamespace(linears=[exact if i in skipped else packed, exact]) for i in range(layout.spec.layers)]
    runs = []
    monkeypatch.setattr(loader, "compact", lambda own, to: runs.append(len(own)))
    monkeypatch.setattr(loader, "_release_temporaries", lambda device: None)
    slots = layout.ring_slots(resident)
    loader._gather(layers, 0, (resident + slots) * layout.layer_bytes, torch.device("cuda"))
    assert sum(runs) == layout.spec.layers - len(skipped)
    apart = sum(runs) * rounded(layout.packed_bytes)
    assert layout._spared(resident, slots) == apart - sum(rounded(run * layout.packed_bytes) for run in runs) > 0
