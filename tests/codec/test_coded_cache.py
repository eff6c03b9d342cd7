"""Coded layers on disk: a second start reads no exact layer, restores the same bits, and trusts nothing unchecked."""

import errno
import json
import shutil
import weakref
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from subspec.codec import coded_load, format
from subspec.codec.coded_cache import LENGTH_BYTES, CodedCache
from subspec.codec.restore import Restorer
from subspec.config.enums import Codec
from subspec.config.schema import Cache
from subspec.decoding.target_model import TargetModel
from subspec.errors import SubspecError
from subspec.offload import loader
from subspec.offload.disk import measure_disk
from subspec.offload.loader import load_streamed
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import Rotation
from subspec.quant.hqq import HqqFormat, hqq_quantizer
from subspec.quant.integers import QuantizedIntegers
from subspec.quant.pairs import QuantizedPairs
from subspec.store import store as stores
from subspec.store.substitutes import CachedQuantizer, SubstituteStore
from subspec.targets.layer_bytes import parameter_views
from subspec.utils.checksum import checksum
from subspec.utils.disk import MANIFEST
from tests.codec.test_coded_layer import ROOM, assert_exact, builder_of, text_of
from tests.codec.test_coded_layer import tiny as larger
from tests.helpers.tiny import tiny_model
from tests.offload.test_streaming import DEVICES, ModelSource, plan_for
from tests.store.test_store import vouch

pytestmark = pytest.mark.usefixtures("quick")
CPU = torch.device("cpu")
LAYERS, FACTS = 2, {"target": "tiny"}
LINEARS = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LINEARS += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def tiny(seed=0):
    shape = {"hidden_size": 64, "intermediate_size": 64, "heads": 2, "kv_heads": 1}
    return tiny_model("qwen2", layers=LAYERS, seed=seed, **shape).to(torch.bfloat16)


class Counting(ModelSource):
    """Hands out copies, and knows how many bytes of them are alive."""

    def __init__(self, model):
        super().__init__(model)
        self.asked, self.alive, self.peak = [], 0, 0

    def layer(self, index, device):
        self.asked.append(index)
        tensors = {name: tensor.clone() for name, tensor in super().layer(index, device).items()}
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return tensors

    def sample(self, index):
        return {n: t if t.dim() == 1 else t[:1] for n, t in super().layer(index, "cpu").items()}

    def _free(self, size):
        self.alive -= size


def loaded_of(source, on_disk=(), resident=(1,), note=pytest.fail, **options):
    """A coded target, and the stores of its substitute and of its code."""
    model, builder = source.model, builder_of(source.model)
    plan = plan_for(resident, 2, codec=Codec.substitute, layer_bytes=ROOM, disk=on_disk)
    with SubstituteStore(FACTS, note=note) as substitute:
        builder.quantizer = CachedQuantizer(hqq_quantizer(), substitute)
        with CodedCache(FACTS, builder.quantizer, LINEARS, note=note, **options) as coded:
            given = {"builder": builder, "coded": coded, "note": lambda text: None}
            return load_streamed(source, plan, model.device, **given), substitute, coded


class Start:
    """Starts of a coded target; a start returns how many layers it read, and how many it coded."""

    def __init__(self):
        with SubstituteStore(FACTS) as substitute, CodedCache(FACTS, None, LINEARS) as coded:
            self.substitute, self.folder = substitute.folder, coded.folder

    def __call__(self, model, *, resident=(1,), **options):
        self.notes, self.source = [], Counting(model)
        loaded, store, cache = loaded_of(self.source, resident=resident, note=self.notes.append, **options)
        assert_exact(loaded, model)
        self.builder = loaded.builder
        assert sorted(loaded.target.restorer.resident) == list(resident)
        assert store.read + store.made == 7 * LAYERS == self.builder.modules
        self.report = cache.report()
        loaded.close()
        return cache.read, cache.made


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))


