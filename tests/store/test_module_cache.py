"""Quantized modules on disk: the cache's folder never fails a run, the user's is read bit for bit or refused."""

import json

import pytest
import torch

from subspec.config.schema import Cache
from subspec.drafts.substitute import share_parameters
from subspec.errors import ConfigError, SubspecError
from subspec.quant.base import quantize_model
from subspec.quant.hqq import HqqQuantizer
from subspec.store import layer_files, substitutes
from subspec.store.folder import open_store
from subspec.store.module_cache import CachedModules
from subspec.store.substitutes import SubstituteStore
from subspec.utils.disk import MANIFEST
from tests.helpers.tiny import tiny_model

CPU = torch.device("cpu")
MODULES = ["attention", "mlp", "lm_head"]
COUNT = 7 * 2 + 1


@pytest.fixture
def model():
    return tiny_model("qwen2", layers=2)


def quantizer_of(*, unpack=True, dtype=torch.float32, **options):
    options = {"bits": 4, "bits_by": {"down_proj": 3, "lm_head": 8}, "group_size": 32, **options}
    return HqqQuantizer(compute_dtype=dtype, device=CPU, unpack=unpack, **options)


def build(model, folder, *, owned=False, notes=None, **options):
    """A substitute's tensors by name, and the store that served it."""
    substitute, quantizer = share_parameters(model), quantizer_of(**options)
    said = [] if notes is None else notes
    kept = SubstituteStore(folder, facts=quantizer.facts, owned=owned, note=said.append)
    with CachedModules(quantizer, kept) as cached:
        report = quantize_model(substitute, cached, modules=MODULES, skip_layers=[])
    assert report.modules == COUNT
    tensors = {}
    for name, module in substitute.named_modules():
        if name.endswith(("_proj", "lm_head")):
            packed = hasattr(module, "W_q")
            parts = (module.W_q, module.meta["scale"], module.meta["zero"]) if packed else (module.weight,)
            tensors[name] = (*parts, module.bias)
    x = torch.tensor([[5, 17, 33, 99]])
    return tensors, substitute(x).logits, kept


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, parts in one.items():
        for a, b in zip(parts, other[name], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                assert torch.equal(a, b), name


@pytest.fixture
def no_hqq(monkeypatch):
    def arm():
        def refuse(*arguments, **options):
            raise AssertionError("quantized again")

        monkeypatch.setattr("hqq.core.quantize.Quantizer.quantize", refuse)

    return arm


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("unpack", [False, True])
def test_a_second_start_has_the_same_bits_without_optimising(model, tmp_path, no_hqq, axis, unpack):
    fresh, logits, first = build(model, tmp_path / "key", axis=axis, unpack=unpack)
    assert (first.read, first.quantized) == (0, COUNT)
    no_hqq()
    again, same, second = build(model, tmp_path / "key", axis=axis, unpack=unpack)
    assert (second.read, second.quantized) == (COUNT, 0)
    assert_same(fresh, again)
    assert torch.equal(logits, same)


def test_bfloat16_scales_come_back_as_they_were(tmp_path, no_hqq):
    model = tiny_model("llama", layers=2).to(torch.bfloat16)
    fresh, logits, _ = build(model, tmp_path / "key", dtype=torch.bfloat16, unpack=False)
    no_hqq()
    again, same, _ = build(model, tmp_path / "key", dtype=torch.bfloat16, unpack=False)
    assert_same(fresh, again)
    assert torch.equal(logits, same)


def test_the_cache_quantizes_a_damaged_layer_again(model, tmp_path):
    fresh, _, _ = build(model, tmp_path / "key")
    file = tmp_path / "key" / "layer_001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    notes = []
    again, _, kept = build(model, tmp_path / "key", notes=notes)
    assert (kept.read, kept.quantized) == (8, 7)
    assert "layer 1 is damaged" in notes[0]
    assert_same(fresh, again)
    assert build(model, tmp_path / "key")[2].quantized == 0


def test_a_weight_that_differs_in_one_element_is_another():
    """In one that no evenly spread sample would have met."""
    weight = torch.zeros(200, 200)
    before = substitutes.fingerprint(weight)
    weight[3, 7] = 1e-30
    assert not torch.equal(substitutes.fingerprint(weight), before)
    assert torch.equal(substitutes.fingerprint(weight.clone()), substitutes.fingerprint(weight))
    assert not torch.equal(
        substitutes.fingerprint(weight.bfloat16()), substitutes.fingerprint(torch.zeros(200, 200).bfloat16())
    )


def test_an_interrupted_layer_is_not_kept(model, tmp_path):
    quantizer = quantizer_of()

    def interrupted():
        with CachedModules(quantizer, SubstituteStore(tmp_path / "key")) as cached:
            cached.quantize(model.model.layers[0].mlp.up_proj, "layers.0.mlp.up_proj")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.glob("key/*.safetensors"))


