"""The substitute's codes on disk: what comes back is bit for bit what was quantized, and nothing fails a run."""

import errno
import json
import shutil
import threading
import time

import pytest
import torch
from filelock import FileLock

from subspec.kernels import int4
from subspec.levels.build import LayerFuser, role_shapes
from subspec.quant.level_linear import Dense
from subspec.quant.quantized_weight import Codes, HqqCodes
from subspec.store import layer_files, substitutes
from subspec.store.quantized_cache import CachedCodes
from subspec.store.substitutes import SubstituteStore, cache_folder, fingerprint
from subspec.utils.disk import MANIFEST
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and threads of busy machines wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    options = {"layers": LAYERS, "hidden_size": 128, "heads": 4, "kv_heads": 2, "intermediate_size": 192}
    return tiny_model("qwen2", **options).to(torch.bfloat16)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "substitutes" / "key"


def build(model, folder, *, exact=(), expected_bytes=0, keep=frozenset()):
    """Fused layers, the cache that served them, and what it said."""
    notes = []
    kept = SubstituteStore(folder, expected_bytes=expected_bytes, note=notes.append)
    with CachedCodes(HqqCodes(), kept) as cache:
        fuser = LayerFuser(model.config, cache, kernel="int4_mma", keep_exact=keep)
        layers = [
            fuser.fuse(
                dict(layer.named_parameters()), CPU, exact=index in exact, index=index
            )
            for index, layer in enumerate(model.model.layers)
        ]  # fmt: skip
    return layers, cache.store, notes


def linears(layers):
    return [linear for layer in layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]


def assert_same(one, other):
    for a, b in zip(linears(one), linears(other), strict=True):
        if isinstance(a, Dense):
            assert torch.equal(a.weight, b.weight)
            continue
        assert torch.equal(a.weight.words, b.weight.words)
        assert torch.equal(a.weight.meta.view(torch.int16), b.weight.meta.view(torch.int16))


@pytest.fixture
def no_hqq(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("hqq was called")

    def arm():
        monkeypatch.setattr("hqq.core.quantize.Quantizer.quantize", refuse)
        monkeypatch.setattr(HqqCodes, "codes", refuse)

    return arm


def test_a_second_start_has_the_same_bits_without_hqq(model, folder, no_hqq):
    fresh, cache, notes = build(model, folder)
    assert (cache.read, cache.quantized, notes) == (0, 7 * LAYERS, [])
    plain, _, _ = build(model, None)
    assert_same(fresh, plain)
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"layer_{index:03}.safetensors" for index in range(LAYERS)),
        MANIFEST,
    ]
    no_hqq()
    again, cache, notes = build(model, folder)
    assert (cache.read, cache.quantized, notes) == (7 * LAYERS, 0, [])
    assert_same(again, fresh)
    assert cache.report() == {"folder": str(folder), "read": 21, "quantized": 0, "trouble": None}


def test_the_files_take_what_was_foreseen(model, folder):
    build(model, folder)
    shapes = role_shapes({name: p.shape for name, p in model.model.layers[0].named_parameters()})
    foreseen = LAYERS * sum(HqqCodes().stored_bytes(shape, "up_proj") for shape in shapes.values())
    taken = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert foreseen <= taken < foreseen + LAYERS * 4096  # headers and fingerprints


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
    ],
)
def test_a_damaged_layer_is_quantized_again_and_said(model, folder, damage, no_hqq):
    fresh, _, _ = build(model, folder)
    damage(folder / "layer_001.safetensors")
    again, cache, notes = build(model, folder)
    assert_same(again, fresh)
    assert (cache.read, cache.quantized) == (14, 7)
    assert len(notes) == 1
    assert "layer 1 is damaged" in notes[0]
    no_hqq()
    assert_same(build(model, folder)[0], fresh)


