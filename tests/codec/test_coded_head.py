"""An LM head that is coded by the draft's own is the exact one, bit for bit, and so are the texts."""

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspec.codec import coded_layer, format
from subspec.codec import restore as kernel
from subspec.codec.coded_head import ROW_MULTIPLE, CodedHead, encode_head, slice_rows
from subspec.codec.coding import MORE_FOR_HEADS
from subspec.codec.format import encode
from subspec.config.enums import Codec
from subspec.config.schema import Placement, PlantedTargetConfig
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.errors import SubspecError
from subspec.levels.build import SubstituteBuilder
from subspec.offload import loader
from subspec.offload.loader import load_streamed
from subspec.planning.plan import plan_run
from subspec.quant.hqq import HqqFormat, hqq_quantizer
from subspec.session import assemble_streamed
from subspec.targets.load import open_source
from tests.codec import test_coded_layer as coded_layers
from tests.codec.test_coded_layer import ROOM, assert_exact, assert_layer
from tests.helpers.planning import DRAFTS, fewer_layers, settings
from tests.helpers.tiny import tiny_model
from tests.offload.test_streaming import DEVICES, PROMPT, ModelSource, plan_for

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
NO_DRAFT = {Codec.none: DRAFTS["none"], Codec.substitute: DRAFTS["subspec"]}
VOCABULARY, SMALLER = 1003, 331  # no multiples of anything; a layer's buffer holds less than the larger one
QUANTS = {"hqq 4": {}, "hqq 8": {"bits": 8}, "hqq 3": {"bits": 3}, "higgs": {"quant": "higgs"}}


def tiny(device="cpu", family="qwen2", **options):
    shape = {"layers": 2, "hidden_size": 128, "intermediate_size": 192, "vocab_size": VOCABULARY}
    return tiny_model(family, **{**shape, **options}).to(torch.device(device), torch.bfloat16)


def builder_of(model, quant="hqq 4"):
    return coded_layers.builder_of(model, **QUANTS[quant], head=True)


def load_coded(model, *, resident=(1,), slots=2, quant="hqq 4", planned=ROOM, layer_bytes=ROOM, place="device"):
    """With the LM head coded."""
    plan = plan_for(resident, slots, Placement(place), Codec.substitute, layer_bytes)
    object.__setattr__(plan, "coded_head_bytes", planned)
    return load_streamed(ModelSource(model), plan, model.device, builder=builder_of(model, quant))


def load_plain(model, resident=(1,)):
    return load_streamed(ModelSource(model), plan_for(resident), model.device, builder=None)


def assert_head(coded, weight):
    """Every slice, bit for bit."""
    rows = [coded.restore(number).clone() for number in range(len(coded.code.parts))]
    assert torch.equal(torch.cat(rows).view(torch.int16), weight.data.view(torch.int16))


