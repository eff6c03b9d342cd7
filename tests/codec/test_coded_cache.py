"""Coded layers on disk: a second start reads no exact layer, rebuilds the same bits, and trusts nothing unchecked."""

import errno
import gc
import hashlib
import json
import shutil
import weakref

import pytest
import torch
from filelock import FileLock

from subspec.codec import coded_cache, coded_load, format
from subspec.codec.coded_cache import LENGTH_BYTES, CodedCache, coded_folder
from subspec.codec.restore import PieceRestorer
from subspec.config.enums import Codec
from subspec.offload import loader
from subspec.offload.loader import load_streamed
from subspec.quant.grids import load_grid
from subspec.quant.hadamard import Rotation
from subspec.quant.higgs_weight import HiggsCodes
from subspec.quant.quantized_weight import Codes, HqqCodes
from subspec.store import layer_files
from subspec.store.quantized_cache import CachedCodes
from subspec.store.substitutes import SubstituteStore, cache_folder
from subspec.targets.layer_bytes import parameter_views
from subspec.utils.checksum import checksum
from subspec.utils.disk import MANIFEST
from tests.codec.test_coded_layer import ROOM, assert_exact, fuser_of
from tests.helpers.tiny import tiny_model
from tests.offload.test_streaming import ModelSource, plan_for

CPU = torch.device("cpu")
LAYERS = 2
LINEARS = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LINEARS += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and threads of busy machines wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    """The torch decoder takes a step per weight of a chunk, whatever the matrix; the CUDA one knows its own length."""
    if request.node.get_closest_marker("gpu") is None and "format" not in request.node.name:
        monkeypatch.setattr(format, "CHUNK", 32)


def tiny(seed=0, family="qwen2"):
    model = tiny_model(
        family, layers=LAYERS, hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, seed=seed
    )
    return model.to(torch.bfloat16)


@pytest.fixture
def model():
    return tiny()


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


class Start:
    """A start of a coded target from and to folders under ``root``."""

    def __init__(self, root):
        self.root, self.folder, self.substitute = (
            root,
            root / "substitutes" / "coded",
            root / "substitutes" / "key",
        )

    def __call__(self, model, *, resident=(1,), device=CPU, **options):
        self.notes, self.source = [], Counting(model)
        quantizer = CachedCodes(HqqCodes(), SubstituteStore(self.substitute, note=self.notes.append))
        self.fuser = fuser_of(model)
        self.fuser.quantizer = quantizer
        plan = plan_for(resident, 2, codec=Codec.substitute, layer_bytes=ROOM)
        cache = CodedCache(self.folder, quantizer, LINEARS, note=self.notes.append, **options)
        with quantizer, cache:
            loaded = load_streamed(self.source, plan, device, fuser=self.fuser, coded=cache)
        assert_exact(loaded, model)
        self.resident = sorted(loaded.decoder.decoding.resident)
        self.report = cache.report()
        assert quantizer.store.read + quantizer.store.quantized == 7 * LAYERS == self.fuser.modules
        loaded.close()
        return cache.read, cache.coded


@pytest.fixture
def start(tmp_path):
    return Start(tmp_path)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("resident", [(1,), (), (0, 1)])
def test_a_second_start_reads_no_exact_layer_and_codes_nothing(start, model, resident, device, monkeypatch):
    device = torch.device(device)
    model = model.to(device)
    assert start(model, resident=resident, device=device) == (0, LAYERS)
    assert start.source.asked == list(range(LAYERS))
    sizes = start.fuser.weights, start.fuser.stored_bytes, start.fuser.bits
    files = [*(f"layer_{index:03}.coded" for index in range(LAYERS)), MANIFEST]
    assert sorted(file.name for file in start.folder.iterdir()) == files
    monkeypatch.setattr(coded_load, "encode_layer", lambda *_: pytest.fail("coded again"))
    monkeypatch.setattr(HqqCodes, "codes", lambda *_: pytest.fail("quantized again"))
    assert start(model, resident=resident, device=device) == (LAYERS, 0)
    assert start.source.asked == []
    assert start.resident == list(resident)
    assert start.notes == []
    assert (start.fuser.weights, start.fuser.stored_bytes, start.fuser.bits) == sizes
    assert start.report == {"folder": str(start.folder), "read": LAYERS, "coded": 0, "trouble": None}