@pytest.fixture
def start():
    return Start()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folders that a first start leaves; every test that begins with a second start has a copy."""
    root = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPEC_CACHE", str(root))
        patch.setattr(format, "CHUNK", 16)
        start = Start()
        assert start(tiny()) == (0, LAYERS)
    layer = sum(parameter.nbytes for parameter in tiny().model.layers[0].parameters())
    vectors = sum(p.nbytes for p in tiny().model.layers[0].parameters() if p.dim() == 1)
    # A layer is dropped before the next is read; on a CPU the substitute's norms are the target's own tensors.
    assert layer <= start.source.peak <= layer + (LAYERS - 1) * vectors
    files = [*(f"layer_{index:03}.coded" for index in range(LAYERS)), MANIFEST]
    assert sorted(file.name for file in start.folder.iterdir()) == files
    start.counted = start.builder.weights, start.builder.stored_bytes, start.builder.bits
    return root, start


@pytest.fixture
def again(kept, start, tmp_path):
    """A start behind a first one."""
    shutil.copytree(kept[0] / "substitutes", tmp_path / "substitutes", dirs_exist_ok=True)
    return start


@pytest.mark.parametrize("resident", [(1,), (), (0, 1)])
def test_a_second_start_reads_no_exact_layer_and_codes_nothing(again, kept, resident, monkeypatch):
    """And each layer is read into its own place: the buffers of the feed are those that the files were read into."""
    monkeypatch.setattr(coded_load, "encode_layer", lambda *_: pytest.fail("coded again"))
    monkeypatch.setattr(HqqFormat, "quantize", lambda *_: pytest.fail("quantized again"))
    parse, adopt, read, adopted = CodedCache.parse, loader.PinnedMemory.adopt, [], []
    watched = lambda cache, content: read.append(content.tensor.data_ptr()) or parse(cache, content)  # noqa: E731
    kept_at = lambda *both: adopted.append(adopt(*both).data_ptr()) or adopt(*both)  # noqa: E731
    monkeypatch.setattr(CodedCache, "parse", watched)
    monkeypatch.setattr(loader.PinnedMemory, "adopt", kept_at)
    assert again(tiny(), resident=resident) == (LAYERS, 0)
    assert again.source.asked == []
    assert again.notes == []
    assert (again.builder.weights, again.builder.stored_bytes, again.builder.bits) == kept[1].counted
    assert again.report == {"folder": str(again.folder), "read": LAYERS, "coded": 0, "trouble": None}
    assert adopted == [pointer for index, pointer in enumerate(read) if index not in resident]


@pytest.mark.gpu
def test_a_second_start_on_a_card(start):
    model = tiny().to("cuda")
    assert start(model) == (0, LAYERS)
    assert start(model) == (LAYERS, 0)
    assert start.source.asked == start.notes == []


def test_every_change_of_the_code_raises_the_format():
    """A file of another version must not be found under this one's key: its bits would mean something else."""
    number = torch.arange(8 * 128).view(8, 128)
    weight = ((number * 7919 % 8001 - 4000) / 2**16).bfloat16()
    weight.view(-1)[5::97] = torch.tensor(float("nan"))
    q = (number * 31 % 16).to(torch.uint8)
    integers = QuantizedIntegers(q, torch.full((8, 2), 2.0**-7), torch.full((8, 2), 7.5), 64, 4)
    pairs, scale = (number * 37 % 256).to(torch.uint8)[:, :64], torch.full((8, 2), 2.0**-5).half()
    higgs = QuantizedPairs(pairs, scale, load_grid(4, 2), 64, Rotation.of(128, 64))
    sums = [
        checksum(coded.starts, coded.stream)
        for coded in (format.encode(weight, integers, 2.0**-8), format.encode(weight, higgs, 0.25))
    ]
    assert {CodedCache.format: sums} == {3: [-5549655439637921423, 676359563469398461]}


# ------------------------------------------------------------------------------------------- what may have changed