@given(st.integers(1, 5000), st.integers(1, 64).map(lambda k: 64 * k), st.integers(1, 300))
def test_slices_are_all_rows_and_fit(vocabulary, hidden, rows):
    room = 2 * hidden * (ROW_MULTIPLE + rows)
    slices = slice_rows(vocabulary, hidden, room)
    assert [row for first, count in slices for row in range(first, first + count)] == list(range(vocabulary))
    assert all(2 * hidden * count <= room and count > 0 for _, count in slices)
    assert all(count % ROW_MULTIPLE == 0 for _, count in slices[:-1])
    assert len(slices) == -(-vocabulary // (room // (2 * hidden) // ROW_MULTIPLE * ROW_MULTIPLE))
    with pytest.raises(ValueError, match=r"32 rows .* do not fit"):
        slice_rows(vocabulary, hidden, 2 * hidden * ROW_MULTIPLE - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("quant", "rows"), [("hqq 4", 64), ("hqq 4", 331), ("hqq 4", 1000), ("hqq 8", 64), ("hqq 3", 64), ("higgs", 331)]
)
def test_the_head_is_rebuilt_bit_for_bit(quant, rows, device):
    model = tiny(device, vocab_size=SMALLER)
    weight = model.lm_head.weight
    near = weight.clone()
    weight[7, 3], weight[330, 127], weight[200, 5] = float("nan"), -0.0, 1e30  # whatever a checkpoint holds
    codes = []
    head = builder_of(model, quant).build_head(near, codes)
    room = 2 * 128 * rows
    code = encode_head(weight, codes[0], head, room)
    assert len(code.parts) == {64: 6, 331: 2, 1000: 1}[rows]  # 331: 320 rows and a rest, cut into equal ones
    assert code.nbytes == code.flat.numel()
    padding = 2 * 256 * len(code.parts)  # at most, behind starts and stream of each
    assert 0 <= code.nbytes - code.bits_per_weight * weight.numel() / 8 < padding
    buffer = torch.full((room,), 77, dtype=torch.uint8, device=weight.device)
    assert_head(CodedHead(code, head, buffer), weight)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_those_of_the_exact_head(device):
    model = tiny(device)
    weight, codes = model.lm_head.weight, []
    head, room = builder_of(model).build_head(weight, codes), 2 * 128 * 96
    buffer = torch.zeros(room, dtype=torch.uint8, device=weight.device)
    coded = CodedHead(encode_head(weight, codes[0], head, room), head, buffer)
    for rows in (1, 5, 48):
        hidden = torch.randn(rows, 128, device=weight.device).bfloat16()
        logits, expected = coded.logits(hidden), model.lm_head(hidden)
        assert logits.shape == expected.shape == (rows, VOCABULARY)
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(("quant", "sampling"), [("hqq 8", Sampling()), ("higgs", Sampling(0.8, top_p=0.95))])
def test_text_by_a_coded_head_is_the_plain_text(quant, sampling):
    model = tiny()
    plain, coded = load_plain(model), load_coded(model, quant=quant)
    texts, seeds = [], 1 if sampling.greedy else 2
    for loaded in (plain, coded):
        engine = Engine(loaded.target, max_length=64, prefill_chunk=4, sampling=sampling)
        texts.append([engine.generate(PROMPT, max_new_tokens=5, seed=s).token_ids for s in range(seeds)])
    assert texts[0] == texts[1]
    assert sampling.greedy or texts[0][0] != texts[0][1]
    assert_exact(coded, model)  # layers that are decoded after the head
    assert_head(coded.target.coded_head, model.lm_head.weight)
    plain.close()
    coded.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("quant", "planned"),
    [("hqq 4", ROOM), *(pytest.param(quant, 0, marks=pytest.mark.slow) for quant in ("hqq 4", "higgs"))],
)
def test_coded_speculation_passes_the_audit(device, quant, planned):
    """With a coded head and, in slow tests, with an exact one."""
    pytest.importorskip("triton")
    from subspec.levels.captured_draft import CapturedDraft
    from subspec.levels.model import Attention

    model = tiny(device)
    loaded = load_coded(model, quant=quant, planned=planned)
    draft = CapturedDraft(loaded.substitute, attention=Attention(splits=4))
    engine = Engine(loaded.target, draft, Beam(4, 3), max_length=96)
    result = engine.generate(PROMPT, max_new_tokens=60 if device == "cuda" else 4)
    assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert Auditor(loaded.target).audit(PROMPT, result.token_ids).mismatch == 0
    loaded.close()


def test_nothing_else_holds_the_exact_head():
    model = tiny()
    loaded = load_coded(model, place="host")
    target, substitute = loaded.target, loaded.substitute
    assert target.model.lm_head.weight.is_meta
    assert target.dtype == torch.bfloat16
    assert target.vocab_size == substitute.vocab_size == VOCABULARY
    assert substitute.head is None
    assert substitute.draft_head is not None
    code = target.coded_head.code
    assert loaded.head_bits_per_weight == code.bits_per_weight < 16
    assert len(code.parts) == 2
    assert target.coded_head._weights[0].untyped_storage().data_ptr() == target.restorer.buffer.data_ptr()
    loaded.close()


