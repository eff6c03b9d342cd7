"""Layers from a disk: the bytes of the files, ahead of use, or one line that says what is wrong with a file."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspec.config.schema import Device, HubTargetConfig, PlantedTargetConfig
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.errors import SubspecError
from subspec.offload import disk, loader
from subspec.offload.disk import ALIGNMENT, DiskRing, StoredLayer, measure_disk, stored_layers
from subspec.offload.loader import load_streamed
from subspec.store import store
from subspec.targets import load_target, open_source, resolve_device
from tests.helpers.tiny import tiny_checkpoint, tiny_model
from tests.offload.test_streaming import PROMPT, plan_for

CPU = resolve_device(Device.cpu)
PLANTED = PlantedTargetConfig(name="planted_tiny_tied", shape="tiny_tied")


@pytest.fixture
def checkpoint(tmp_path):
    return HubTargetConfig(name="hub", path=str(tiny_checkpoint(tmp_path / "ck", "qwen2", layers=4)))


def quiet(text):
    pass


def opened(config, dtype=torch.float32):
    return open_source(config, dtype, CPU, note=quiet)


def streamed(source, resident=(), slots=2, notes=None, on_disk=None, device=CPU):
    """All layers from the disk, or with ``on_disk`` these alone and the others from pinned memory."""
    note = quiet if notes is None else notes.append
    stored = stored_layers(source, quiet, on_disk)
    return load_streamed(source, plan_for(resident, slots), torch.device(device), stored=stored, note=note)


def text_of(target, count=12, **options):
    return Engine(target, max_length=64, prefill_chunk=4).generate(PROMPT, max_new_tokens=count, **options)


def assert_read(layers, source, slots):
    """A ring over all layers reads what the source gives."""
    ring = DiskRing(layers, slots, quiet)
    for layer in layers:
        read, exact = ring.parameters(ring.acquire()), source.layer(layer.index, CPU)
        assert list(read) == list(exact)
        assert all(torch.equal(read[name], exact[name]) for name in exact)
        ring.release()
    ring.close()


def refusing_direct(monkeypatch, where=os.open):
    """File systems refuse direct reads when a file is opened, or when it is read first."""
    if where is os.open:
        real = os.open

        def refuse(path, flags, *args, **kwargs):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *args, **kwargs)

        monkeypatch.setattr(disk.os, "open", refuse)
        return
    first, read = set(), os.preadv

    def refuse_read(fd, buffers, offset):
        if fd not in first:
            first.add(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(fd, buffers, offset)

    monkeypatch.setattr(disk.os, "preadv", refuse_read)


# ---------------------------------------------------------------------------------------------- bytes


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(0, 3 * ALIGNMENT), st.integers(1, 3 * ALIGNMENT)), min_size=1, max_size=5),
    st.sampled_from([4, 2]),
    st.sampled_from([ALIGNMENT, 4 * ALIGNMENT]),
    st.booleans(),
)
def test_any_place_in_any_file_is_read_as_it_lies(tmp_path_factory, seed, parts, itemsize, piece, direct):
    """Gaps and sizes around pages, files that end where the last parameter does, pieces smaller than a parameter."""
    folder, generator = tmp_path_factory.mktemp("f"), torch.Generator().manual_seed(seed)
    dtype = {4: torch.int32, 2: torch.int16}[itemsize]
    places, shapes, expected, contents = {}, {}, {}, {0: b"", 1: b""}
    for number, (gap, size) in enumerate(parts):
        which, name = number % 2, f"p{number}"
        contents[which] += bytes(gap // itemsize * itemsize)
        values = torch.randint(-9999, 9999, (size,), generator=generator).to(dtype)
        places[name], shapes[name] = (folder / str(which), len(contents[which])), values.shape
        contents[which] += values.numpy().tobytes()
        expected[name] = values
    for which, content in contents.items():
        (folder / str(which)).write_bytes(content)
    layers = [StoredLayer(index, places, shapes, dtype) for index in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "PIECE_BYTES", piece)
        if not direct:
            refusing_direct(patch)
        ring = DiskRing(layers, 2, quiet)
        assert ring.direct is direct
        for _ in range(3):
            read = ring.parameters(ring.acquire())
            assert all(torch.equal(read[name], expected[name]) for name in expected)
            ring.release()
        ring.close()
    for extent in layers[0].extents():
        assert extent.start % ALIGNMENT == extent.size % ALIGNMENT == extent.base % ALIGNMENT == 0
        assert extent.start <= extent.begin < extent.end <= extent.start + extent.size
    assert sum(ring.sizes) >= 2 * sum(size for _, size in parts) * itemsize


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("most", [ALIGNMENT, ALIGNMENT + 100])
def test_short_reads_are_continued(tmp_path, monkeypatch, most, direct):
    content, read = torch.arange(5 * ALIGNMENT // 4 + 3, dtype=torch.int32), os.preadv
    file = tmp_path / "f"
    file.write_bytes(content.numpy().tobytes())
    monkeypatch.setattr(disk.os, "preadv", lambda fd, to, at: min(read(fd, to, at), most))
    if not direct:
        refusing_direct(monkeypatch)
    ring = DiskRing([StoredLayer(0, {"w": (file, 0)}, {"w": content.shape}, torch.int32)], 1, quiet)
    assert torch.equal(ring.parameters(ring.acquire())["w"], content)
    ring.close()


@pytest.mark.parametrize("shards", [1, 5])
def test_layers_are_read_in_place_where_they_lie_as_in_memory(checkpoint, tmp_path, monkeypatch, shards):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    if shards > 1:
        (Path(checkpoint.path) / "model.safetensors").unlink()
        tiny_model("qwen2", layers=4).save_pretrained(checkpoint.path, max_shard_size="150KB")
        assert len(list(Path(checkpoint.path).glob("model-*.safetensors"))) >= shards
    source = opened(checkpoint)
    layers = stored_layers(source, quiet)
    assert {file.parent for layer in layers for file, _ in layer.places.values()} == {Path(checkpoint.path)}
    assert not (tmp_path / "cache").exists()
    assert_read(layers, source, 2)
    assert measure_disk(layers, 2) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_layers_are_copied_once(checkpoint, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path / "cache"))
    source, notes = opened(PLANTED if dtype is torch.float32 else checkpoint, dtype), []
    first, again = (stored_layers(source, notes.append) for _ in range(2))
    assert first == again
    assert sum("copied to disk" in note for note in notes) == 1
    file = next(iter(first[1].places.values()))[0]
    os.truncate(file, 100)  # another run writes it again
    assert stored_layers(source, quiet) == first
    assert_read(first, source, 1)


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(("resident", "slots"), [((), 2), ((), 1), ((), 4), ((1,), 2), ((0, 3), 2), (range(4), 0)])
def test_streamed_text_is_the_whole_models(checkpoint, resident, slots):
    whole = text_of(TargetModel(load_target(checkpoint, CPU, note=quiet).model))
    loaded = streamed(opened(checkpoint), resident, slots)
    for _ in range(2):
        result = text_of(loaded.target)
        assert result.token_ids == whole.token_ids
    passes, stats = 11 + 2, result.stats
    assert stats.bytes_streamed == passes * loaded.target.streamed_bytes_per_pass
    assert (stats.bytes_streamed == 0) == (len(resident) == 4)
    assert 0 <= stats.transfer_s <= stats.prefill_s + stats.decode_s + 0.1
    loaded.close()


def test_an_interrupted_pass_does_not_confuse_the_next(checkpoint):
    loaded = streamed(opened(checkpoint), (2,))
    expected = text_of(loaded.target).token_ids
    for done in (1, 2):
        for _ in range(done):
            loaded.target.streamer.acquire()
            loaded.target.streamer.release()
        assert text_of(loaded.target).token_ids == expected
    loaded.close()


@pytest.mark.parametrize("where", [os.open, os.preadv])
def test_a_file_system_without_direct_reads_is_noted(checkpoint, monkeypatch, where):
    refusing_direct(monkeypatch, where)
    dropped, notes = [], []
    monkeypatch.setattr(disk.os, "posix_fadvise", lambda fd, at, size, advice: dropped.append(advice))
    loaded = streamed(opened(checkpoint), notes=notes)
    text_of(loaded.target, 3)
    assert loaded.target.facts()["disk"]["direct"] is False
    assert [("refuses direct reads" in note, "page cache" in note) for note in notes] == [(True, True)]
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}
    loaded.close()


def test_a_network_mount_is_noted(checkpoint, monkeypatch):
    monkeypatch.setattr(disk, "_file_system", lambda path: "nfs4")
    notes = []
    loaded = streamed(opened(checkpoint), notes=notes)
    assert loaded.target.facts()["disk"]["file_system"] == "nfs4"
    assert [note for note in notes if "is on nfs4" in note] == notes
    loaded.close()


# --------------------------------------------------------------------------------------------- faults


def rewritten(file):
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"12345678")


def replaced(file):
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


FAULTS = {
    "cut off": (lambda file: os.truncate(file, os.path.getsize(file) // 2), r"cut off|changed"),
    "written to": (rewritten, "changed while the run read"),
    "replaced": (replaced, "changed while the run read"),
    "touched": (lambda file: os.utime(file), "changed while the run read"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("on_disk", "device"), [(None, "cpu"), ((0, 2), "cpu"), pytest.param((0, 2), "cuda", marks=pytest.mark.gpu)]
)
def test_a_file_that_changes_ends_the_text_in_one_line(checkpoint, fault, on_disk, device):
    change, message = FAULTS[fault]
    loaded = streamed(opened(checkpoint), on_disk=on_disk, device=device)
    expected, emitted = text_of(loaded.target).token_ids, []
    change(Path(checkpoint.path) / "model.safetensors")
    for _ in range(2):  # also when it is tried again
        with pytest.raises(SubspecError, match=rf"model\.safetensors .*({message})") as caught:
            text_of(loaded.target, on_tokens=lambda ids, text: emitted.extend(ids))
        assert "\n" not in str(caught.value)
    assert emitted == expected[: len(emitted)]
    loaded.close()


def test_a_file_that_changes_while_the_rest_is_loaded_is_noticed(checkpoint, monkeypatch):
    real, file = loader._load_shared, Path(checkpoint.path) / "model.safetensors"
    monkeypatch.setattr(loader, "_load_shared", lambda *given: (replaced(file), real(*given))[1])
    loaded = streamed(opened(checkpoint))
    with pytest.raises(SubspecError, match="changed while the run read"):
        text_of(loaded.target)
    loaded.close()


def test_a_removed_file_that_is_open_stays_readable(checkpoint):
    loaded = streamed(opened(checkpoint))
    expected = text_of(loaded.target).token_ids
    (Path(checkpoint.path) / "model.safetensors").unlink()
    assert text_of(loaded.target).token_ids == expected
    loaded.close()


@pytest.mark.parametrize("on_disk", [None, (0, 2)])
@pytest.mark.parametrize("failing_read", [2, 4, 7])  # of the first layer, too
@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EIO, "copy it to another disk"), (errno.ESTALE, "mount"), (errno.ETIMEDOUT, "mount")]
)
def test_a_failing_disk_ends_the_text_in_one_line(checkpoint, monkeypatch, number, remedy, failing_read, on_disk):
    """A later text is right."""
    loaded, read, emitted = streamed(opened(checkpoint), on_disk=on_disk), os.preadv, []
    reads = iter(range(1000))

    def failing(fd, buffers, offset):
        if next(reads) == failing_read:
            raise OSError(number, os.strerror(number))
        return read(fd, buffers, offset)

    expected = text_of(loaded.target).token_ids
    monkeypatch.setattr(disk.os, "preadv", failing)
    with pytest.raises(SubspecError, match=rf"model\.safetensors cannot be read: .*{remedy}"):
        text_of(loaded.target, on_tokens=lambda ids, text: emitted.extend(ids))
    assert emitted == expected[: len(emitted)]
    assert len(emitted) < len(expected)
    assert text_of(loaded.target).token_ids == expected
    loaded.close()


def test_wrong_bytes_of_a_first_read_are_refused(checkpoint, monkeypatch):
    """A disk, or an error of ours, that gives other bytes than every other reader of the file gets."""
    read = os.preadv

    def flipped(fd, buffers, offset):
        count = read(fd, buffers, offset)
        if count > ALIGNMENT:
            buffers[0][ALIGNMENT] ^= 1
        return count

    monkeypatch.setattr(disk.os, "preadv", flipped)
    for source in (opened(checkpoint), opened(PLANTED)):
        loaded = streamed(source)
        with pytest.raises(SubspecError, match="gives other weights of layer 0 than it should"):
            text_of(loaded.target)
        loaded.close()


@pytest.mark.parametrize("on_disk", [None, (1,)])
def test_a_copy_that_rots_is_refused_and_names_the_file(tmp_path, monkeypatch, on_disk):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    source = opened(PLANTED)
    (layer,) = (own for own in stored_layers(source, quiet, on_disk) if own.index == 1)
    file = next(iter(layer.places.values()))[0]
    rewritten(file)
    loaded = streamed(source, on_disk=on_disk)
    with pytest.raises(SubspecError, match=rf"{file.name} gives other weights of layer 1 .*remove it"):
        text_of(loaded.target)
    loaded.close()


@pytest.mark.parametrize("full", ["asked", "found"])
def test_a_full_disk_ends_the_copy_in_one_line(tmp_path, monkeypatch, full):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    if full == "asked":
        monkeypatch.setattr(store, "free_space", lambda folder: 1000)
    else:

        def write(path, *pieces, durable):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store, "write_atomic", write)
    with pytest.raises(SubspecError, match=r"copy of the target's layers on disk: .*SUBSPEC_CACHE"):
        stored_layers(opened(PLANTED), quiet)


def test_missing_and_forbidden_files_are_named(checkpoint, monkeypatch):
    layers = stored_layers(opened(checkpoint), quiet)
    monkeypatch.setattr(disk.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(SubspecError, match=r"model\.safetensors cannot be read: Permission denied"):
        DiskRing(layers, 2, quiet)
