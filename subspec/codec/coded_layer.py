"""A coded decoder layer: one run of bytes that crosses the link, and the step that turns it into parameters again.

The run holds, first, what the substitute knows nothing of (norms, biases, Linears that are not quantized) as it is,
then for every quantized Linear where its chunks begin and its bits (:mod:`subspec.codec.format`). Decoding fills one
buffer in bfloat16 that every layer of a pass is decoded into in turn: the device computes a layer in far less time than
the link takes for its bytes, so one buffer is enough, and what others would take is better spent on resident layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspec.codec.format import Coded, encode
from subspec.codec.restore import Piece, PieceRestorer, Rows, Spans, decode_into
from subspec.errors import SubspecError
from subspec.levels.build import ROLES
from subspec.levels.model import FusedLayer
from subspec.quant.intervals import margin_of
from subspec.quant.level_linear import LevelLinear
from subspec.quant.quantized_weight import QuantizedWeight
from subspec.targets.layer_bytes import PlainCodec, parameter_views
from subspec.utils.rounding import round_up


@dataclass(frozen=True)
class CodedPart:
    """Where a Linear's code lies in its layer's bytes, and where its substitute is.

    Attributes:
        name: of the parameter.
        role: of the fused Linear (a field of :class:`~subspec.levels.captured_draft.FusedLayer`).
        spans: of the layer's bytes.
    """

    name: str
    role: str
    rows: Rows
    shape: torch.Size
    spans: Spans
    margin: float

    @property
    def words(self) -> int:
        """int32 words of the code."""
        return self.spans.starts[1] + self.spans.stream[1]

    def piece(self, out: Tensor, substitute: FusedLayer) -> Piece:
        """What decodes it into ``out``."""
        return Piece(out, getattr(substitute, self.role), self.rows, self.spans, self.margin)


@dataclass(frozen=True)
class CodedLayer:
    """What a layer's bytes mean.

    Attributes:
        exact: shapes of the parameters that are as they are; they lie in front, laid out by
            :func:`~subspec.targets.layer_bytes.parameter_views`.
        exact_bytes: of them.
        parts: the coded ones.
        nbytes: of everything.
    """

    exact: Mapping[str, torch.Size]
    exact_bytes: int
    parts: tuple[CodedPart, ...]
    nbytes: int


def coded_rows(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[str, Rows]]:
    """The role and the rows within it of every Linear that may be coded, by parameter name."""
    found: dict[str, tuple[str, Rows]] = {}
    for role, names in ROLES.items():
        first = 0
        for number, name in enumerate(names):
            parameter = f"{name}.weight"
            found[parameter] = (role, Rows(16 * number, True) if role == "gate_up" else Rows(first, False))
            first += shapes[parameter][0]
    return found


def encode_layer(
    tensors: Mapping[str, Tensor], codes: Mapping[str, QuantizedWeight], substitute: FusedLayer
) -> tuple[CodedLayer, Tensor]:
    """Code a layer, and prove it: every Linear is decoded again and compared bit by bit.

    Args:
        tensors: the layer's parameters by name, bfloat16.
        codes: of the substitute's Linears, by parameter name.
        substitute: made of these codes; what is decoded with.

    Returns:
        What the bytes mean, and the bytes, uint8 on the tensors' device.

    Raises:
        SubspecError: what was decoded is not what was coded (a defect of this device or its software).
    """
    places = coded_rows({name: tensor.shape for name, tensor in tensors.items()})
    device = next(iter(tensors.values())).device
    exact = {name: tensor.shape for name, tensor in tensors.items() if name not in codes}
    exact_bytes = PlainCodec().layer_bytes(exact)
    parts: list[CodedPart] = []
    run = CodeRun(exact_bytes)
    for name, own in codes.items():
        role, rows = places[name]
        coded = encode_proven(name, tensors[name], own, getattr(substitute, role), rows)
        parts.append(CodedPart(name, role, rows, coded.shape, run.add(coded), coded.margin))
    flat = run.flat(device)
    for name, view in parameter_views(flat, exact, torch.bfloat16).items():
        view.copy_(tensors[name])
    return CodedLayer(exact, exact_bytes, tuple(parts), run.nbytes), flat


def encode_proven(
    name: str, weight: Tensor, codes: QuantizedWeight, substitute: LevelLinear, rows: Rows
) -> Coded:
    """Code a weight, decode it again, and compare bit by bit.

    Args:
        name: of the weight, for a message.
        weight: bfloat16 [n, k].
        codes: of its substitute.
        substitute: the fused Linear made of these codes; what is decoded with.
        rows: which of its rows are the weight's.

    Raises:
        SubspecError: what was decoded is not what was coded (a defect of this device or its software).
    """
    coded = encode(weight, codes, margin_of(codes))
    check = torch.empty_like(weight, memory_format=torch.contiguous_format)
    decode_into(check, coded, substitute, rows)
    if not torch.equal(check.view(torch.int16), weight.contiguous().view(torch.int16)):
        raise SubspecError(
            f"offload.codec=substitute: {name} was not rebuilt bit for bit: set offload.codec=none, and please "
            "report it with the versions in the run's folder"
        )
    return coded


class CodeRun:
    """One run of bytes in the making, codes one behind the other.

    Args:
        first: bytes that something else takes in front.

    Attributes:
        nbytes: of the run so far.
    """

    def __init__(self, first: int = 0) -> None:
        self.nbytes = first
        self._pieces: list[tuple[int, Tensor]] = []

    def add(self, coded: Coded) -> Spans:
        """Append a weight's code; returns where it will lie."""
        spans = []
        for words in (coded.starts, coded.stream):
            self._pieces.append((self.nbytes, words))
            spans.append((self.nbytes, words.numel()))
            self.nbytes += round_up(4 * words.numel(), PlainCodec.ALIGNMENT)
        return Spans(*spans)

    def flat(self, device: torch.device) -> Tensor:
        """The run, uint8 on ``device``; the bytes in front are not written."""
        flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for first, words in self._pieces:
            flat[first : first + 4 * words.numel()].view(torch.int32).copy_(words)
        return flat