@pytest.mark.parametrize("tie", [False, True])
def test_a_head_that_is_not_to_be_coded_stays_as_it_is(tie):
    model = tiny(tie=tie)
    loaded, plain = load_coded(model, planned=0), load_plain(model)
    assert loaded.target.coded_head is None
    assert loaded.head_bits_per_weight is None
    assert loaded.substitute.draft_head is not None
    assert torch.equal(loaded.substitute.head, model.lm_head.weight)
    substitute = loaded.substitute
    assert (substitute.head.data_ptr() == substitute.embedding.data_ptr()) == tie
    texts = [Engine(one.target, max_length=64).generate(PROMPT, max_new_tokens=6).token_ids for one in (loaded, plain)]
    assert texts[0] == texts[1]
    if not tie:  # the draft is the same whether its head codes or not: only made at another time
        drafts = [own.substitute.draft_head.tensors for own in (loaded, load_coded(model))]
        for one, other in zip(*drafts, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    loaded.close()
    plain.close()


def test_a_head_larger_than_planned_takes_the_place_of_resident_layers():
    model = tiny(layers=3)
    free = load_coded(model, resident=(0, 1, 2))
    sizes = [layer.nbytes for layer in free.target.restorer.layers.values()]
    head = free.target.coded_head.code.nbytes
    free.close()
    left = 4 * max(sizes) - sum(sizes)  # with a ring of one slot, which is empty
    for planned, all_stay in ((head - left, True), (head - left - 1, False)):
        loaded = load_coded(model, resident=(0, 1, 2), slots=1, planned=planned, layer_bytes=max(sizes))
        target = loaded.target
        assert (len(target.restorer.resident) == 3) == all_stay
        ring = 0 if all_stay else target.streamer.slots[0].numel()
        held = sum(flat.numel() for flat in target.restorer.resident.values()) + ring
        assert held + target.coded_head.code.nbytes <= 4 * max(sizes) + planned
        loaded.close()


def test_the_exact_head_is_gone_before_layers_are_loaded(monkeypatch):
    """Quantized and coded first of all, and forgotten."""
    model, there = tiny(), []
    fuse, exact = SubstituteBuilder.build_layer, []
    original = loader.encode_head

    def encode(weight, *arguments):
        exact.append(weight.data_ptr())
        return original(weight, *arguments)

    def fused(self, *arguments, **options):
        there.append(len(exact))
        return fuse(self, *arguments, **options)

    monkeypatch.setattr(loader, "encode_head", encode)
    monkeypatch.setattr(SubstituteBuilder, "build_layer", fused)
    load_coded(model).close()
    assert there == [1, 1]
    assert exact == [model.lm_head.weight.data_ptr()]


@pytest.mark.parametrize("shape", ["tiny", pytest.param("tiny_tied", marks=pytest.mark.slow)])
def test_a_planned_run_of_a_planted_target(shape, tmp_path, monkeypatch):
    """From the configuration to the record; a tied table is needed as it is."""
    pytest.importorskip("triton")
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(format, "CHUNK", 32)  # shorter ones end in more padding than the estimate has room for
    fewer_layers(monkeypatch, shape, 2, vocab_size=VOCABULARY)
    planted = PlantedTargetConfig(name=f"planted_{shape}", shape=shape)
    options = {"quant": {"modules": ["attention", "mlp", "lm_head"]}, "decoding": {"max_length": 128}}
    config = settings(1.0, codec=Codec.substitute, tree=(3, 3), resident_layers=1, **options)
    config = replace(config, target=planted)
    source = open_source(planted, torch.bfloat16, CPU, note=lambda text: None)
    texts, reports = [], []
    for kind in (Codec.none, Codec.substitute, Codec.substitute):
        settings_of = replace(config, offload=replace(config.offload, codec=kind), draft=NO_DRAFT[kind])
        plan = plan_run(settings_of, source.config, link_gb_per_s=25.0, host_free=None, device=None)
        assembly = assemble_streamed(settings_of, source, plan, CPU, note=lambda text: None)
        engine = Engine(assembly.target, max_length=64)
        texts.append(engine.generate(PROMPT, max_new_tokens=2).token_ids)
        facts, code = assembly.facts(), getattr(assembly.target, "coded_head", None)
        assert (code is None) == (kind is Codec.none or shape == "tiny_tied")
        assert ("coded_head_bits_per_weight" in facts) == (code is not None)
        if assembly.quant is not None:
            reports.append((assembly.quant.modules, assembly.quant.details["cache"]["read"]))
        if code is not None:
            # The begins of chunks, which are short here.
            begins = sum(part.shape.numel() for part in code.code.parts) // 32 * 4
            assert code.code.nbytes <= plan.coded_head_bytes + begins
            assert_head(code, source.shared(CPU)["lm_head.weight"])
        assembly.close()
    assert texts[0] == texts[1] == texts[2]
    modules = 7 * source.config.num_hidden_layers + 1
    assert reports == [(modules, 0), (modules, modules)]  # the draft's head, made first, is kept, too


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_reserved_holds_the_default_models_table(default_target, bits):
    table = default_target.model.lm_head.weight.bfloat16()
    quantizer = hqq_quantizer(bits)
    size = 0
    for rows in table.split(8192):
        codes = quantizer.quantize(rows)
        coded = encode(rows, codes, codes.margin)
        size += coded.starts.nbytes + coded.stream.nbytes
    reserved = HqqFormat(bits).coded_bits + MORE_FOR_HEADS
    assert reserved - 0.4 < 8 * size / table.numel() < reserved


def test_a_restorer_that_errs_in_the_head_is_noticed(monkeypatch):
    def wrong(out, coded, linear, rows):
        kernel.restore_into(out, coded, linear, rows)
        if out.shape[0] == 11 and rows.first == 320:  # the last slice
            out.view(-1)[3] += 1

    model, codes = tiny(vocab_size=SMALLER), []
    head = builder_of(model).build_head(model.lm_head.weight, codes)
    monkeypatch.setattr(coded_layer, "restore_into", wrong)
    with pytest.raises(SubspecError, match=r"lm_head\.weight was not rebuilt.*offload\.codec=none"):
        encode_head(model.lm_head.weight, codes[0], head, 2 * 128 * 64)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS)
