"""Coded layers on disk, so that a second start neither codes the exact weights nor reads them.

A file holds a layer's bytes as they cross the link, then their layout and checksums (JSON), then the length of that.
A layer was restored and compared bit by bit when it was coded (:class:`~subspec.codec.coded_layer.Encoder`). At every
start it is checked again before it is used, and a layer that differs is coded anew:

* the bytes on the disk: SHA-256 of the file (:mod:`subspec.store.store`);
* the substitute that restores them: a checksum of its codes, before anything is restored with them;
* the device and its software, and all of the above once more: the layer is restored, and the checksum of every Linear
  compared with the original's (:mod:`subspec.utils.checksum`);
* the target behind the same name: vectors, and the first row of every Linear, are compared with the checkpoint's
  (``LayerSource.sample``), beside the commit, or path, sizes and dates, that are among the store's facts.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from subspec.codec.coded_layer import CodedLayer, CodedPart
from subspec.codec.restore import Rows, Spans
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.store.store import Store
from subspec.store.substitutes import CachedQuantizer
from subspec.utils.checksum import checksum
from subspec.utils.pinned import PinnedBuffer

LENGTH_BYTES = 8
"""At a file's end: the length of the JSON before them, little-endian."""

Checks = Mapping[str, tuple[int, int]]
"""By parameter name: checksums of its substitute's codes and of the exact weight."""


@dataclass(frozen=True)
class KeptLayer:
    """A layer from the disk.

    Attributes:
        layer: the layout of its bytes.
        buffer: the whole file, of which the first ``layer.nbytes`` are the layer's; not page-locked yet.
    """

    layer: CodedLayer
    checks: Checks
    buffer: PinnedBuffer


def codes_checksum(codes: QuantizedWeight) -> int:
    """Of every tensor of a quantized weight; its other properties are among the store's facts."""
    return checksum(*codes.row_tensors)


class CodedCache(Store[KeptLayer]):
    """The coded layers of one target and substitute.

    A process that finds another one writing does not wait, but codes without keeping: it may hold the lock of the
    substitute's folder, which the other one may be waiting for.

    Args:
        facts: the substitute's.
        quantizer: of the substitute, whose codes are needed without the exact weights.
        linears: names of the coded parameters of a layer.
        options: of :class:`~subspec.store.store.Store`.
    """

    name, making, made_as, suffix = "coded target", "coding", "coded", ".coded"
    format = 3
    """Raise it with every change of the files or of the code in them (:mod:`subspec.codec.format`)."""
    waits = False

    def __init__(
        self, facts: Mapping[str, Any], quantizer: CachedQuantizer, linears: Collection[str], **options: Any
    ) -> None:
        self.quantizer, self.linears = quantizer, tuple(sorted(linears))
        super().__init__({**facts, "linears": self.linears}, **options)

    def summary(self) -> str:
        """For people: where the layers came from."""
        if not self.read:
            return f"{self.made} layers coded by the substitute"
        return f"{self.read} coded layers read from {self.folder} and {self.made} coded"

    def keep(self, index: int, layer: CodedLayer, checks: Checks, flat: Tensor) -> None:
        """Write a layer; its bytes ``flat`` (uint8, on the host) must not change any more."""
        text = json.dumps({**asdict(layer), "checks": checks}).encode()
        tail = text + len(text).to_bytes(LENGTH_BYTES, "little")
        self.put(index, lambda: [memoryview(flat.numpy()), tail])

    def parse(self, content: PinnedBuffer) -> KeptLayer:
        raw = memoryview(content.tensor.numpy())
        length = int.from_bytes(raw[-LENGTH_BYTES:], "little")
        nbytes = len(raw) - LENGTH_BYTES - length
        plain = json.loads(bytes(raw[max(nbytes, 0) : -LENGTH_BYTES]))
        if nbytes != plain["nbytes"]:
            raise ValueError(f"{nbytes} bytes of code instead of {plain['nbytes']}")
        checks = {name: (int(codes), int(weight)) for name, (codes, weight) in plain.pop("checks").items()}
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
        return KeptLayer(CodedLayer(exact=exact, parts=parts, **plain), checks, content)
