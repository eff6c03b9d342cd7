"""Coded layers that stream from their files: bit for bit, checked when they are read first, and kept or refused."""

import errno
from dataclasses import replace

import pytest

from subspec.codec.coded_cache import CodedCache
from subspec.config.enums import Codec
from subspec.decoding.target_model import TargetModel
from subspec.errors import SubspecError
from subspec.offload import loader
from subspec.offload.disk import measure_disk
from subspec.offload.loader import load_streamed
from subspec.quant.hqq import hqq_quantizer
from subspec.store import store
from subspec.store.substitutes import CachedQuantizer, SubstituteStore
from tests.codec.test_coded_cache import LINEARS
from tests.codec.test_coded_layer import ROOM, assert_exact, builder_of, text_of, tiny
from tests.offload.test_streaming import DEVICES, ModelSource, plan_for

pytestmark = pytest.mark.usefixtures("quick")
FACTS = {"target": "tiny"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))


def start(model, on_disk=(0,), resident=(1,), **options):
    """A target whose layers lie on the device, in pinned memory and on the disk; and its cache."""
    builder, notes = builder_of(model), []
    plan = plan_for(resident, 2, codec=Codec.substitute, layer_bytes=ROOM, disk=on_disk)
    with SubstituteStore(FACTS, note=notes.append) as kept:
        builder.quantizer = CachedQuantizer(hqq_quantizer(), kept)
        with CodedCache(FACTS, builder.quantizer, LINEARS, note=notes.append, **options) as coded:
            loaded = load_streamed(
                ModelSource(model), plan, model.device, builder=builder, coded=coded, note=lambda text: None
            )
    assert notes == []
    return loaded, coded


@pytest.mark.parametrize("device", DEVICES)
def test_coded_layers_stream_from_their_files(device):
    model = tiny(device=device)
    expected = text_of(TargetModel(model))
    for on_disk, resident, made in (((0, 2), (1,), 3), ((0, 2), (1,), 0), ((1,), (), 0)):
        loaded, coded = start(model, on_disk, resident)
        assert (coded.made, coded.read) == (made, 3 - made)
        target = loaded.target
        assert target.resident_layers == list(resident)
        assert [layer.index for layer in target.disk.layers] == list(on_disk)
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
    loaded, _ = start(tiny())
    with pytest.raises(SubspecError, match=r"layer_000\.coded gives other weights of layer 0 .* remove it"):
        text_of(loaded.target)
    loaded.close()


@pytest.mark.parametrize("full", ["asked", "found"])
def test_code_that_cannot_be_kept_ends_the_start_in_one_line(monkeypatch, full):
    write = store.write_atomic

    def fails(path, *pieces, durable):
        if path.suffix == ".coded":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *pieces, durable=durable)

    if full == "found":
        monkeypatch.setattr(store, "write_atomic", fails)
    else:
        monkeypatch.setattr(store, "free_space", lambda folder: 10**6)
    with pytest.raises(SubspecError, match=r"keeps a coded target on disk: .*SUBSPEC_CACHE") as caught:
        start(tiny(), expected_bytes=10**7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("when", ["loading", "streaming"])
def test_a_file_that_goes_ends_in_one_line(monkeypatch, when):
    model = tiny()
    if when == "loading":
        stored = loader._stored_code

        def removed(coding, coded):
            (coded.folder / "layer_000.coded").unlink()
            return stored(coding, coded)

        monkeypatch.setattr(loader, "_stored_code", removed)
        with pytest.raises(SubspecError, match=r"coded layer 0 .* is gone or cut off"):
            start(model)
        return
    loaded, coded = start(model)
    with (coded.folder / "layer_000.coded").open("r+b") as stream:
        stream.truncate(4096)
    with pytest.raises(SubspecError, match=r"layer_000\.coded .*(cut off|changed)"):
        text_of(loaded.target)
    loaded.close()