def test_a_soak_of_passes_between_layers_and_the_head(quant):
    """Layers and the head are decoded in turn into one buffer while drafts' work runs beside them."""
    model = tiny("cuda", layers=4, vocab_size=5003)
    loaded = load_coded(model, resident=(2,), quant=quant)
    target = loaded.target
    assert len(target.coded_head.code.parts) > 1
    hidden = torch.randn(6, 128, device="cuda").bfloat16()
    expected = target.logits(hidden)
    noise, side = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for turn in range(400):
        with torch.cuda.stream(side):
            noise = noise @ noise.softmax(-1)
        target.streamer.rewind()
        for index, layer in enumerate(model.model.layers):
            if turn % 20 == 0:
                assert_layer(target, index, layer)
            else:
                with target.layer(index):
                    pass
        assert torch.equal(target.logits(hidden), expected), turn
    assert_exact(loaded, model)
    assert_head(target.coded_head, model.lm_head.weight)
    loaded.close()


class Copies(ModelSource):
    """Hands out copies, as a checkpoint does."""

    def shared(self, device):
        return {name: tensor.clone() for name, tensor in super().shared(device).items()}


@pytest.mark.gpu
def test_the_exact_head_is_not_on_the_device_afterwards():
    device = torch.device("cuda")
    model = tiny(device, vocab_size=40_000, hidden_size=512, intermediate_size=1024)
    exact, sizes, bits = 2 * model.lm_head.weight.numel(), {0: [], ROOM: []}, 16.0
    for planned in (0, ROOM, 0, ROOM, 0, ROOM):  # the first ones leave what libraries keep
        gc.collect()
        plan = plan_for((), 2, codec=Codec.substitute, layer_bytes=ROOM)
        object.__setattr__(plan, "coded_head_bytes", planned)
        before = torch.cuda.memory_allocated()
        loaded = load_streamed(Copies(model), plan, device, builder=builder_of(model))
        sizes[planned].append(torch.cuda.memory_allocated() - before)
        bits = loaded.head_bits_per_weight or bits
        loaded.close()
        del loaded
    # What an earlier test left may go in between, and makes a size smaller; nothing makes one larger.
    saved = max(sizes[0][1:]) - max(sizes[ROOM][1:])
    assert 6 < bits < 8
    assert saved == pytest.approx(exact * (16 - bits) / 16, rel=0.15)
