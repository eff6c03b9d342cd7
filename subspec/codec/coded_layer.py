"""Exact weights coded by a substitute: one run of bytes, and the step that turns it into parameters again.

The run of a decoder layer holds, first, the parameters that are not coded (norms, biases, Linears that are not
quantized) as they are, then the starts of chunks and the bits of every coded Linear (:mod:`subspec.codec.format`).
Layers are restored to bfloat16 in one buffer, in turn: the device computes a layer in far less time than the link takes
for its bytes, so a second buffer would only take room from resident layers. In batch-invariant passes the buffer holds
attention's matrices or a slice of the MLP's, whichever is larger (a fifth of a 7B's layer): slices are restored one by
one, each behind the product with the one before.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.codec import format
from subspec.codec.format import encode
from subspec.codec.restore import Restoration, Restorer, Rows, Spans, restore_into
from subspec.decoding.pass_shapes import SLICED, PassShapes
from subspec.errors import SubspecError
from subspec.kernels.timing import EventLog, logged
from subspec.levels.build import ROLES
from subspec.levels.model import LevelLayer
from subspec.quant.level_linear import LevelLinear
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.targets.layer_bytes import PlainCodec, parameter_views
from subspec.utils.rounding import round_up


@dataclass(frozen=True)
class CodedPart:
    """A coded matrix: where its code lies in a run of bytes, and which rows of the substitute it belongs to.

    Attributes:
        name: of the parameter.
        role: of the fused Linear (a field of :class:`~subspec.levels.model.LevelLayer`), or ``head``.
        rows: of the fused Linear.
        margin: see :class:`~subspec.codec.format.Coded`.
    """

    name: str
    role: str
    rows: Rows
    shape: torch.Size
    spans: Spans
    margin: float

    def piece(self, out: Tensor, linear: LevelLinear, first: int = 0) -> Restoration:
        """What restores its rows from ``first`` on, a multiple of 16, into ``out`` by the substitute's ``linear``."""
        chunk, rest = divmod(first * out.shape[1], format.CHUNK)
        assert rest == first % 16 == 0
        starts = self.spans.starts[0] + 4 * chunk, -(-out.numel() // format.CHUNK)
        rows = Rows(self.rows.first + first * (1 + self.rows.interleaved), self.rows.interleaved)
        return Restoration(out, linear, rows, Spans(starts, self.spans.stream), self.margin)


def bits_per_weight(parts: Iterable[CodedPart]) -> float:
    """Bits of code per weight, on average."""
    parts = list(parts)
    words = sum(part.spans.starts[1] + part.spans.stream[1] for part in parts)
    return 32 * words / max(1, sum(part.shape.numel() for part in parts))


@dataclass(frozen=True)
class CodedLayer:
    """The layout of a coded layer's bytes.

    Attributes:
        exact: shapes of the parameters that are not coded, laid out in front by
            :func:`~subspec.targets.layer_bytes.parameter_views`; ``exact_bytes`` of them.
    """

    exact: Mapping[str, torch.Size]
    exact_bytes: int
    parts: tuple[CodedPart, ...]
    nbytes: int


class Encoder:
    """Codes matrices into one run of bytes behind ``first`` free ones, and proves each: it is restored and compared.

    ``parts`` and ``nbytes`` are those so far.
    """

    def __init__(self, first: int = 0) -> None:
        self.nbytes = first
        self.parts: tuple[CodedPart, ...] = ()
        self._words: list[tuple[int, Tensor]] = []

    def add(
        self, name: str, role: str, rows: Rows, weight: Tensor, codes: QuantizedWeight, linear: LevelLinear
    ) -> None:
        """Append a matrix, bfloat16 [n, k]; ``rows`` of the substitute's fused ``linear`` are made of its ``codes``.

        Raises:
            SubspecError: it is not restored bit for bit (a defect of this device or its software).
            TypeError: ``codes`` bound no weight.
        """
        coded = encode(weight, codes, codes.margin)
        check = torch.empty_like(weight, memory_format=torch.contiguous_format)
        restore_into(check, coded, linear, rows)
        if not torch.equal(check.view(torch.int16), weight.contiguous().view(torch.int16)):
            raise SubspecError(
                f"offload.codec=substitute: {name} was not rebuilt bit for bit: set offload.codec=none, and please "
                "report it with the versions in the run's folder"
            )
        spans = []
        for words in (coded.starts, coded.stream):
            self._words.append((self.nbytes, words))
            spans.append((self.nbytes, words.numel()))
            self.nbytes += round_up(4 * words.numel(), PlainCodec.ALIGNMENT)
        self.parts += (CodedPart(name, role, rows, coded.shape, Spans(*spans), coded.margin),)

    def flat(self, device: torch.device) -> Tensor:
        """The run, uint8 on ``device``; the bytes in front are not written."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for first, words in self._words:
            flat[first : first + 4 * words.numel()].view(torch.int32).copy_(words)
        return flat


def coded_rows(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[str, Rows]]:
    """The role of every Linear that may be coded, and its rows of the fused Linear, by parameter name."""
    found: dict[str, tuple[str, Rows]] = {}
    for role, names in ROLES.items():
        first = 0
        for number, name in enumerate(names):
            parameter = f"{name}.weight"
            found[parameter] = (role, Rows(16 * number, True) if role == "gate_up" else Rows(first, False))
            first += shapes[parameter][0]
    return found


def encode_layer(
    tensors: Mapping[str, Tensor], codes: Mapping[str, QuantizedWeight], substitute: LevelLayer
) -> tuple[CodedLayer, Tensor]:
    """Code a layer with :class:`Encoder`, whose errors it raises.

    Args:
        tensors: the layer's parameters by name, bfloat16.
        codes: of the substitute's Linears, by parameter name; ``substitute`` is made of them.

    Returns:
        The layout of the bytes, and the bytes, uint8 on the tensors' device.
    """
    places = coded_rows({name: tensor.shape for name, tensor in tensors.items()})
    exact = {name: tensor.shape for name, tensor in tensors.items() if name not in codes}
    exact_bytes = PlainCodec().layer_bytes(exact)
    encoder = Encoder(exact_bytes)
    for name, own in codes.items():
        role, rows = places[name]
        encoder.add(name, role, rows, tensors[name], own, getattr(substitute, role))
    flat = encoder.flat(next(iter(tensors.values())).device)
    for name, view in parameter_views(flat, exact, torch.bfloat16).items():
        view.copy_(tensors[name])
    return CodedLayer(exact, exact_bytes, encoder.parts, encoder.nbytes), flat


def slice_shapes(shapes: Mapping[str, torch.Size], role: str, first: int, count: int) -> dict[str, torch.Size]:
    """Shapes of a slice of a role's matrices, those of them that ``shapes`` has."""
    names = [f"{module}.weight" for module in ROLES[role]]
    known = {name: shapes[name] for name in names if name in shapes}
    return {name: torch.Size((min(count, n - first), k)) for name, (n, k) in known.items()}


def sliced_parameters(passes: PassShapes | None) -> list[str]:
    """Names of a layer's parameters that are restored slice by slice; the others are restored together."""
    return [f"{module}.weight" for role in SLICED for module in ROLES[role]] if passes else []


def restored_bytes(shapes: Mapping[str, torch.Size], coded: Collection[str], passes: PassShapes | None) -> int:
    """Bytes of a :class:`LayerRestorer`'s buffer.

    Args:
        shapes: of a layer's parameters by name. coded: names of those that are coded.
        passes: that run the layers; None: transformers' modules do, which need all parameters at once.
    """
    size, sliced = PlainCodec().layer_bytes, [name for name in sliced_parameters(passes) if name in coded]
    matrices = {name: shapes[name] for name in sliced}
    slices = [slice_shapes(matrices, role, *rows) for role in SLICED for rows in passes.slices(role)] if passes else []
    exact = size({name: shapes[name] for name in shapes if name not in coded})
    together = size({name: shapes[name] for name in shapes if name not in sliced})
    return max([together, *(exact + size(own) for own in slices)])


class LayerRestorer:
    """Restores layers in one buffer on ``device``, whole or slice by slice.

    Args:
        layers: layouts of the coded layers, by layer number.
        substitute: the fused layers, all of them.
        shapes: of a layer's parameters.
        resident: bytes of the coded layers that stay on the device.
        passes: that run the layers; None: they are restored whole.

    Attributes:
        parameters: by name, those of the layer restored last, as views into the buffer; those that are restored in
            slices have a shape only.
        slices: role, first row and number of rows of each, in the order of use; empty: layers are restored whole.
        log: takes (layer number, begin, end) of everything restored, when it is a list.
    """

    def __init__(
        self,
        layers: Mapping[int, CodedLayer],
        substitute: Sequence[LevelLayer],
        shapes: Mapping[str, torch.Size],
        resident: Mapping[int, Tensor],
        device: torch.device,
        passes: PassShapes | None = None,
    ) -> None:
        self.layers, self.resident, self.passes = layers, resident, passes
        # The parameters that are not coded come first, as in the coded bytes: one copy moves all of them.
        exact = next(iter(layers.values())).exact
        ordered = {**exact, **{name: shape for name, shape in shapes.items() if name not in exact}}
        self.buffer = torch.empty(
            restored_bytes(shapes, ordered.keys() - exact.keys(), passes), dtype=torch.uint8, device=device
        )
        sliced = {name: ordered.pop(name) for name in sliced_parameters(passes) if name not in exact}
        self.parameters = parameter_views(self.buffer, ordered, torch.bfloat16)
        self.parameters |= {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in sliced.items()
        }
        self.slices = [(role, *rows) for role in SLICED for rows in passes.slices(role)] if passes else []
        self._together: dict[int, Restorer] = {}
        self._slices: dict[tuple[int, str, int], tuple[Restorer, list[Tensor]]] = {}
        for index, layer in layers.items():
            parts = [part for part in layer.parts if part.name in ordered]
            self._together[index] = Restorer(
                [part.piece(self.parameters[part.name], getattr(substitute[index], part.role)) for part in parts]
            )
            for role, first, count in self.slices:
                linear = getattr(substitute[index], role)
                self._slices[index, role, first] = self._slice(layer, linear, role, first, count)
        self._current: tuple[int, Tensor] | None = None
        self.log: EventLog | None = None

    def _slice(
        self, layer: CodedLayer, linear: LevelLinear, role: str, first: int, count: int
    ) -> tuple[Restorer, list[Tensor]]:
        """What restores rows of a role's matrices, and the rows in the buffer."""
        parts = {part.name: part for part in layer.parts}
        slices = slice_shapes({name: part.shape for name, part in parts.items()}, role, first, count)
        views = parameter_views(self.buffer[layer.exact_bytes :], slices, torch.bfloat16)
        pieces = [parts[name].piece(view, linear, first) for name, view in views.items()]
        names = [f"{module}.weight" for module in ROLES[role]]
        rows = [views[name] if name in views else self.parameters[name][first : first + count] for name in names]
        return Restorer(pieces), rows

    @property
    def bits_per_weight(self) -> float:
        """See :func:`bits_per_weight`."""
        return bits_per_weight(part for layer in self.layers.values() for part in layer.parts)

    def restore(self, index: int, flat: Tensor) -> None:
        """Begin with layer ``index``, from its bytes ``flat`` (uint8, on the device); slices are read later."""
        with logged(self.log, index):
            exact = self.layers[index].exact_bytes
            self.buffer[:exact].copy_(flat[:exact])
            self._together[index](flat)
        self._current = index, flat

    def restored(self, role: str, first: int) -> list[Tensor]:
        """The slice of a role's matrices from row ``first`` on, bfloat16, until the next one is asked for."""
        if role not in SLICED:
            return [self.parameters[f"{module}.weight"] for module in ROLES[role]]
        assert self._current is not None
        index, flat = self._current
        restorer, rows = self._slices[index, role, first]
        with logged(self.log, index):
            restorer(flat)
        return rows