# ----------------------------------------------------------------------------------- the user's own folder


def test_a_new_or_empty_folder_is_filled_and_read_ever_after(model, tmp_path, no_hqq):
    for name in ("new/deeper", "empty"):
        folder = tmp_path / name
        if name == "empty":
            folder.mkdir()
        fresh, _, first = build(model, folder, owned=True)
        assert first.quantized == COUNT
        assert (folder / MANIFEST).is_file()
    no_hqq()
    again, _, second = build(model, folder, owned=True)
    assert (second.read, second.quantized) == (COUNT, 0)
    assert_same(fresh, again)


def test_a_folder_may_move(model, tmp_path, no_hqq):
    fresh, _, _ = build(model, tmp_path / "here", owned=True)
    (tmp_path / "here").rename(tmp_path / "there")
    no_hqq()
    assert_same(fresh, build(model, tmp_path / "there", owned=True)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "it was made with bits 4, this run has 8"),
        ({"bits_by": {"lm_head": 8}}, r"it was made with bits_by .*down_proj"),
        ({"group_size": 16}, "it was made with group_size 32, this run has 16"),
        ({"axis": 0}, "it was made with axis 1, this run has 0"),
    ],
)
def test_a_folder_of_other_settings_is_refused(model, tmp_path, change, message):
    build(model, tmp_path / "mine", owned=True)
    with pytest.raises(
        ConfigError, match=rf"^quant\.folder=.*mine cannot be used: {message}.*; name another"
    ):
        build(model, tmp_path / "mine", owned=True, **change)


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    build(model, tmp_path / "mine", owned=True)
    for other in (tiny_model("qwen2", layers=2, seed=1), tiny_model("qwen2", layers=2, intermediate_size=64)):
        with pytest.raises(ConfigError, match=r"its layer 0, .* was made from other weights"):
            build(other, tmp_path / "mine", owned=True)


def test_a_damaged_folder_is_refused_and_stays_as_it_is(model, tmp_path):
    folder = tmp_path / "mine"
    build(model, folder, owned=True)
    file = folder / "layer_000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"its layer 0 is damaged \(its content has changed\)"):
        build(model, folder, owned=True)
    assert file.read_bytes() == content
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="it cannot be read"):
        build(model, folder, owned=True)


def test_a_folder_of_other_files_or_another_format_is_refused(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=r"holds other files: name an empty or a new folder$"):
        build(model, tmp_path, owned=True)
    build(model, tmp_path / "mine", owned=True)
    file = tmp_path / "mine" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="it has format 99, this version reads"):
        build(model, tmp_path / "mine", owned=True)


def test_a_folder_that_cannot_hold_it_stops_the_run(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SubspecError, match=r"quant\.folder=.*cannot be kept there: Not a directory"):
        build(model, tmp_path / "file" / "mine", owned=True)
    monkeypatch.setattr(layer_files, "free_space", lambda folder: 1)
    with pytest.raises(SubspecError, match=r"cannot be kept there: it needs .* are free"):
        open_store(Cache.auto, str(tmp_path / "small"), {}, 10**9, print)._lock()


def test_a_full_disk_takes_back_only_its_own_files(model, tmp_path, monkeypatch):
    write, count = layer_files.replace_file, []

    def full(file, content):
        count.append(file)
        if len(count) > 2:
            raise OSError(28, "No space left on device")
        write(file, content)

    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setattr(layer_files, "replace_file", full)
    with pytest.raises(SubspecError, match=r"cannot be kept there: the disk of .* is full"):
        build(model, folder, owned=True)
    assert list(folder.iterdir()) == []


def test_what_the_configuration_names_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    assert open_store(Cache.off, None, {}, 0, print).folder is None
    assert open_store(Cache.auto, None, {"a": 1}, 0, print).folder.parent == tmp_path / "substitutes"
    own = open_store(Cache.off, str(tmp_path / "mine"), {}, 0, print)  # named: kept, whatever the cache does
    assert (own.folder, own.owned) == (tmp_path / "mine", True)
