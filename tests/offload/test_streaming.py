"""A streamed target computes exactly what the model on the device computes; copies never overtake readers."""

import pytest
import torch

from subspec.config.enums import Codec
from subspec.config.schema import Placement
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.errors import SubspecError
from subspec.levels.build import SubstituteBuilder
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention
from subspec.offload.loader import load_streamed
from subspec.offload.stream import LayerStreamer
from subspec.planning.plan import Plan
from subspec.quant.hqq import hqq_quantizer
from subspec.targets.layer_bytes import PlainCodec, parameter_views, write_layer
from subspec.utils.pinned import PinnedBuffer
from tests.helpers.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99, 4, 8, 77]


class ModelSource:
    """A layer source over a model in memory."""

    name = source = identity = "tiny"
    planted = False
    eos_token_ids = ()
    tokenizer = None

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.dtype = model.model.embed_tokens.weight.dtype

    def layer_shapes(self, index):
        return {n: p.shape for n, p in self.model.model.layers[index].named_parameters()}

    def layer(self, index, device):
        return {n: p.data.to(device) for n, p in self.model.model.layers[index].named_parameters()}

    def sample(self, index):
        return {n: t if t.dim() == 1 else t[:1] for n, t in self.layer(index, "cpu").items()}

    def shared(self, device):
        return {n: p.data.to(device) for n, p in self.model.named_parameters() if ".layers." not in n}


def plan_for(resident, slots=2, embedding=Placement.device, codec=Codec.none, layer_bytes=0, disk=(), spare=None):
    plan, values = object.__new__(Plan), (tuple(resident), slots, embedding, codec, layer_bytes, tuple(disk))
    names = ("resident_layers", "ring_slots", "embedding", "codec", "layer_bytes", "disk_layers")
    object.__setattr__(plan, "coded_in_files", bool(disk))
    object.__setattr__(plan, "restored_bytes", 10**9)
    object.__setattr__(plan, "spare", spare)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(plan, name, value)
    return plan


def families_and_placements():
    """Every placement with one family and every family with one placement; the other pairs are slow tests."""
    for family in ("llama", "qwen2", "qwen3", "mistral"):
        for resident, slots in [([], 2), ([1], 1), ([0, 3], 2), ([0, 1, 2, 3], 0), ([], 4)]:
            default = family == "llama" or (resident, slots) == ([0, 3], 2)
            yield pytest.param(family, resident, slots, marks=[] if default else [pytest.mark.slow])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "resident", "slots"), families_and_placements())
def test_streamed_text_is_the_models(family, resident, slots, device):
    device = torch.device(device)
    model = tiny_model(family, layers=4).to(device)
    expected = Engine(TargetModel(model), max_length=64).generate(PROMPT, max_new_tokens=20).token_ids
    loaded = load_streamed(ModelSource(model), plan_for(resident, slots), device)
    try:
        engine = Engine(loaded.target, max_length=64, prefill_chunk=4)
        for _ in range(2):
            result = engine.generate(PROMPT, max_new_tokens=20)
            assert result.token_ids == expected
        passes = 19 + 2
        layer = PlainCodec(4).layer_bytes(ModelSource(model).layer_shapes(0))
        assert result.stats.bytes_streamed == passes * (4 - len(resident)) * layer
    finally:
        loaded.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("embedding", [Placement.device, Placement.host])
def test_tied_and_untied_embeddings_wherever_they_live(device, embedding):
    device = torch.device(device)
    for tie in (False, True):
        if tie and embedding is Placement.host:
            continue
        model = tiny_model("qwen2", layers=3, tie=tie, vocab_size=331).to(device, torch.bfloat16)
        loaded = load_streamed(ModelSource(model), plan_for([0], 2, embedding), device)
        tokens = torch.tensor(PROMPT, device=device)
        if device.type == "cuda" or embedding is Placement.device:
            assert torch.equal(loaded.target.embed(tokens), model.model.embed_tokens(tokens))
        loaded.close()


@pytest.mark.parametrize("device", DEVICES)
def test_streamed_speculation_passes_the_audit(device):
    pytest.importorskip("triton")
    from subspec.decoding.audit import Auditor

    device = torch.device(device)
    model = tiny_model("qwen2", layers=2, hidden_size=128, intermediate_size=192).to(device, torch.bfloat16)
    source = ModelSource(model)
    exact = {"keep_exact": frozenset(), "skip_layers": frozenset({1})}
    builder = SubstituteBuilder(hqq_quantizer(), kernel="int4_mma", **exact)
    loaded = load_streamed(source, plan_for([1]), device, builder=builder)
    draft = CapturedDraft(loaded.substitute, attention=Attention(splits=4))
    policy = Beam(4, 3) if device.type == "cuda" else Beam(2, 2)
    engine = Engine(loaded.target, draft, policy, max_length=96)
    count = 60 if device.type == "cuda" else 5
    result = engine.generate(PROMPT, max_new_tokens=count)
    assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert result.stats.iterations < count - 1
    assert builder.modules == 7
    loaded.close()


