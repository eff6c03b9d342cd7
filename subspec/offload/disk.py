"""Layers on a disk, read ahead of use past the page cache.

Protocol: the thread that runs the model asks a :class:`DiskRing` for layers in order. The ring gives every layer that
has a free slot to reader threads, in pieces (``os.preadv`` releases the interpreter lock). A slot belongs to the
readers until all of its pieces have arrived, then to the model until it is released. Errors of the readers are raised
where their layer is waited for, so no layer is used that did not arrive whole.
"""

import errno
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from torch import Tensor

from subspec.errors import SubspecError
from subspec.offload.stream import LayerRing
from subspec.store.exact_layers import ExactLayerStore, layer_digest
from subspec.targets.source import LayerSource
from subspec.utils.console import Note, print_note
from subspec.utils.pinned import PinnedBuffer
from subspec.utils.rounding import round_up

ALIGNMENT = 4096
"""Of offsets, sizes and addresses of direct reads: the largest block of common disks."""

PIECE_BYTES = 8 * 2**20
READERS = 4
"""Bytes of one read, and threads that read: one thread left a virtual NVMe disk idle between its reads."""

PROBE_SECONDS, PROBE_BYTES = 1.5, 2**30
"""Limits of a measurement of bandwidth."""

NETWORKS = ("nfs", "cifs", "smb", "9p", "fuse", "ceph", "lustre", "afs", "gluster", "virtiofs")
"""Beginnings of the names of file systems that may lie on another machine."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StoredLayer:
    """A decoder layer in files.

    Attributes:
        places: file and first byte of every parameter, by name; the parameters lie there as in memory.
        sha256: of the parameters' bytes in order; None: the target's own files hold them.
    """

    index: int
    places: Mapping[str, tuple[Path, int]]
    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    sha256: str | None = None

    def extents(self) -> list["Extent"]:
        """Byte ranges that hold all parameters; ranges that touch the same page are one."""
        found: list[Extent] = []
        nbytes = {name: shape.numel() * self.dtype.itemsize for name, shape in self.shapes.items()}
        for file, begin, name in sorted((*place, name) for name, place in self.places.items()):
            end, last = begin + nbytes[name], found[-1] if found else None
            if last is not None and last.file == file and begin < round_up(last.end, ALIGNMENT) + ALIGNMENT:
                found[-1] = Extent(file, last.begin, max(last.end, end), last.base)
            else:
                base = 0 if last is None else last.base + last.size
                found.append(Extent(file, begin, end, base))
        return found


@dataclass(frozen=True)
class Extent:
    """Bytes ``begin`` to ``end`` of a file, and where its first page lies in a slot (``base``)."""

    file: Path
    begin: int
    end: int
    base: int = 0

    @property
    def start(self) -> int:
        """First byte of the page that holds ``begin``."""
        return self.begin // ALIGNMENT * ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes of all pages."""
        return round_up(self.end, ALIGNMENT) - self.start


def stored_layers(
    source: LayerSource, note: Note = print_note, layers: Sequence[int] | None = None
) -> list[StoredLayer]:
    """Layers of a target in files: its own if they hold the layers as they are, else a copy that is made once.

    Args:
        layers: numbers of those that are wanted; None: all.

    Raises:
        SubspecError: the copy does not fit on the disk.
    """
    count = source.config.num_hidden_layers
    layers = range(count) if layers is None else layers
    own = [(index, source.locations(index), source.layer_shapes(index)) for index in layers]
    found = [StoredLayer(index, places, shapes, source.dtype) for index, places, shapes in own if places is not None]
    if len(found) == len(layers):
        return found
    shapes = own[0][2]
    sizes = [shape.numel() * source.dtype.itemsize for shape in shapes.values()]
    offsets = dict(zip(shapes, accumulate(sizes, initial=0), strict=False))
    expected = len(layers) * sum(sizes)
    facts = {"target": source.identity, "dtype": str(source.dtype), "layers": count}
    found = []
    with ExactLayerStore(facts, expected_bytes=expected, note=note) as store:
        for index in layers:
            kept = store.file(index)
            if kept is None:
                if not store.made:
                    note(f"the target's layers are copied to disk, once: {expected / 1e9:.1f} GB to {store.folder}")
                kept = store.write(index, source.layer(index, CPU))
            places = {name: (kept[0], offset) for name, offset in offsets.items()}
            found.append(StoredLayer(index, places, shapes, source.dtype, kept[1]))
    return found


