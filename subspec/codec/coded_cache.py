"""Coded layers on disk, so that a second start neither codes the exact weights nor reads them.

One file per layer in a folder of the cache (:mod:`subspec.store.layer_files`): the layer's bytes as they cross the
link, read straight into the memory that is pinned, then what they mean (JSON) and its length. The folder's name is the
hash of everything that the code follows from: which target, its dtype, the quantizer with its settings, which Linears
are coded, and :data:`FORMAT`.

That a rebuilt weight is the original bit for bit was proven when it was coded, by decoding and comparing it
(:func:`~subspec.codec.coded_layer.encode_layer`). What could have changed since is checked at every start, before
the layer is used, and whatever differs is coded anew:

* the bytes on the disk: SHA-256 of the file, in the manifest;
* the substitute that decodes them: a checksum of its codes, before anything is decoded with them;
* the device and its software, and all of the above once more: the layer is decoded, and the checksum of every Linear
  compared with the original's (:mod:`subspec.utils.checksum`);
* the target behind the same name: vectors, and the first row of every Linear, with the checkpoint's own
  (``LayerSource.sample``), beside the commit, or path, sizes and dates, that are in the key.
"""

import json
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspec.codec.coded_layer import CodedLayer, CodedPart
from subspec.codec.restore import Rows, Spans
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.store.layer_files import UNREADABLE, LayerFiles
from subspec.store.quantized_cache import CachedCodes
from subspec.store.substitutes import cache_folder
from subspec.utils.checksum import checksum
from subspec.utils.console import Note, print_note
from subspec.utils.disk import MANIFEST, Content
from subspec.utils.pinned import PinnedBuffer

FORMAT = 2
"""Of the files and of the code in them (:mod:`subspec.codec.format`): whoever changes what a bit of either means
raises it."""

LENGTH_BYTES = 8
"""At a file's end: the length of the JSON before them, little-endian."""


@dataclass(frozen=True)
class Checks:
    """Checksums of a coded Linear: of its substitute's codes and of the exact weight."""

    codes: int
    weight: int


@dataclass(frozen=True)
class KeptLayer:
    """A layer from the disk.

    Attributes:
        layer: what its bytes mean.
        checks: by the name of the coded parameter.
        buffer: the bytes; not page-locked yet.
    """

    layer: CodedLayer
    checks: Mapping[str, Checks]
    buffer: PinnedBuffer


def codes_checksum(codes: QuantizedWeight) -> int:
    """Of every tensor of a quantized weight; what else makes it up is in the cache's key."""
    return checksum(*(value for value in vars(codes).values() if isinstance(value, Tensor)))


