"""Modules that are quantized once: a second start builds them from disk, without HQQ's optimisation.

Example::

    with CachedModules(HqqQuantizer(...), SubstituteStore(folder)) as quantizer:
        quantize_model(substitute, quantizer, modules=["attention", "mlp"], skip_layers=[])
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from subspec.quant.base import Quantizer
from subspec.store.substitutes import SubstituteStore


@runtime_checkable
class StorableQuantizer(Quantizer, Protocol):
    """A :class:`~subspec.quant.base.Quantizer` whose results can be kept.

    Attributes:
        facts: everything that its results follow from besides the weight (JSON types).
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def stored_shape_bytes(self, shape: torch.Size, name: str) -> int:
        """Bytes of a weight's packed form, from its shape alone."""

    def pack(self, linear: nn.Linear, name: str) -> nn.Module:
        """The packed form of a Linear, which takes the work."""

    def tensors(self, packed: nn.Module) -> dict[str, Tensor]:
        """What a file keeps of the packed form."""

    def restore(self, stored: Mapping[str, Tensor], linear: nn.Linear, name: str) -> nn.Module | None:
        """The packed form from its tensors, bit for bit; None when they do not fit the Linear."""

    def finish(self, packed: nn.Module, linear: nn.Linear) -> nn.Module:
        """What stands in for the Linear."""


class CachedModules:
    """A :class:`~subspec.quant.base.Quantizer` that remembers its results, and leaves the work to another.

    Args:
        inner: quantizes what is not there.
        store: where results are kept; closed by :meth:`close`.
    """

    def __init__(self, inner: StorableQuantizer, store: SubstituteStore) -> None:
        self.inner, self.store = inner, store
        self.name = inner.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(kind is None)

    def close(self, complete: bool = True) -> None:
        """Write what is left (of a layer that is ``complete``), see also :meth:`SubstituteStore.close`."""
        try:
            if complete:
                self.store.end_layer()
        finally:
            self.store.close()

    @property
    def backend(self) -> str:
        """The inner quantizer's."""
        return self.inner.backend

    def stored_bytes(self, linear: nn.Linear, name: str = "") -> int:
        """The inner quantizer's."""
        return self.inner.stored_bytes(linear, name)

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        """From the disk if it is there."""
        store, key = self.store, _key(name)
        stored = store.find(linear.weight, key)
        packed = None
        if stored is not None:
            packed = self.inner.restore(stored, linear, name)
            if packed is None:
                store.reject(key)
        if packed is None:
            packed = self.inner.pack(linear, name)
            store.quantized += 1
            store.keep(linear.weight, key, self.inner.tensors(packed))
        else:
            store.read += 1
        return self.inner.finish(packed, linear)


def _key(name: str) -> str:
    """``layers.3.mlp.up_proj`` -> ``3.mlp.up_proj``; what is in no layer -> ``head.<name>``."""
    return name.removeprefix("layers.") if name.startswith("layers.") else f"head.{name}"