def rewrite(folder, name, change):
    """Change a file's bytes and layout, and have the manifest agree."""
    content = (folder / name).read_bytes()
    length = int.from_bytes(content[-LENGTH_BYTES:], "little")
    code, text = content[: -LENGTH_BYTES - length], content[-LENGTH_BYTES - length : -LENGTH_BYTES]
    code, text = change(bytearray(code), text)
    vouch(folder / name, bytes(code) + text + len(text).to_bytes(LENGTH_BYTES, "little"))


@pytest.mark.parametrize(
    "change",
    [
        lambda code, text: (code, b""),
        lambda code, text: (code, b"[1]"),
        lambda code, text: (code, b'{"nbytes": 3}'),
        lambda code, text: (code, json.dumps(json.loads(text) | {"parts": 3}).encode()),
        lambda code, text: (code, json.dumps(json.loads(text) | {"entropy": True}).encode()),
        lambda code, text: (code[:-4], text),
    ],
)
def test_a_file_of_another_layout_is_coded_again(again, change):
    rewrite(again.folder, "layer_000.coded", change)
    assert again(tiny()) == (1, 1)
    assert again.source.asked == [0]
    assert len(again.notes) == 1
    assert "layer_000.coded is damaged" in again.notes[0]
    assert again.notes[0].endswith("coding it again")
    assert again(tiny()) == (2, 0)


def test_a_damaged_file_is_coded_again(again):
    file = again.folder / "layer_001.coded"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    assert again(tiny()) == (1, 1)
    vouch(file, b"x" * 5)
    assert again(tiny()) == (1, 1)


def test_code_without_its_substitute_is_of_no_use(again):
    shutil.rmtree(again.substitute)
    assert again(tiny()) == (0, LAYERS)
    assert again.notes == []


def test_exact_parameters_in_another_order_are_coded_again(again):
    """What is not coded is copied in one run: a layer laid out otherwise than the others would swap its norms."""

    def turn(code, text):
        layout = json.loads(text)
        exact = {name: torch.Size(shape) for name, shape in layout["exact"].items()}
        turned = dict(reversed(exact.items()))
        source, target = (torch.frombuffer(content, dtype=torch.uint8) for content in (bytearray(code), code))
        before = parameter_views(source, exact, torch.bfloat16)
        for name, view in parameter_views(target, turned, torch.bfloat16).items():
            view.copy_(before[name])
        return code, json.dumps(layout | {"exact": turned}).encode()

    rewrite(again.folder, "layer_001.coded", turn)
    assert again(tiny(), resident=()) == (1, 1)
    assert again.notes == ["the cached code of layer 1 is laid out otherwise: coding it again"]


def test_the_codes_of_another_substitute_restore_nothing(again, monkeypatch):
    """As when the substitute was made again of other weights."""
    with SubstituteStore(FACTS, note=lambda text: None) as store:
        builder = builder_of(tiny(seed=1))
        builder.quantizer = CachedQuantizer(hqq_quantizer(), store)
        for index in range(LAYERS):
            builder.build_layer(ModelSource(tiny(seed=1)).layer(index, CPU), CPU, index=index)
    monkeypatch.setattr(coded_load, "Restorer", lambda *_: pytest.fail("restored with other codes"))
    assert again(tiny()) == (0, LAYERS)
    assert sum("layer 0 is of another substitute: coding it again" in note for note in again.notes) == 1


@pytest.mark.parametrize("name", ["mlp.down_proj.weight", "input_layernorm.weight"])
def test_other_weights_behind_the_same_name_are_noticed(again, name):
    """As when a checkpoint is replaced under its path with its dates kept."""
    model = tiny()
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}").view(-1)[7] += 1
    assert again(model) == (1, 1)
    assert "the cached code of layer 1 is of other weights: coding it again" in again.notes
    assert again(model) == (2, 0)


def test_a_device_that_restores_something_else_is_noticed(again, monkeypatch):
    class Wrong(Restorer):
        def __init__(self, restorations):
            super().__init__(restorations)
            self.first = restorations[0]

        def __call__(self, flat):
            super().__call__(flat)
            self.first.out.view(-1)[300] += 1

    monkeypatch.setattr(coded_load, "Restorer", Wrong)
    assert again(tiny()) == (0, LAYERS)  # coded anew, which proves itself
    assert "layer 0 is not rebuilt to what it was made from" in again.notes[0]