def test_a_layer_is_dropped_before_the_next_is_read(start, model):
    start(model)
    parameters = dict(model.model.layers[0].named_parameters())
    layer = sum(parameter.nbytes for parameter in parameters.values())
    vectors = sum(parameter.nbytes for parameter in parameters.values() if parameter.dim() == 1)
    shared = (
        LAYERS - 1
    ) * vectors  # of earlier layers: on a CPU the substitute's norms are the target's own tensors
    assert layer <= start.source.peak <= layer + shared


def test_a_layer_is_read_into_its_own_place(start, model, monkeypatch):
    """No second copy: the buffers that are pinned are the ones the files were read into."""
    start(model, resident=())
    read = []
    original = CodedCache._load

    def watched(cache, index):
        kept = original(cache, index)
        read.append(kept.buffer.tensor.data_ptr())
        return kept

    made = []
    monkeypatch.setattr(CodedCache, "_load", watched)
    monkeypatch.setattr(loader.PinnedBuffer, "lock", lambda buffer: pytest.fail("nothing is locked on a CPU"))
    streamed = loader.StreamedTarget.__init__

    def seen(decoder, model, exact, flats, *rest):
        made.extend(flat.data_ptr() for flat in flats.values())
        streamed(decoder, model, exact, flats, *rest)

    monkeypatch.setattr(loader.StreamedTarget, "__init__", seen)
    start(model, resident=())
    assert made == read
    assert len(made) == LAYERS


def test_what_was_read_ahead_and_not_asked_for_is_let_go(start, model, monkeypatch):
    """As of a layer that quant.skip_layers keeps exact this time: it would be in memory as long as the run."""
    start(model)
    quantizer = CachedCodes(HqqCodes(), SubstituteStore(start.substitute))
    cache = CodedCache(start.folder, quantizer, LINEARS)
    read = []
    original = CodedCache._load

    def watched(cache, index):
        kept = original(cache, index)
        read.append((index, weakref.ref(kept.buffer)))
        return kept

    monkeypatch.setattr(CodedCache, "_load", watched)
    with quantizer, cache:
        assert quantizer.store.stored("0.mlp.up_proj") is not None
        assert cache.find(0) is not None
    assert [index for index, _ in read] == [0, 1]
    gc.collect()
    assert [buffer() for _, buffer in read] == [None, None]
    assert not quantizer.store._ahead


def test_whoever_changes_the_code_raises_the_format():
    """A file of an earlier version must not be found under this one's key: its bits would mean something else."""
    number = torch.arange(8 * 128).view(8, 128)
    weight = ((number * 7919 % 8001 - 4000) / 2**16).bfloat16()
    weight.view(-1)[5::97] = torch.tensor(float("nan"))
    q = (number * 31 % 16).to(torch.uint8)
    codes = Codes(q, torch.full((8, 2), 2.0**-7), torch.full((8, 2), 7.5), 64)
    rotation = Rotation.of(128, 64)
    scale = torch.full((8, 2), 2.0**-5, dtype=torch.float16)
    higgs = HiggsCodes((number * 37 % 256).to(torch.uint8)[:, :64], scale, load_grid(4, 2), 64, rotation)
    sums = [
        checksum(coded.starts, coded.stream)
        for coded in (format.encode(weight, codes, 2.0**-8), format.encode(weight, higgs, 0.25))
    ]
    assert {coded_cache.FORMAT: sums} == {2: [-5549655439637921423, 676359563469398461]}


# ------------------------------------------------------------------------------------------- what may have changed


def flip(file, at=-40):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: flip(file),
        lambda file: flip(file, 5000),
        lambda file: flip(file, -1),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
    ],
)
def test_a_damaged_layer_is_coded_again_and_said(start, model, damage):
    start(model)
    damage(start.folder / "layer_001.coded")
    assert start(model) == (1, 1)
    assert start.source.asked == [1]
    assert len(start.notes) == 1
    assert "coded target's layer 1 is damaged" in start.notes[0]
    assert start.notes[0].endswith("coding it again")
    assert start(model) == (2, 0)