def test_a_file_that_matches_its_hash_but_is_no_safetensors_is_quantized_again(model, folder):
    import hashlib

    fresh, _, _ = build(model, folder)
    (folder / "layer_000.safetensors").write_bytes(b"x" * 100)
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256(b"x" * 100).hexdigest()
    manifest["files"]["layer_000.safetensors"] = {"bytes": 100, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    again, cache, notes = build(model, folder)
    assert_same(again, fresh)
    assert cache.quantized == 7
    assert "damaged" in notes[0]


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', "{"])
def test_a_damaged_manifest_costs_a_quantization(model, folder, text):
    fresh, _, _ = build(model, folder)
    (folder / MANIFEST).write_text(text)
    again, cache, notes = build(model, folder)
    assert_same(again, fresh)
    assert cache.quantized == 21
    assert "cannot be read" in notes[0]
    assert build(model, folder)[1].quantized == 0


def test_codes_of_other_weights_are_not_used(model, folder):
    build(model, folder)
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data[0] *= 2
    changed, cache, notes = build(model, folder)
    assert (cache.read, cache.quantized) == (20, 1)
    assert "layer 2, mlp.up_proj are of other weights" in notes[0]
    assert_same(changed, build(model, None)[0])
    assert build(model, folder)[1].quantized == 0


def test_a_killed_run_keeps_what_was_written(model, folder):
    def interrupted():
        with CachedCodes(HqqCodes(), SubstituteStore(folder)) as cache:
            fuser = LayerFuser(model.config, cache, kernel="int4_mma", keep_exact=frozenset())
            fuser.fuse(dict(model.model.layers[0].named_parameters()), CPU, index=0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (folder / "layer_001.safetensors.1234").write_bytes(b"half a fi")
    _, cache, notes = build(model, folder)
    assert (cache.read, cache.quantized, notes) == (7, 14, [])
    assert not list(folder.glob("*.1234"))


def test_modules_that_were_exact_before_are_added(model, folder):
    build(model, folder, keep=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}))
    _, cache, _ = build(model, folder)
    assert (cache.read, cache.quantized) == (9, 12)
    _, cache, _ = build(model, folder)
    assert (cache.read, cache.quantized) == (21, 0)


def test_exact_layers_have_no_file(model, folder):
    build(model, folder, exact=(1,))
    assert sorted(file.stem for file in folder.glob("*.safetensors")) == ["layer_000", "layer_002"]
    _, cache, notes = build(model, folder, exact=(1,))
    assert (cache.read, cache.quantized, notes) == (14, 0, [])


def test_off_writes_nothing(model, folder):
    _, cache, notes = build(model, None)
    assert (cache.read, cache.quantized, notes) == (0, 21, [])
    assert cache.report()["trouble"] == "quant.cache=off"
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_caching_not_the_run(model, folder, monkeypatch, number):
    write, count = layer_files.replace_file, []

    def full(file, content):
        count.append(file.name)
        if len(count) > 3:  # the second layer
            raise OSError(number, "No space left on device")
        write(file, content)

    monkeypatch.setattr(layer_files, "replace_file", full)
    layers, cache, notes = build(model, folder)
    assert_same(layers, build(model, None)[0])
    assert len(notes) == 1
    assert "not cached: the disk" in notes[0]
    assert cache.report()["trouble"].endswith("is full")
    assert not folder.exists()


def test_no_room_is_noticed_before_writing(model, folder, monkeypatch):
    monkeypatch.setattr(layer_files, "free_space", lambda folder: 1_099_000_000)
    layers, _, notes = build(model, folder, expected_bytes=1_000_000_000)
    assert_same(layers, build(model, None)[0])
    assert "not cached: it needs 1.1 GB" in notes[0]
    assert not folder.exists()


def test_what_is_there_is_read_even_without_room(model, folder, monkeypatch, no_hqq):
    build(model, folder)
    monkeypatch.setattr(layer_files, "free_space", lambda folder: 0)
    no_hqq()
    _, cache, notes = build(model, folder, expected_bytes=1_000_000_000)
    assert (cache.read, notes) == (21, [])


def test_a_folder_that_cannot_be_made_ends_caching_not_the_run(model, tmp_path):
    (tmp_path / "file").write_text("")
    layers, _, notes = build(model, tmp_path / "file" / "key")
    assert_same(layers, build(model, None)[0])
    assert len(notes) == 1
    assert "not cached" in notes[0]