def test_an_interrupted_start_keeps_what_was_written(start, monkeypatch):
    encode, calls = coded_load.encode_layer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(coded_load, "encode_layer", interrupted)
    with suppress(KeyboardInterrupt):
        start(tiny())
    assert start(tiny()) == (1, 1)


def test_off_codes_at_every_start(again):
    assert again(tiny(), cache=Cache.off) == (0, LAYERS)
    assert again.report == {"folder": None, "read": 0, "coded": LAYERS, "trouble": "quant.cache=off"}


def test_other_linears_have_another_folder(start):
    assert CodedCache(FACTS, None, LINEARS[:4]).folder != start.folder
    assert CodedCache(FACTS, None, LINEARS[::-1]).folder == start.folder
    assert CodedCache(FACTS, None, LINEARS, cache=Cache.off).folder is None


# ------------------------------------------------------------------------------------- streamed from their files


def on_disk(model, **options):
    return loaded_of(ModelSource(model), (0,), **options)


@pytest.mark.parametrize("device", DEVICES)
def test_coded_layers_stream_from_their_files(device):
    model = larger(device=device)
    expected = text_of(TargetModel(model))
    for stored, resident, made in (((0, 2), (1,), 3), ((0, 2), (1,), 0), ((1,), (), 0)):
        loaded, _, coded = loaded_of(ModelSource(model), stored, resident)
        assert (coded.made, coded.read) == (made, 3 - made)
        target = loaded.target
        assert target.resident_layers == list(resident)
        assert [layer.index for layer in target.disk.layers] == list(stored)
        assert measure_disk(target.disk.layers, 2) > 0
        if made == 0:
            assert_exact(loaded, model)
        assert text_of(target) == expected
        assert target.facts()["disk"]["bytes_per_pass"] < target.streamed_bytes_per_pass
        loaded.close()


def test_code_is_checked_when_it_is_read_first(monkeypatch):
    """Against the checksum of the file that was written, or read while loading."""
    stored = loader._stored_code
    monkeypatch.setattr(
        loader, "_stored_code", lambda *given: [replace(layer, sha256="0" * 64) for layer in stored(*given)]
    )
    loaded, _, _ = on_disk(larger())
    with pytest.raises(SubspecError, match=r"layer_000\.coded gives other weights of layer 0 .* remove it"):
        text_of(loaded.target)
    loaded.close()


@pytest.mark.parametrize("full", ["asked", "found"])
def test_code_that_cannot_be_kept_ends_the_start_in_one_line(monkeypatch, full):
    write = stores.write_atomic

    def fails(path, *pieces, durable):
        if path.suffix == ".coded":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *pieces, durable=durable)

    if full == "found":
        monkeypatch.setattr(stores, "write_atomic", fails)
    else:
        monkeypatch.setattr(stores, "free_space", lambda folder: 10**6)
    with pytest.raises(SubspecError, match=r"keeps a coded target on disk: .*SUBSPEC_CACHE") as caught:
        on_disk(larger(), expected_bytes=10**7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("when", ["loading", "streaming"])
def test_a_file_that_goes_ends_in_one_line(monkeypatch, when):
    model = larger()
    if when == "loading":
        stored = loader._stored_code

        def removed(coding, coded):
            (coded.folder / "layer_000.coded").unlink()
            return stored(coding, coded)

        monkeypatch.setattr(loader, "_stored_code", removed)
        with pytest.raises(SubspecError, match=r"coded layer 0 .* is gone or cut off"):
            on_disk(model)
        return
    loaded, _, coded = on_disk(model)
    with (coded.folder / "layer_000.coded").open("r+b") as stream:
        stream.truncate(4096)
    with pytest.raises(SubspecError, match=r"layer_000\.coded .*(cut off|changed)"):
        text_of(loaded.target)
    loaded.close()
