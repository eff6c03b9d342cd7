"""A target whose decoder layers stream in from host memory while it runs.

Layer modules are transformers' own: one per ring slot, whose parameters are views into the slot, and one per resident
layer. So the numerics are exactly those of the model on the device.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.codec.coded_head import CodedHead
from subspec.codec.coded_layer import LayerRestorer
from subspec.decoding.kv_cache import KVView
from subspec.decoding.target_model import TargetModel
from subspec.offload.stream import LayerStreamer
from subspec.targets.layer_bytes import parameter_views
from subspec.targets.meta_model import fill
from subspec.utils.rounding import next_power_of_two


class StreamedTarget(TargetModel):
    """Runs a causal language model whose layers are partly resident, partly streamed.

    Args:
        model: the model without layer weights (``subspec.targets.meta_model.empty_model``); embeddings, norm and head
            are filled, but for a coded head. The embedding may lie in pinned host memory.
        resident: parameters of each resident layer, by layer number.
        streamed: flat pinned bytes of each streamed layer, by layer number.
        slots: ring slots.
        device: where everything else is.
        decoding: rebuilds the coded layers, streamed ones from their ring slot; None: streamed bytes are parameters.
        coded_head: multiplies with the LM head; None: the model's own does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        resident: Mapping[int, Mapping[str, Tensor]],
        streamed: Mapping[int, Tensor],
        slots: int,
        device: torch.device,
        decoding: LayerRestorer | None = None,
        coded_head: CodedHead | None = None,
    ) -> None:
        super().__init__(model)
        self.device = device
        self.coded_head = coded_head
        self.dtype = (
            self.head.weight.dtype
        )  # a coded head has no weight, but its place in the model has a dtype
        self.table = model.get_input_embeddings().weight
        layers = self.base.layers
        shapes = {name: parameter.shape for name, parameter in layers[0].named_parameters()}
        self._resident: dict[int, nn.Module] = {}
        for index, tensors in resident.items():
            fill(layers[index], tensors)
            self._resident[index] = layers[index]
        self._order: Sequence[int] = sorted(streamed)
        self.streamer: LayerStreamer | None = None
        self._slot_layers: list[nn.Module] = []
        self.decoding = decoding
        if self._order:
            slots = min(max(slots, 1), len(self._order))
            self.streamer = LayerStreamer([streamed[i] for i in self._order], slots, device)
        if decoding is not None:
            self._decoded_layer = copy.deepcopy(layers[next(iter(decoding.layers))])
            fill(self._decoded_layer, decoding.parameters)
        elif self.streamer is not None:
            for slot in self.streamer.slots:
                layer = copy.deepcopy(layers[self._order[0]])
                fill(layer, parameter_views(slot, shapes, self.dtype))
                self._slot_layers.append(layer)
        self.layer_log: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] | None = None

    @property
    def resident_layers(self) -> list[int]:
        """Numbers of the layers on the device, coded ones included."""
        coded = () if self.decoding is None else self.decoding.resident
        return sorted([*self._resident, *coded])

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes that one pass takes over the link."""
        return 0 if self.streamer is None else sum(layer.numel() for layer in self.streamer.layers)

    def take_transfer(self) -> tuple[int, float]:
        return (0, 0.0) if self.streamer is None else self.streamer.take()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embedding rows of ``tokens`` [n] -> [n, hidden]."""
        if self.table.device == tokens.device:
            return nn.functional.embedding(tokens, self.table)
        from subspec.kernels import level

        hidden = self.table.shape[1]
        out = torch.empty(tokens.numel(), hidden, dtype=self.dtype, device=tokens.device)
        block = next_power_of_two(hidden)
        # The kernel reads the few rows straight from pinned host memory.
        level.embed_rows[(tokens.numel(),)](self.table, tokens.contiguous(), out, hidden, BLOCK=block)
        return out

    def begin_pass(self) -> None:
        if self.streamer is not None:
            self.streamer.rewind()
            self.streamer.prefetch()

    def forward(self, tokens: Tensor, positions: Tensor, visible: Tensor, view: KVView) -> Tensor:
        self.begin_pass()
        hidden = self.embed(tokens).unsqueeze(0)
        position_ids = positions.unsqueeze(0)
        arguments: dict[str, Any] = {
            "attention_mask": self.additive_mask(visible),
            "position_ids": position_ids,
            "position_embeddings": self.base.rotary_emb(hidden, position_ids),
            "past_key_values": view,
            "use_cache": True,
        }
        for index in range(self.num_layers):
            with self.layer(index) as layer:
                hidden = layer(hidden, **arguments)
        return self.base.norm(hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        if self.coded_head is None:
            return super().logits(hidden)
        return self.coded_head.logits(hidden, self.bitwise)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        streams = self.decoding is None and index not in self._resident
        with self._timed(index, self._parameters_of(index)) as layer:
            layer.self_attn.layer_idx = (
                index  # one module serves many layers; says whose cache rows it writes
            )
            yield layer
        if streams:
            assert self.streamer is not None
            self.streamer.leave()

    def _parameters_of(self, index: int) -> nn.Module:
        """A module with the parameters of a layer: resident, decoded, or in a ring slot, which is held until left."""
        layer = self._resident.get(index)
        if layer is not None:
            return layer
        if self.decoding is not None:
            return self._decode(index)
        assert self.streamer is not None
        return self._slot_layers[self.streamer.enter()]

    def _decode(self, index: int) -> nn.Module:
        """A layer rebuilt from its code, on the device or in a ring slot, which is free again at once."""
        decoding, streamer = self.decoding, self.streamer
        assert decoding is not None
        flat = decoding.resident.get(index)
        if flat is None:
            assert streamer is not None
            slot = streamer.slots[streamer.enter()]
            decoding.decode(index, slot[: decoding.layers[index].nbytes])
            streamer.leave()
        else:
            decoding.decode(index, flat)
        return self._decoded_layer

    @contextmanager
    def _timed(self, index: int, layer: nn.Module) -> Iterator[nn.Module]:
        if self.layer_log is None:
            yield layer
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield layer
        end.record()
        self.layer_log.append((index, begin, end))