def test_whoever_waits_finds_what_the_other_has_written(model, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "key"
    build(model, elsewhere)
    folder.parent.mkdir(parents=True)
    held = threading.Event()

    def other_process():  # locks are per thread, so a thread can stand in
        with FileLock(folder.parent / f"{folder.name}.lock"):
            held.set()
            time.sleep(0.4)
            shutil.copytree(elsewhere, folder)

    other = threading.Thread(target=other_process)
    other.start()
    held.wait()
    _, cache, notes = build(model, folder)
    other.join()
    assert (cache.read, cache.quantized) == (21, 0)
    assert len(notes) == 1
    assert "waiting" in notes[0]


def test_the_lock_is_given_back(model, folder):
    build(model, folder)
    with FileLock(folder.parent / f"{folder.name}.lock", timeout=0):
        pass


def test_without_names_nothing_is_remembered(folder):
    weight = torch.randn(16, 64)
    with CachedCodes(HqqCodes(), SubstituteStore(folder)) as cache:
        one = cache.codes(weight)
        cache.end_layer()
    assert torch.equal(one.dequantize(), HqqCodes().codes(weight).dequantize())
    assert not folder.exists()


def test_scales_that_float16_would_round_are_kept_whole(folder):
    class Fine:
        group_size = 64

        def codes(self, weight, name=None):
            q = torch.arange(16, dtype=torch.uint8).repeat(4 * 8).view(4, 128)
            return Codes(q, torch.full((4, 2), 0.1), torch.full((4, 2), 7.5), 64)

        def restore(self, stored, shape, name, device):
            return HqqCodes().restore(stored, shape, name, device)

        def end_layer(self):
            pass

    weight = torch.zeros(4, 128)
    for _ in range(2):
        with CachedCodes(Fine(), SubstituteStore(folder)) as cache:
            codes = cache.codes(weight, "0.x")
            cache.end_layer()
        expected = Fine().codes(weight)
        assert all(
            torch.equal(getattr(codes, part), getattr(expected, part)) for part in ("q", "scale", "zero")
        )
    assert cache.store.read == 1


def test_hqqs_scales_are_float16_already():
    codes = HqqCodes().codes(torch.randn(32, 128))
    packed = int4.pack(codes.q, codes.scale, codes.zero, tiles=2)
    assert torch.equal(int4.unpack(packed), codes.dequantize())


def test_every_fact_makes_another_key(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    facts = {"target": "org/name@abc", "dtype": "torch.bfloat16", **HqqCodes().facts}
    keys = {cache_folder(facts)}
    for name, value in {
        "target": "org/name@abd",
        "dtype": "torch.float16",
        "quantizer": "other",
        "version": "9.9",
        "bits": 3,
        "group_size": 32,
        "axis": 0,
    }.items():
        assert name in facts
        keys.add(cache_folder({**facts, name: value}))
    monkeypatch.setattr(substitutes, "FORMAT", substitutes.FORMAT + 1)
    keys.add(cache_folder(facts))
    assert len(keys) == 9
    assert all(key.parent == tmp_path / "substitutes" for key in keys)


def test_fingerprints_see_bits_shapes_and_types():
    weight = torch.randn(64, 256)
    prints = [weight, -weight, weight.T.contiguous(), weight.view(128, 128), weight.bfloat16()]
    assert len({bytes(fingerprint(w).numpy()) for w in prints}) == len(prints)
    assert torch.equal(fingerprint(weight), fingerprint(weight.clone()))


def test_a_fingerprint_does_not_depend_on_the_parts_it_is_summed_in(monkeypatch):
    weight = torch.randn(63, 257).bfloat16()
    whole, changed = fingerprint(weight), weight.clone()
    changed[-1, -1] += 1
    for part in (1000, 63 * 257 - 1, 63 * 257):
        monkeypatch.setattr(substitutes, "SUMMED", part)
        assert torch.equal(fingerprint(weight), whole)
        assert not torch.equal(fingerprint(changed), whole)


@pytest.mark.gpu
def test_a_large_fingerprint_takes_little_of_the_card():
    weight = torch.zeros(1 << 27, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fingerprint(weight)
    assert torch.cuda.max_memory_allocated() - before < 100 << 20  # summed at once: 1 GiB


@pytest.mark.gpu
def test_on_a_card_too(folder, no_hqq):
    device = torch.device("cuda")
    model = tiny_model("llama", layers=2, hidden_size=128, intermediate_size=192).to(device, torch.bfloat16)
    results = []
    for _ in range(2):
        with CachedCodes(HqqCodes(), SubstituteStore(folder)) as cache:
            fuser = LayerFuser(model.config, cache, kernel="int4_mma", keep_exact=frozenset())
            results.append(
                [
                    fuser.fuse(dict(layer.named_parameters()), device, index=index)
                    for index, layer in enumerate(model.model.layers)
                ]
            )
        no_hqq()
    assert cache.store.read == 14
    assert_same(*results)