def vouch(folder, name, content):
    """Another content, and a manifest that agrees with it."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("tail", [b"", b"{}", b"[1]", b'{"parts": 3}', "other field"])
def test_a_file_of_another_layout_is_coded_again(start, model, tail):
    start(model)
    file = start.folder / "layer_000.coded"
    content = file.read_bytes()
    length = int.from_bytes(content[-LENGTH_BYTES:], "little")
    code, text = content[: -LENGTH_BYTES - length], content[-LENGTH_BYTES - length : -LENGTH_BYTES]
    if tail == "other field":
        tail = json.dumps(json.loads(text) | {"entropy": True}).encode()
    vouch(start.folder, file.name, code + tail + len(tail).to_bytes(LENGTH_BYTES, "little"))
    assert start(model) == (1, 1)
    assert "layer 0 is damaged" in start.notes[0]
    vouch(start.folder, file.name, b"x" * 5)
    assert start(model) == (1, 1)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', "{", '{"files": {"layer_000.coded": {"bytes": null, "sha256": ""}}}']
)
def test_a_damaged_manifest_costs_coding(start, model, text):
    start(model)
    (start.folder / MANIFEST).write_text(text)
    assert start(model) == (0, LAYERS)
    assert "cannot be read" in start.notes[0]
    assert start(model) == (LAYERS, 0)


def test_without_its_substitute_a_code_is_of_no_use(start, model):
    start(model)
    shutil.rmtree(start.substitute)
    assert start(model) == (0, LAYERS)
    assert start.source.asked == list(range(LAYERS))
    assert start.notes == []
    assert start(model) == (LAYERS, 0)


def test_exact_parameters_in_another_order_are_coded_again(start, model):
    """Decoding copies what is not coded in one run: a layer laid out otherwise than the others would swap its norms."""
    start(model, resident=())
    file = start.folder / "layer_001.coded"
    content = file.read_bytes()
    length = int.from_bytes(content[-LENGTH_BYTES:], "little")
    code, meaning = (
        bytearray(content[: -LENGTH_BYTES - length]),
        json.loads(content[-LENGTH_BYTES - length : -LENGTH_BYTES]),
    )
    exact = {name: torch.Size(shape) for name, shape in meaning["exact"].items()}
    turned = dict(reversed(exact.items()))
    before = parameter_views(torch.frombuffer(bytearray(code), dtype=torch.uint8), exact, torch.bfloat16)
    after = parameter_views(torch.frombuffer(code, dtype=torch.uint8), turned, torch.bfloat16)
    for name, view in after.items():
        view.copy_(before[name])
    text = json.dumps(meaning | {"exact": turned}).encode()
    vouch(start.folder, file.name, bytes(code) + text + len(text).to_bytes(LENGTH_BYTES, "little"))
    assert start(model, resident=()) == (1, 1)
    assert start.notes == ["the cached code of layer 1 is laid out otherwise: coding it again"]
    assert start(model, resident=()) == (2, 0)


def test_the_codes_of_another_substitute_decode_nothing(start, model, monkeypatch):
    start(model)
    shutil.rmtree(start.substitute)
    mine, start.folder = start.folder, start.root / "elsewhere"
    start(tiny(seed=1))
    start.folder = mine
    monkeypatch.setattr(coded_load, "PieceRestorer", lambda *_: pytest.fail("decoded with other codes"))
    assert start(model) == (0, LAYERS)
    assert sum("layer 0 is of another substitute: coding it again" in note for note in start.notes) == 1


@pytest.mark.parametrize(
    "name", ["mlp.down_proj.weight", "input_layernorm.weight", "self_attn.q_proj.weight"]
)
def test_other_weights_behind_the_same_name_are_noticed(start, model, name):
    """As when a checkpoint is replaced under its path with its dates kept."""
    start(model)
    parameter = model.get_parameter(f"model.layers.1.{name}")
    with torch.no_grad():
        parameter.view(-1)[7] += 1
    assert start(model) == (1, 1)
    assert "the cached code of layer 1 is of other weights: coding it again" in start.notes
    assert start(model) == (2, 0)


def test_a_device_that_rebuilds_something_else_is_noticed(start, model, monkeypatch):
    start(model)

    class Wrong(PieceRestorer):
        def __call__(self, flat):
            super().__call__(flat)
            self.pieces[0].out.view(-1)[300] += 1

    monkeypatch.setattr(coded_load, "PieceRestorer", Wrong)
    assert start(model) == (0, LAYERS)  # coded anew, which proves itself
    assert "layer 0 is not rebuilt to what it was made from" in start.notes[0]


# ------------------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_caching_not_the_run(start, model, monkeypatch, number):
    write = layer_files.replace_file

    def full(file, *content):
        if file.name == "layer_001.coded":
            raise OSError(number, "No space left on device")
        write(file, *content)

    monkeypatch.setattr(layer_files, "replace_file", full)
    assert start(model) == (0, LAYERS)
    assert len(start.notes) == 1
    assert "the coded target is not cached: the disk" in start.notes[0]
    assert not start.folder.exists()
    assert start.substitute.exists()


def test_no_room_is_noticed_before_writing(start, model, monkeypatch):
    monkeypatch.setattr(layer_files, "free_space", lambda folder: 1_099_000_000)
    assert start(model, expected_bytes=1_000_000_000) == (0, LAYERS)
    assert "the coded target is not cached: it needs 1.1 GB" in start.notes[0]
    assert not start.folder.exists()


def test_a_folder_that_cannot_be_made_ends_caching_not_the_run(start, model):
    (start.root / "file").write_text("")
    start.folder = start.root / "file" / "coded"
    assert start(model) == (0, LAYERS)
    assert len(start.notes) == 1
    assert "not cached" in start.notes[0]


def test_what_a_killed_process_left_and_cannot_be_removed_fails_no_run(start, model):
    left = start.folder / "layer_000.coded.123"
    left.mkdir(parents=True)  # as a file of another user in a shared cache: unlinking it is refused
    assert start(model) == (0, LAYERS)
    assert start(model) == (LAYERS, 0)


def test_nobody_waits_for_another_process_that_writes_here(start, model):
    start.folder.parent.mkdir(parents=True)
    with FileLock(start.folder.parent / "coded.lock"):
        assert start(model) == (0, LAYERS)
    assert start.notes == ["the coded target is not cached: another process is preparing it"]
    assert start(model) == (0, LAYERS)
    assert start(model) == (LAYERS, 0)


def test_what_another_process_wrote_meanwhile_is_found(start, model, tmp_path):
    start(model)
    cache = CodedCache(tmp_path / "later", None, LINEARS)
    assert not cache.has(0)
    shutil.copytree(start.folder, tmp_path / "later")
    assert cache.has(0)
    cache.close()


def test_an_interrupted_start_keeps_what_was_written(start, model, monkeypatch):
    encode = coded_load.encode_layer
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(coded_load, "encode_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(model)
    monkeypatch.setattr(coded_load, "encode_layer", encode)
    assert start(model) == (1, 1)


def test_off_writes_nothing(start, model):
    start.folder = None
    assert start(model) == (0, LAYERS)
    assert start.report == {"folder": None, "read": 0, "coded": LAYERS, "trouble": "quant.cache=off"}


def test_the_limit_counts_coded_targets_too(start, model, monkeypatch):
    import os
    import time

    monkeypatch.setenv("SUBSPEC_CACHE_GIB", "0")
    start(model)
    assert start.folder.exists()  # in use within the hour
    assert start.substitute.exists()
    for folder in (start.folder, start.substitute):
        os.utime(folder / MANIFEST, (time.time() - 7200,) * 2)
    other = start.folder
    start.folder, start.substitute = (
        start.root / "substitutes" / "coded2",
        start.root / "substitutes" / "key2",
    )
    start(model)
    assert not other.exists()
    assert start.folder.exists()
    assert any("coded targets" in note for note in start.notes)


def test_every_fact_makes_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    facts = {"target": "org/name@abc", "dtype": "torch.bfloat16", **HqqCodes().facts}
    folders = {cache_folder(facts), coded_folder(facts, LINEARS), coded_folder(facts, LINEARS[:4])}
    folders |= {coded_folder({**facts, name: "other"}, LINEARS) for name in facts}
    monkeypatch.setattr(coded_cache, "FORMAT", coded_cache.FORMAT + 1)
    folders.add(coded_folder(facts, LINEARS))
    assert len(folders) == 3 + len(facts) + 1
    assert {folder.parent for folder in folders} == {tmp_path / "substitutes"}
