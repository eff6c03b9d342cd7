"""Codes of a fused substitute that are quantized once: a second start has them from disk (and does not import hqq).

Example::

    with CachedCodes(HqqCodes(), SubstituteStore(folder, expected_bytes=3_670_000_000)) as quantizer:
        for index in range(layers):
            codes = quantizer.codes(weight, f"{index}.mlp.up_proj")
            quantizer.end_layer()
    quantizer.report()
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from subspec.quant.quantized_weight import CodeQuantizer, QuantizedWeight
from subspec.store.substitutes import SubstituteStore


class CachedCodes:
    """A :class:`~subspec.quant.quantized_weight.CodeQuantizer` that keeps its codes and leaves the work to another.

    Args:
        inner: quantizes what is not there.
        store: where codes are kept; closed by :meth:`close`.
    """

    def __init__(self, inner: CodeQuantizer, store: SubstituteStore) -> None:
        self.inner, self.store = inner, store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See :meth:`SubstituteStore.close`."""
        self.store.close()

    def report(self) -> dict[str, Any]:
        """For the record."""
        return self.store.report()

    @property
    def facts(self) -> Mapping[str, Any]:
        """The inner quantizer's."""
        return self.inner.facts

    def stored_bytes(self, shape: tuple[int, int], name: str) -> int:
        """The inner quantizer's."""
        return self.inner.stored_bytes(shape, name)

    def codes_bytes(self, shape: tuple[int, int], name: str) -> int:
        """The inner quantizer's."""
        return self.inner.codes_bytes(shape, name)

    def peak_bytes(self, shape: tuple[int, int], name: str) -> int:
        """The inner quantizer's."""
        return self.inner.peak_bytes(shape, name)

    def restore(
        self, stored: Mapping[str, Tensor], shape: tuple[int, int], name: str, device: torch.device
    ) -> QuantizedWeight | None:
        """The inner quantizer's."""
        return self.inner.restore(stored, shape, name, device)

    def codes(self, weight: Tensor, name: str | None = None) -> QuantizedWeight:
        """Codes of a weight, from the disk if they are there; without a name from the quantizer."""
        store = self.store
        stored = None if name is None else store.find(weight, name)
        if stored is not None and name is not None:
            n, k = weight.shape
            codes = self.inner.restore(stored, (n, k), name, weight.device)
            if codes is not None:
                store.read += 1
                return codes
            store.reject(name)
        store.quantized += 1
        codes = self.inner.codes(weight, name)
        if name is not None and store.trouble is None:
            store.keep(weight, name, codes.tensors())
        return codes

    def layer(
        self, index: int, shapes: Mapping[str, torch.Size], device: torch.device
    ) -> dict[str, QuantizedWeight] | None:
        """A layer's codes from the disk alone; None: not all of them are there.

        Nothing says that they were made from the weights that the target has now: whoever takes them has to know it.

        Args:
            shapes: of the layer's quantized weights, by the module's path.

        Returns:
            Codes by the same names, not counted as read yet.
        """
        found: dict[str, QuantizedWeight] = {}
        for module, (n, k) in shapes.items():
            name = f"{index}.{module}"
            stored = self.store.stored(name)
            codes = None if stored is None else self.inner.restore(stored, (n, k), name, device)
            if codes is None:
                return None
            found[module] = codes
        return found

    def end_layer(self) -> None:
        """Hand what was quantized to the disk."""
        self.inner.end_layer()
        self.store.end_layer()