class DirectFile:
    """A file that is read past the page cache.

    Where its file system refuses that (not ``direct``) pages are dropped from the cache after they were read.

    Raises:
        SubspecError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, flag = path, getattr(os, "O_DIRECT", 0)
        with self._errors():
            self.direct = bool(flag) and self._probe(flag)
            if not self.direct:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._opened = os.fstat(self._fd)

    def _probe(self, flag: int) -> bool:
        """Open for direct reads, and try one: some file systems refuse the first, some the second."""
        fd = -1
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | flag)
            with mmap.mmap(-1, ALIGNMENT) as page:
                os.preadv(fd, [page], 0)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                return False
            raise
        self._fd = fd
        return True

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill ``buffer`` from ``offset``; both are aligned.

        Args:
            needed: bytes that the file must have there; the rest of the last page may be missing.

        Raises:
            SubspecError: the read fails, or the file ends early.
        """
        done = 0
        with self._errors():
            while done < needed:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                # A direct read goes on at a whole page only.
                rest = count % ALIGNMENT if self.direct and done + count < needed else 0
                if count <= rest:
                    raise SubspecError(
                        f"{self.path} ends at byte {offset + done + count}, and its weights go on to byte "
                        f"{offset + needed}: it was cut off while the run read it; fetch or copy it again"
                    )
                done += count - rest
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Check that the file is still the one that was opened.

        Raises:
            SubspecError: it is another one, or was written to.
        """
        with self._errors():
            now, before = os.fstat(self._fd), self._opened
        same = (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        with suppress(OSError):  # removed: the open file still has its content
            same = same and os.path.samestat(os.stat(self.path), now)
        if not same:
            raise SubspecError(
                f"{self.path} changed while the run read weights from it: start again, and do not write to it meanwhile"
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of the system into one line with the remedy."""
        try:
            yield
        except OSError as error:
            remedy = "copy it to another disk" if error.errno == errno.EIO else "check its disk or mount"
            reason = error.strerror or error
            raise SubspecError(f"{self.path} cannot be read: {reason}; {remedy}, and start again") from error

    def close(self) -> None:
        """Close the file. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class DiskRing(LayerRing):
    """Reads layers from files to buffers in host memory.

    Args:
        layers: in the order of use.
        count: ring slots.
        note: told where the page cache cannot be bypassed, and about files that may lie on another machine.
        source: of the same layers, to compare each with when it is read first; None: they are not compared.

    Attributes:
        direct: whether the page cache is bypassed.
        file_system: kinds of the files' file systems.

    Raises:
        SubspecError: a file cannot be opened, or memory is missing.
    """

    def __init__(
        self, layers: Sequence[StoredLayer], count: int, note: Note = print_note, source: LayerSource | None = None
    ) -> None:
        self.layers, self._source = list(layers), source
        self._unchecked = set() if source is None else {layer.index for layer in layers}
        self._extents = [layer.extents() for layer in layers]
        super().__init__([sum(e.end - e.begin for e in extents) for extents in self._extents], count)
        names = dict.fromkeys(extent.file for extents in self._extents for extent in extents)
        slot_bytes = max(extents[-1].base + extents[-1].size for extents in self._extents)
        with ExitStack() as held:
            self._files = {name: held.enter_context(closing(DirectFile(name))) for name in names}
            self._buffers = [held.enter_context(closing(PinnedBuffer(slot_bytes, pin=False))) for _ in range(count)]
            self._held = held.pop_all()
        self.slots = [buffer.tensor for buffer in self._buffers]
        self._views = [memoryview(slot.numpy()) for slot in self.slots]
        self._threads = ThreadPoolExecutor(READERS, "disk")
        self._reading: list[list[Future[tuple[float, float]]]] = [[] for _ in range(count)]
        self._holds = [0] * count
        self._busy = self._last_end = 0.0
        self.direct = all(file.direct for file in self._files.values())
        kinds = sorted({_file_system(name) for name in names})
        self.file_system = ", ".join(kinds)
        first = next(iter(names))
        if not self.direct:
            note(
                f"the file system of {first} ({self.file_system}) refuses direct reads: weights pass through the page "
                "cache, and may come from memory instead of the disk"
            )
        if any(kind.startswith(NETWORKS) for kind in kinds):
            note(f"{first} is on {self.file_system}: every pass reads it from there; a local disk may be faster")

    def layer_in(self, slot: int) -> StoredLayer:
        """The layer in ``slot``."""
        return self.layers[self._holds[slot]]

    def parameters(self, slot: int) -> dict[str, Tensor]:
        """The parameters of the layer in ``slot`` by name, as views.

        Raises:
            SubspecError: the layer is read for the first time, and has other weights than it should.
        """
        layer, extents, views = self.layer_in(slot), self._extents[self._holds[slot]], {}
        for name, shape in layer.shapes.items():
            file, offset = layer.places[name]
            extent = next(e for e in extents if e.file == file and e.begin <= offset < e.end)
            begin = extent.base + offset - extent.start
            size = shape.numel() * layer.dtype.itemsize
            views[name] = self.slots[slot][begin : begin + size].view(layer.dtype).view(shape)
        if self._source is not None and layer.index in self._unchecked:
            _check_first_read(layer, views, self._source)
            self._unchecked.remove(layer.index)
        return views

    def facts(self) -> dict[str, object]:
        """For the record."""
        files = [str(name) for name in self._files]
        return {
            "layers": [layer.index for layer in self.layers],
            "bytes_per_pass": self.bytes_per_pass,
            "direct": self.direct,
            "file_system": self.file_system,
            "files": len(files),
            "file": files[0],
        }

    def _fill(self, slot: int, layer: int) -> None:
        self._holds[slot] = layer
        self._reading[slot] = [
            self._threads.submit(self._read, slot, extent, start)
            for extent in self._extents[layer]
            for start in range(extent.start, extent.end, PIECE_BYTES)
        ]

    def _read(self, slot: int, extent: Extent, start: int) -> tuple[float, float]:
        """In a reader thread: one piece."""
        begun, at = time.perf_counter(), extent.base + start - extent.start
        size = min(PIECE_BYTES, extent.start + extent.size - start)
        needed = min(size, extent.end - start)
        self._files[extent.file].read(self._views[slot][at : at + size], start, needed)
        return begun, time.perf_counter()

    def _wait(self, slot: int) -> None:
        times = [piece.result() for piece in self._reading[slot]]
        if times:
            begin, end = min(begun for begun, _ in times), max(ended for _, ended in times)
            self._busy += max(0.0, end - max(begin, self._last_end))
            self._last_end = max(end, self._last_end)
            self._reading[slot] = []
        for name in {extent.file for extent in self._extents[self._holds[slot]]}:
            self._files[name].check()

    def _settle(self) -> None:
        wait([piece for pieces in self._reading for piece in pieces])
        self._reading = [[] for _ in self._reading]

    def _seconds(self) -> float:
        return self._busy

    def lock(self) -> None:
        """Page-lock the slots, for copies to a CUDA device.

        Raises:
            SubspecError: see :class:`~subspec.utils.pinned.PinnedBuffer`.
        """
        for buffer in self._buffers:
            buffer.lock()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._held.close()


def measure_disk(layers: Sequence[StoredLayer], slots: int) -> float:
    """Bandwidth of the disk as a ring reads these layers, in 1e9 bytes per second.

    Raises:
        SubspecError: the layers cannot be read.
    """
    ring = DiskRing(layers, min(slots, len(layers)), note=lambda _: None)
    try:
        done, started = 0, time.perf_counter()
        while True:
            size = ring.sizes[ring.position]
            ring.acquire()
            ring.release()
            done, seconds = done + size, time.perf_counter() - started
            if seconds > PROBE_SECONDS or done >= max(PROBE_BYTES, size):
                return done / seconds / 1e9
    finally:
        ring.close()


def _check_first_read(layer: StoredLayer, read: Mapping[str, Tensor], source: LayerSource) -> None:
    """Compare what a ring read with the layer's checksum, or with the target's own files as every run reads them.

    Raises:
        SubspecError: they differ.
    """
    if layer.sha256 is not None:
        same, remedy = layer_digest(read) == layer.sha256, "remove it: the next run writes it again"
    else:
        exact = source.layer(layer.index, CPU)
        same = all(torch.equal(read[name].view(torch.uint8), exact[name].view(torch.uint8)) for name in read)
        remedy = "fetch or copy it again, and do not write to it while a run reads it"
    if not same:
        file = next(iter(layer.places.values()))[0]
        raise SubspecError(f"{file} gives other weights of layer {layer.index} than it should: {remedy}")


def _file_system(path: Path) -> str:
    """Kind of the file system that holds ``path``, as far as the system tells."""
    try:
        parts = psutil.disk_partitions(all=True)
    except (OSError, RuntimeError):
        return "unknown"
    real = path.resolve()
    found = [part for part in parts if real.is_relative_to(part.mountpoint)]
    return max(found, key=lambda part: len(part.mountpoint)).fstype if found else "unknown"
