"""Layers from pinned memory and a disk in turn: the bytes of both, ahead of use, or one line about a file."""

import hashlib
import os
import time
from dataclasses import replace

import pytest
import torch

from subspec.config.enums import Dtype
from subspec.decoding.target_model import TargetModel
from subspec.offload import disk
from subspec.offload.disk import DiskRing, StoredLayer
from subspec.offload.feeds import DiskFeed
from subspec.offload.tiers import TieredStreamer
from subspec.targets import load_target
from subspec.targets.layer_bytes import parameter_views
from subspec.utils.pinned import PinnedBuffer
from tests.offload.test_disk import CPU, PLANTED, checkpoint, opened, quiet, streamed, text_of  # noqa: F401
from tests.offload.test_streaming import DEVICES

# ------------------------------------------------------------------------------------------------ the ring


class Anything:
    """A source of layers that are their number, as bytes."""

    def layer(self, index, device):
        return {"a": torch.full((300,), index, dtype=torch.uint8), "b": torch.full((5,), index, dtype=torch.uint8)}


def numbered(folder, index):
    """A stored layer: a file of two parameters, the second one first."""
    file = folder / str(index)
    file.write_bytes(bytes([index]) * 305)
    shapes = {"a": torch.Size([300]), "b": torch.Size([5])}
    return StoredLayer(index, {"a": (file, 5), "b": (file, 0)}, shapes, torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kinds", "slots", "disk_slots"),
    [("PDP", 2, 1), ("DPD", 2, 2), ("DDDD", 3, 2), ("D", 1, 1), ("PPDDP", 4, 1), ("DPPPP", 1, 1)],
)
def test_layers_of_both_tiers_come_in_order(tmp_path, kinds, slots, disk_slots, device):
    """Also after passes that were interrupted anywhere."""
    device = torch.device(device)
    pinned, stored = {}, []
    for index, kind in enumerate(kinds):
        if kind == "D":
            stored.append(numbered(tmp_path, index))
        else:
            pinned[index] = torch.full((512 + index,), index, dtype=torch.uint8)
    ring = DiskRing(stored, disk_slots, quiet, Anything())
    streamer = TieredStreamer(pinned, ring, slots, device)
    assert streamer.bytes_per_pass == sum(768 if kind == "D" else 512 + i for i, kind in enumerate(kinds))
    for passes in range(4 * len(kinds)):
        streamer.rewind()
        for index in range(passes % len(kinds) + 1):
            slot = streamer.slots[streamer.acquire()]
            if kinds[index] == "P":
                assert slot[: 512 + index].unique().tolist() == [index]
            else:
                views = parameter_views(slot, stored[0].shapes, torch.uint8)
                assert [view.unique().tolist() for view in views.values()] == [[index], [index]]
            streamer.release()
    streamer.close()
    copied, _ = streamer.take()
    assert copied >= streamer.bytes_per_pass
    assert streamer.take()[0] == 0


def test_the_disk_is_read_while_the_model_does_something_else(tmp_path, monkeypatch):
    """Nobody asks the ring for a layer while the model drafts."""
    read = os.preadv
    monkeypatch.setattr(disk.os, "preadv", lambda *given: (time.sleep(0.02), read(*given))[1])
    ring = DiskRing([numbered(tmp_path, index) for index in range(6)], 2, quiet, Anything())
    streamer = TieredStreamer({}, ring, 2, CPU)
    streamer.prefetch()
    assert ring.bytes_copied <= 4 * 305  # the copies are only begun
    deadline = time.monotonic() + 10
    while ring.bytes_copied < 4 * 305 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    # Two layers in the device's buffers, two in the disk's ring.
    assert (ring.bytes_copied, streamer.bytes_copied) == (4 * 305, 2 * 768)
    streamer.close()


@pytest.mark.gpu
def test_neither_ring_overtakes_its_readers(tmp_path):
    """Late kernels, slots of 32 MiB, and a disk whose reads come from the page cache."""
    size, count = 32 * 2**20, 5
    buffers = {index: PinnedBuffer(size) for index in range(0, count, 2)}
    stored = []
    for index, buffer in buffers.items():
        buffer.tensor.fill_(index)
    for index in range(1, count, 2):
        (file := tmp_path / str(index)).write_bytes(bytes([index]) * size)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        stored.append(StoredLayer(index, {"a": (file, 0)}, {"a": torch.Size([size])}, torch.uint8, digest))
    pinned, device = {index: buffer.tensor for index, buffer in buffers.items()}, torch.device("cuda")
    streamer = TieredStreamer(pinned, DiskRing(stored, 1, quiet, Anything()), 2, device)
    right = torch.zeros(100, dtype=torch.bool, device=device)
    for step in range(100):
        slot = streamer.slots[streamer.acquire()]
        torch.cuda._sleep(20_000_000 * (step % 3))
        right[step] = (slot == step % count).all()
        streamer.release()
    assert bool(right.all())
    streamer.close()
    for buffer in buffers.values():
        buffer.close()


# -------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("on_disk", "resident", "slots"), [((0, 2), (), 2), ((1, 3), (2,), 1), ((3,), (0,), 4), ((0, 1, 2), (), 2)]
)
def test_the_text_is_that_of_the_whole_model(checkpoint, on_disk, resident, slots, device):  # noqa: F811
    device = torch.device(device)
    whole = load_target(replace(checkpoint, dtype=Dtype.float32), device, note=quiet).model
    expected = text_of(TargetModel(whole)).token_ids
    loaded = streamed(opened(checkpoint), resident, slots, on_disk=on_disk, device=device)
    target = loaded.target
    assert not any(isinstance(feed, DiskFeed) for feed in target.feeds)
    for _ in range(2):
        result = text_of(target)
        assert result.token_ids == expected
    assert result.stats.bytes_streamed == 13 * target.streamer.bytes_per_pass
    target.recorded = target.disk
    target.take_transfer()
    stats = text_of(target).stats
    read = 13 * target.facts()["disk"]["bytes_per_pass"]
    assert abs(stats.bytes_streamed - read) <= 4 * max(target.disk.sizes)  # by as much as may be read ahead
    assert stats.transfer_s > 0
    assert target.facts()["disk"]["layers"] == list(on_disk)
    loaded.close()


def test_a_planted_target_streams_from_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    expected = text_of(TargetModel(load_target(PLANTED, CPU, note=quiet).model)).token_ids
    loaded = streamed(opened(PLANTED), on_disk=(1,))
    assert text_of(loaded.target).token_ids == expected
    assert [file.name for file in tmp_path.rglob("*.bin")] == ["layer_001.bin"]
    loaded.close()