def test_an_interrupted_pass_does_not_confuse_the_next():
    model = tiny_model("llama", layers=4)
    expected = Engine(TargetModel(model), max_length=64).generate(PROMPT, max_new_tokens=12).token_ids
    loaded = load_streamed(ModelSource(model), plan_for([2], 2), torch.device("cpu"))
    engine = Engine(loaded.target, max_length=64)
    engine.generate(PROMPT, max_new_tokens=3)
    for layers_done in (1, 2):
        for _ in range(layers_done):
            loaded.target.streamer.acquire()
            loaded.target.streamer.release()
        assert engine.generate(PROMPT, max_new_tokens=12).token_ids == expected


def test_layers_come_in_order_through_any_ring():
    for count in (1, 2, 3, 5):
        for slots in range(1, count + 1):
            layers = [torch.full((7,), i, dtype=torch.uint8) for i in range(count)]
            streamer = LayerStreamer(layers, slots, torch.device("cpu"))
            for step in range(3 * count + 1):
                assert streamer.position == step % count
                assert streamer.slots[streamer.acquire()].unique().tolist() == [step % count]
                streamer.release()
    with pytest.raises(ValueError, match="3 ring slots for 2"):
        LayerStreamer(layers[:2], 3, torch.device("cpu"))


def test_flat_bytes_hold_every_parameter_exactly():
    tensors = {name: torch.randn(size).bfloat16() for name, size in (("a", (3, 5)), ("b", 7), ("c", (2, 200)))}
    shapes = {n: t.shape for n, t in tensors.items()}
    flat = torch.zeros(PlainCodec(2).layer_bytes(shapes), dtype=torch.uint8)
    write_layer(flat, tensors, torch.bfloat16)
    for name, view in parameter_views(flat, shapes, torch.bfloat16).items():
        assert torch.equal(view, tensors[name])
        assert view.storage_offset() * 2 % 256 == 0


# ------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("guarded", [True, False])
def test_no_refill_overtakes_its_readers_but_without_the_guard(guarded, monkeypatch):
    """Slow readers over a ring: whether each sees the bytes of its own layer."""
    if not guarded:
        monkeypatch.setattr(LayerStreamer, "_freed", lambda *_: None)
    count, size = 6, 32 * 2**20
    buffers = [PinnedBuffer(size) for _ in range(count)]
    for i, buffer in enumerate(buffers):
        buffer.tensor.fill_(i)
    streamer = LayerStreamer([b.tensor for b in buffers], 2, torch.device("cuda"))
    right = torch.zeros(60, dtype=torch.bool, device="cuda")
    for step in range(60):
        slot = streamer.slots[streamer.acquire()]
        torch.cuda._sleep(20_000_000)  # about ten milliseconds, many copies' worth: the reader is late
        right[step] = (slot == step % count).all()
        streamer.release()
    torch.cuda.synchronize()
    assert bool(right.all()) is guarded
    for buffer in buffers:
        buffer.close()


@pytest.mark.gpu
def test_streamed_weights_stay_exact_under_load():
    """Hundreds of passes, with other work on the device, and every layer compared with its original bit by bit."""
    device = torch.device("cuda")
    model = tiny_model("qwen2", layers=6, hidden_size=512, vocab_size=1000).to(device, torch.bfloat16)
    source = ModelSource(model)
    loaded = load_streamed(source, plan_for([2]), device)
    streamer = loaded.target.streamer
    originals = [source.layer(i, device) for i in (0, 1, 3, 4, 5)]
    noise = torch.randn(2048, 2048, device=device)
    good = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(300):
        for original in originals:
            layer = loaded.target.feeds[1].acquire(0)
            noise = (noise @ noise).clamp_(-1, 1)
            for name, parameter in layer.named_parameters():
                good &= (parameter == original[name]).all()
            streamer.release()
    assert bool(good)
    loaded.close()


@pytest.mark.gpu
def test_pinned_memory_is_given_back():
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(4):
        buffer = PinnedBuffer(2**30)
        buffer.tensor.fill_(1)
        assert buffer.tensor.is_pinned()
        buffer.close()
        del buffer
    assert process.memory_info().rss - before < 1.5 * 2**30


def test_more_host_memory_than_there_is_ends_in_one_line():
    with pytest.raises(SubspecError, match=r"GiB of host memory .*offload\.resident_layers"):
        PinnedBuffer(1 << 62, pin=False)
