"""Quantized weights of a substitute on disk: one safetensors file per decoder layer, and one for the LM head.

A weight's tensors are kept with the checksum of the exact weight that they were made from, which is compared before
they are used: a stale file costs a new quantization, never a worse draft.

Example::

    with SubstituteStore(facts, expected_bytes=3_670_000_000) as store:
        quantizer = CachedQuantizer(hqq_quantizer(), store)
        for index in range(layers):
            codes = quantizer.quantize(weight, f"{index}.mlp.up_proj")
            quantizer.end_layer()
    store.report()
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.quant.weight_format import FormatQuantizer
from subspec.store.store import Index, Store
from subspec.utils.checksum import checksum
from subspec.utils.pinned import PinnedBuffer

R = TypeVar("R")

Layer = dict[str, dict[str, Tensor]]
"""A layer's tensors by module and part; the part :data:`ORIGIN` is the checksum of the exact weight."""

ORIGIN = "of"


class SubstituteStore(Store[Layer]):
    """The quantized weights of one substitute, written layer by layer.

    A weight's name is ``LAYER.path.of.module``, or ``headBITS.lm_head``. Layers are asked for in ascending order, so
    that the next one can be read ahead.
    """

    name, making, made_as, suffix = "quantized substitute", "quantizing", "quantized", ".safetensors"
    format = 3
    _layer: Index | None = None
    _stored: Layer
    _fresh: Layer

    def stored(self, name: str) -> Mapping[str, Tensor] | None:
        """The tensors kept under a name, on the CPU, of any exact weight; None: none are kept."""
        number, _, module = name.partition(".")
        layer = int(number) if number.isdecimal() else number
        if layer != self._layer:
            self.end_layer()
            self._layer, self._stored = layer, self.get(layer) or {}
        return self._stored.get(module)

    def remember(
        self,
        weight: Tensor,
        name: str,
        *,
        restore: Callable[[Mapping[str, Tensor]], R | None],
        make: Callable[[], R],
        tensors: Callable[[R], Mapping[str, Tensor]],
    ) -> R:
        """The quantized form of a weight, from the disk or made now; a new one reaches the disk by :meth:`end_layer`.

        Args:
            restore: from the tensors; None: they do not fit.
            make: quantizes the weight.
            tensors: what the disk keeps of the result.
        """
        stored = self.stored(name)
        module = name.partition(".")[2]
        if stored is not None:
            same = ORIGIN in stored and int(stored[ORIGIN]) == checksum(weight)
            found = restore(stored) if same else None
            if found is not None:
                self.read += 1
                return found
            if self.owned:
                raise self._refusal(f"its layer {self._layer}, {module} was made from other weights")
            self.note(f"layer {self._layer}, {module} of the cached {self.name} is of other weights: quantizing it")
        self.made += 1
        result = make()
        if self.trouble is None:
            self._fresh[module] = {**tensors(result), ORIGIN: torch.tensor(checksum(weight))}
        return result

    def end_layer(self) -> None:
        """Write what is new in the layer."""
        if self._layer is not None and self._fresh:
            layer = self._stored | self._fresh
            self.put(self._layer, lambda: [_serialized(layer)])
        self._layer, self._stored, self._fresh = None, {}, {}

    def parse(self, content: PinnedBuffer) -> Layer:
        layer: Layer = {}
        for key, tensor in load_tensors(content.tensor.numpy().tobytes()).items():
            module, _, part = key.rpartition(":")
            layer.setdefault(module, {})[part] = tensor
        return layer


def _serialized(layer: Layer) -> bytes:
    return save_tensors({f"{module}:{part}": t for module, parts in layer.items() for part, t in parts.items()})


class CachedQuantizer(FormatQuantizer):
    """The quantizer ``inner`` with results kept in ``store``, which its owner closes."""

    def __init__(self, inner: FormatQuantizer, store: SubstituteStore) -> None:
        super().__init__(inner.default, inner.by_linear)
        self.store = store

    def quantize(self, weight: Tensor, name: str | None = None) -> QuantizedWeight:
        """Codes of a weight; without a name they are neither read nor kept."""
        make = super().quantize
        if name is None:
            return make(weight)
        n, k = weight.shape
        return self.store.remember(
            weight,
            name,
            restore=lambda stored: self.format_of(name).restore(stored, (n, k), weight.device),
            make=lambda: make(weight, name),
            tensors=lambda codes: codes.tensors(),
        )

    def layer(
        self, index: int, shapes: Mapping[str, torch.Size], device: torch.device
    ) -> dict[str, QuantizedWeight] | None:
        """A layer's codes from the disk alone, not counted as read; None: some are not kept.

        The exact weights are not compared: the caller has to check that they are the same. ``shapes``: of the layer's
        quantized weights, by the module's path.
        """
        found: dict[str, QuantizedWeight] = {}
        for module, (n, k) in shapes.items():
            name = f"{index}.{module}"
            stored = self.store.stored(name)
            codes = None if stored is None else self.format_of(name).restore(stored, (n, k), device)
            if codes is None:
                return None
            found[module] = codes
        return found

    def end_layer(self) -> None:
        """Write what was quantized."""
        self.store.end_layer()


class CachedModules:
    """HQQ's quantizer of modules (``inner``) with results kept on disk; a context manager for the store."""

    def __init__(self, inner: HqqQuantizer, store: SubstituteStore) -> None:
        self.inner, self.store = inner, store
        self.name, self.backend, self.stored_bytes = inner.name, inner.backend, inner.stored_bytes

    def __enter__(self) -> "CachedModules":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:  # otherwise the last layer is not complete
                self.store.end_layer()
        finally:
            self.store.close()

    def quantize(self, linear: nn.Linear, name: str) -> nn.Module:
        """See :meth:`Quantizer.quantize`; ``name`` is ``layers.LAYER.path``, or that of the LM head."""
        inner = self.inner
        key = name.removeprefix("layers.") if name.startswith("layers.") else f"head.{name}"
        packed = self.store.remember(
            linear.weight,
            key,
            restore=lambda stored: inner.restore(stored, linear, name),
            make=lambda: inner.pack(linear, name),
            tensors=inner.tensors,
        )
        return inner.finish(packed, linear)