class LayerRestorer:
    """Rebuilds layers in one buffer.

    Args:
        layers: what the bytes of each coded layer mean, by layer number.
        substitute: the fused layers, all of them.
        shapes: of a layer's parameters.
        resident: bytes of the layers that stay on the device.
        device: of the buffer.

    Attributes:
        parameters: views into the buffer by parameter name: the parameters of the layer decoded last.
        log: takes (layer number, begin, end) of every layer decoded, when it is a list.
    """

    def __init__(
        self,
        layers: Mapping[int, CodedLayer],
        substitute: Sequence[FusedLayer],
        shapes: Mapping[str, torch.Size],
        resident: Mapping[int, Tensor],
        device: torch.device,
    ) -> None:
        self.layers, self.resident = layers, resident
        # The parameters that are not coded first, as in the coded bytes: one copy moves all of them.
        first = next(iter(layers.values())).exact
        ordered = {**first, **{name: shape for name, shape in shapes.items() if name not in first}}
        self.buffer = torch.empty(PlainCodec().layer_bytes(ordered), dtype=torch.uint8, device=device)
        self.parameters = parameter_views(self.buffer, ordered, torch.bfloat16)
        self._decoders = {
            index: PieceRestorer(
                [part.piece(self.parameters[part.name], substitute[index]) for part in layer.parts]
            )
            for index, layer in layers.items()
        }
        self.log: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] | None = None

    def decode(self, index: int, flat: Tensor) -> None:
        """Fill the buffer with layer ``index`` from its bytes ``flat`` (uint8, on the device)."""
        if self.log is None:
            self._decode(index, flat)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._decode(index, flat)
        end.record()
        self.log.append((index, begin, end))

    def _decode(self, index: int, flat: Tensor) -> None:
        exact = self.layers[index].exact_bytes
        self.buffer[:exact].copy_(flat[:exact])
        self._decoders[index](flat)
