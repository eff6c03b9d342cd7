"""Coding a target while it is loaded: layer by layer on the device, the code to the host, the resident one back.

Layers that an earlier run coded are taken from the disk (:mod:`subspec.codec.coded_cache`), without the exact weights.
"""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

from subspec.codec.coded_cache import CodedCache, KeptLayer, codes_checksum
from subspec.codec.coded_layer import CodedLayer, LayerRestorer, encode_layer
from subspec.codec.restore import Restorer
from subspec.decoding.pass_shapes import PassShapes
from subspec.errors import SubspecError
from subspec.levels.build import SubstituteBuilder
from subspec.levels.model import LevelLayer
from subspec.targets.layer_bytes import parameter_views
from subspec.targets.source import LayerSource
from subspec.utils.checksum import checksum
from subspec.utils.pinned import PinnedBuffer


class HostMemory(Protocol):
    """Page-locked host memory (:class:`subspec.offload.loader.PinnedMemory`): uint8."""

    def allocate(self, nbytes: int) -> Tensor: ...

    def adopt(self, buffer: PinnedBuffer) -> Tensor: ...

    def release(self, tensor: Tensor) -> None: ...


class TargetCoding:
    """Takes a target's layers: builds the substitute's and codes the exact ones by them, or restores both from a file.

    Args:
        source: of the exact weights, of which only a sample is read where a layer is restored.
        builder: of the substitute.
        memory: of the layers that stream from host memory.
        resident: layers that the plan keeps on ``device``.
        cache: of what earlier runs coded; None: nothing is kept.
        on_disk: layers that stream from the cache's files.
        in_files: whether all others, too, wait in their files until :meth:`place`.

    Attributes:
        layers: layouts of the coded layers' bytes.
        streamed: pinned bytes of the coded layers that stream from host memory.
    """

    def __init__(
        self,
        source: LayerSource,
        builder: SubstituteBuilder,
        memory: HostMemory,
        device: torch.device,
        *,
        resident: set[int],
        cache: CodedCache | None = None,
        on_disk: Collection[int] = (),
        in_files: bool = False,
    ) -> None:
        self._source, self._builder, self._memory, self._device = source, builder, memory, device
        self._planned, self._cache, self.on_disk = resident, cache, on_disk
        self._in_files = in_files
        if in_files:
            assert cache is not None  # as planned
            cache.required = True
        builder.keeps_codes = True
        self._held: dict[int, Tensor] = {}  # resident ones, on the host for now
        self.layers: dict[int, CodedLayer] = {}
        self.streamed: dict[int, Tensor] = {}

    def needs(self, index: int) -> bool:
        """Whether the layer has to be read, and coded unless the substitute keeps it exact."""
        if index in self._builder.skip_layers:
            return True
        restored = self._restore(index)
        if restored is not None:
            self._builder.layers.append(restored)
        return restored is None

    def take(self, index: int, layer: Mapping[str, Tensor]) -> None:
        """Code a layer with :func:`~subspec.codec.coded_layer.encode_layer`; its exact tensors may be freed then."""
        builder = self._builder
        builder.take(index, layer)
        codes, builder.codes = builder.codes, {}
        if not codes:
            return
        self.layers[index], flat = encode_layer(layer, codes, builder.layers[-1])
        if self._in_files:
            host = flat.cpu()
        elif index in self._planned:
            # To the host for now: the quantizer's temporaries and the resident layers need not fit at once.
            self._held[index] = host = flat.cpu()
        else:
            self.streamed[index] = host = self._memory.allocate(flat.numel())
            host.copy_(flat)
        if self._cache is not None:
            self._cache.made += 1
            if self._cache.trouble is None:
                checks = {name: (codes_checksum(own), checksum(layer[name])) for name, own in codes.items()}
                self._cache.keep(index, self.layers[index], checks, host)

    def _restore(self, index: int) -> LevelLayer | None:
        """The substitute of a layer as an earlier run coded it, checked as :mod:`subspec.codec.coded_cache` says.

        None: the layer has to be read and coded.
        """
        source, builder, device = self._source, self._builder, self._device
        cache = self._cache
        if cache is None or not cache.has(index):
            return None
        shapes = source.layer_shapes(index)
        linears = {name.removesuffix(".weight"): shapes[name] for name in cache.linears}
        found = cache.quantizer.layer(index, linears, device)
        kept = None if found is None else cache.get(index)
        if found is None or kept is None:
            return None

        def reject(why: str) -> None:
            cache.note(f"the cached code of layer {index} {why}: coding it again")

        # All layers are restored into one buffer, to which the exact parameters are copied in one run.
        if list(kept.layer.exact.items()) != [own for own in shapes.items() if own[0] not in cache.linears]:
            return reject("is laid out otherwise")
        codes = {f"{module}.weight": own for module, own in found.items()}
        if {name: own for name, (own, _) in kept.checks.items()} != {
            name: codes_checksum(own) for name, own in codes.items()
        }:
            return reject("is of another substitute")
        counted = builder.modules, builder.weights, builder.stored_bytes
        exact = parameter_views(kept.buffer.tensor, kept.layer.exact, torch.bfloat16)
        on_device = {name: tensor.to(device) for name, tensor in exact.items()}
        substitute = builder.build_layer(on_device, device, index=index, known=codes)
        modules = len(codes)
        del found, codes  # room for the restored Linears
        if (problem := _problem(kept, substitute, source.sample(index), device)) is not None:
            builder.modules, builder.weights, builder.stored_bytes = counted
            return reject(problem)
        cache.read += 1
        cache.quantizer.store.read += modules
        self.layers[index] = kept.layer
        if not self._in_files:
            resident = index in self._planned
            flat = kept.buffer.tensor if resident else self._memory.adopt(kept.buffer)
            (self._held if resident else self.streamed)[index] = flat[: kept.layer.nbytes]
        return substitute

    def _take(self, index: int) -> Tensor:
        """The bytes of a layer that is neither on the device nor pinned yet."""
        if (held := self._held.pop(index, None)) is not None:
            return held
        assert self._cache is not None
        self._cache.flush()
        if (kept := self._cache.get(index, ahead=False)) is None:
            raise SubspecError(
                f"the coded layer {index} cannot be read from {self._cache.folder}, where it was before: "
                "check the disk, and start again"
            )
        return kept.buffer.tensor[: kept.layer.nbytes]

    def place(self, room: int, slots: int, *, more: bool) -> None:
        """Pin the layers that stream from host memory, after loading.

        Code that came out larger than planned streams instead of being resident, last layers first, until it fits.

        Args:
            room: device bytes that there are for resident coded layers and ring slots.
            slots: of the ring.
            more: let layers that stream from host memory stay, too, if the code came out smaller and they fit.
        """
        resident = sorted(self._planned & self.layers.keys())

        def taken() -> int:
            sizes = {index: layer.nbytes for index, layer in self.layers.items()}
            kept = sum(sizes.pop(index) for index in resident)
            return kept + max(slots, 1) * max(sizes.values(), default=0)

        while resident and taken() > room:
            resident.pop()
        while more and len(others := sorted(self.layers.keys() - {*resident, *self.on_disk})) > max(slots, 2):
            # One in the middle: a pass begins and ends with streamed layers.
            resident.append(index := others[len(others) // 2])
            if taken() > room:
                resident.pop()
                break
            if (pinned := self.streamed.pop(index, None)) is not None:
                self._held[index] = pinned.clone()
                self._memory.release(pinned)
        self._planned = set(resident)
        for index in sorted(self.layers.keys() - {*resident, *self.on_disk, *self.streamed}):
            self.streamed[index] = self._memory.allocate(self.layers[index].nbytes)
            self.streamed[index].copy_(self._take(index))

    def decoder(self, passes: PassShapes | None) -> LayerRestorer | None:
        """Restores the coded layers; resident ones' bytes are moved to the device. None: no layer is coded.

        ``passes``: as of :class:`~subspec.codec.coded_layer.LayerRestorer`.
        """
        if not self.layers:
            return None
        shapes, device = self._source.layer_shapes(0), self._device
        resident = {index: self._take(index).to(device) for index in sorted(self._planned & self.layers.keys())}
        return LayerRestorer(self.layers, self._builder.layers, shapes, resident, device, passes)


def _problem(kept: KeptLayer, substitute: LevelLayer, sample: Mapping[str, Tensor], device: torch.device) -> str | None:
    """How a layer from the disk differs from the one that was coded; None: bit for bit the same.

    Args:
        substitute: made of the codes that the layer was coded with.
        sample: of the target's weights as they are now.
    """
    exact = parameter_views(kept.buffer.tensor, kept.layer.exact, torch.bfloat16)
    if not all(_same(tensor[:1] if tensor.dim() > 1 else tensor, sample.get(name)) for name, tensor in exact.items()):
        return "is of other weights"
    flat = kept.buffer.tensor[: kept.layer.nbytes].to(device)
    for part in kept.layer.parts:
        restored = torch.empty(part.shape, dtype=torch.bfloat16, device=device)
        Restorer([part.piece(restored, getattr(substitute, part.role))])(flat)
        if checksum(restored) != kept.checks[part.name][1]:
            return "is not rebuilt to what it was made from"
        if not _same(restored[:1].cpu(), sample.get(part.name)):
            return "is of other weights"
    return None


def _same(kept: Tensor, now: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit; True without the second one."""
    return now is None or torch.equal(kept.view(torch.int16), now.contiguous().view(torch.int16))