class CodedCache(LayerFiles):
    """Reads and writes the coded layers of one target and substitute; a context manager.

    A process that finds another one writing does not wait for it, but codes without keeping: whoever waits here may
    hold the lock of the substitute's folder, which the other may be waiting for.

    Args:
        folder: of :func:`coded_folder`; None: remember nothing.
        quantizer: of the substitute, whose codes are needed without the exact weights.
        linears: names of the coded parameters of a layer.
        expected_bytes: of all coded layers.

    Attributes:
        read, coded: layers that were found here, and that were not.
    """

    format = FORMAT
    kind, making, suffix = "coded target", "coding", ".coded"
    waits = False

    def __init__(
        self,
        folder: Path | None,
        quantizer: CachedCodes,
        linears: Collection[str],
        *,
        expected_bytes: int = 0,
        facts: Mapping[str, Any] | None = None,
        note: Note = print_note,
    ) -> None:
        self.quantizer, self.linears = quantizer, tuple(sorted(linears))
        self.read = self.coded = 0
        self._ahead: tuple[int, Future[KeptLayer | None]] | None = None
        super().__init__(folder, expected_bytes=expected_bytes, facts=facts, note=note)
        self._stamp = self._written()

    def close(self) -> None:
        """See :meth:`LayerFiles.close`; what was read ahead in vain is let go."""
        try:
            super().close()
        finally:
            self._ahead = None

    def report(self) -> dict[str, Any]:
        """For the record."""
        return {
            "folder": None if self.folder is None else str(self.folder),
            "read": self.read,
            "coded": self.coded,
            "trouble": self.trouble,
        }

    def summary(self) -> str:
        """For people: where the layers came from."""
        if not self.read:
            return f"{self.coded} layers coded by the substitute"
        return f"{self.read} coded layers read from {self.folder} and {self.coded} coded"

    def has(self, index: int) -> bool:
        """Whether the manifest knows layer ``index``; it is read again when another process has written it."""
        name = self._file(str(index))
        if name not in self._files and not self._locked and (stamp := self._written()) != self._stamp:
            self._stamp, self._files = stamp, self._manifest()
        return name in self._files

    def find(self, index: int) -> KeptLayer | None:
        """Layer ``index`` as it was written; None, and said, when its file is not what the manifest says.

        The layer after it is read ahead.
        """
        ahead, self._ahead = self._ahead, None
        kept = ahead[1].result() if ahead and ahead[0] == index else self._load(index)
        if self._file(str(index + 1)) in self._files:
            self._ahead = index + 1, self._thread.submit(self._load, index + 1)
        return kept

    def reject(self, index: int, why: str) -> None:
        """What was found does not serve: ``why`` ends the sentence "the cached code of layer 3 ..."."""
        self.note(f"the cached code of layer {index} {why}: coding it again")

    def keep(self, index: int, layer: CodedLayer, checks: Mapping[str, Checks], flat: Tensor) -> None:
        """Have a layer written behind; its bytes ``flat`` (uint8, on the host) must not change any more."""
        if self.trouble is not None:
            return
        meaning = json.dumps(asdict(layer) | {"checks": {name: asdict(own) for name, own in checks.items()}})
        text = meaning.encode()
        tail = text + len(text).to_bytes(LENGTH_BYTES, "little")
        self._write_behind(str(index), lambda: [_bytes(flat), tail])

    def _written(self) -> int | None:
        """When the manifest was written, in ns since the epoch; None: there is none."""
        try:
            return None if self.folder is None else (self.folder / MANIFEST).stat().st_mtime_ns
        except OSError:
            return None

    def _load(self, index: int) -> KeptLayer | None:
        name = self._file(str(index))
        expected = self._files.get(name)
        if expected is None or self.folder is None:
            return None
        try:
            with (self.folder / name).open("rb") as stream:
                size = stream.seek(0, 2)
                self._check_size(expected, size)
                stream.seek(-LENGTH_BYTES, 2)
                length = int.from_bytes(stream.read(), "little")
                nbytes = size - LENGTH_BYTES - length
                if nbytes < 0:
                    raise ValueError("its content has changed")
                buffer = PinnedBuffer(nbytes, pin=False)
                stream.seek(0)
                stream.readinto(_bytes(buffer.tensor))
                tail = stream.read()
            self._check_content(expected, _bytes(buffer.tensor), tail)
            layer, checks = _meaning(json.loads(tail[:-LENGTH_BYTES]))
            if layer.nbytes != nbytes:
                raise ValueError(f"{nbytes} bytes of code instead of {layer.nbytes}")
            return KeptLayer(layer, checks, buffer)
        except UNREADABLE as error:
            self._damaged(str(index), error)
            return None


def coded_folder(facts: Mapping[str, Any], linears: Collection[str]) -> Path:
    """Where the cache keeps the coded layers of a target and a substitute with these ``facts``.

    Beside the substitutes', so that one limit counts both.

    Args:
        facts: the substitute's own.
        linears: names of the coded parameters of a layer.
    """
    return cache_folder({**facts, "coded": {"format": FORMAT, "linears": sorted(linears)}})


def _bytes(flat: Tensor) -> Content:
    return memoryview(flat.numpy())


def _meaning(plain: dict[str, Any]) -> tuple[CodedLayer, dict[str, Checks]]:
    checks = {name: Checks(**own) for name, own in plain.pop("checks").items()}
    exact = {name: torch.Size(shape) for name, shape in plain.pop("exact").items()}
    parts = tuple(
        CodedPart(
            **{
                **part,
                "rows": Rows(**part["rows"]),
                "shape": torch.Size(part["shape"]),
                "spans": Spans(**{name: tuple(span) for name, span in part["spans"].items()}),
            }
        )
        for part in plain.pop("parts")
    )
    return CodedLayer(exact=exact, parts=parts, **plain), checks
