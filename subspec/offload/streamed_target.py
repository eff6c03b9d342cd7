"""A target whose decoder layers stream in from host memory or a disk while it runs.

The layers compute with transformers' own modules, so the numerics are exactly those of the model on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from subspec.codec.coded_head import CodedHead
from subspec.codec.coded_layer import LayerRestorer
from subspec.decoding.target_model import TargetModel
from subspec.kernels.timing import EventLog, logged
from subspec.offload.disk import DiskRing
from subspec.offload.feeds import CodedFeed, LayerFeed
from subspec.offload.stream import LayerRing
from subspec.offload.tiers import TieredStreamer
from subspec.utils.rounding import next_power_of_two


class StreamedTarget(TargetModel):
    """Runs a causal language model whose layers come from feeds.

    Args:
        model: the model without layer weights (``subspec.targets.meta_model.empty_model``); embeddings, norm and head
            are filled, but for a coded head. The embedding may lie in pinned host memory.
        feeds: serve all layers together, each layer once.
        device: of everything else.
        coded_head: multiplies with the LM head; None: the model's own does.

    Attributes:
        recorded: the ring whose transfers :meth:`take_transfer` counts: the streamer, or the disk's ring.
    """

    whole = False

    def __init__(
        self,
        model: PreTrainedModel,
        feeds: Sequence[LayerFeed],
        device: torch.device,
        coded_head: CodedHead | None = None,
    ) -> None:
        super().__init__(model)
        self.device = device
        self.coded_head = coded_head
        self.dtype = self.head.weight.dtype  # a coded head's weight is on the meta device, in the model's dtype
        self.table = model.get_input_embeddings().weight
        self.feeds = tuple(feeds)
        self.recorded = self.streamer
        self._feed_of = {index: feed for feed in feeds for index in feed.layers}
        self.layer_log: EventLog | None = None

    @property
    def streamer(self) -> LayerRing | None:
        """The copies over the link; None: no layer crosses it."""
        return next((feed.streamer for feed in self.feeds if feed.streamer is not None), None)

    @property
    def disk(self) -> DiskRing | None:
        """The reads from a disk; None: no layer is there."""
        streamer = self.streamer
        if isinstance(streamer, TieredStreamer):
            return streamer.disk
        return streamer if isinstance(streamer, DiskRing) else None

    @property
    def restorer(self) -> LayerRestorer | None:
        """Restores the coded layers; None: no layer is coded."""
        return next((feed.restorer for feed in self.feeds if isinstance(feed, CodedFeed)), None)

    @property
    def sliced(self) -> bool:  # type: ignore[override]
        return self.restorer is not None and self.restorer.passes is not None

    @property
    def resident_layers(self) -> list[int]:
        """Numbers of the layers on the device, coded ones included."""
        return sorted(index for feed in self.feeds for index in feed.resident)

    @property
    def streamed_bytes_per_pass(self) -> int:
        """Bytes that one pass takes over the link."""
        return 0 if self.streamer is None else self.streamer.bytes_per_pass

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "streamed_bytes_per_pass": self.streamed_bytes_per_pass,
            "resident_layers": self.resident_layers,
            **({} if self.disk is None else {"disk": self.disk.facts()}),
        }

    def take_transfer(self) -> tuple[int, float]:
        return (0, 0.0) if self.recorded is None else self.recorded.take()

    def embed(self, tokens: Tensor) -> Tensor:
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

    def logits(self, hidden: Tensor) -> Tensor:
        if self.coded_head is None:
            return super().logits(hidden)
        return self.coded_head.logits(hidden, self.bitwise)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        feed = self._feed_of[index]
        with logged(self.layer_log, index):
            layer = feed.acquire(index)
            layer.self_attn.layer_idx = index  # a module may serve many layers; selects the cache rows
            yield layer
        feed.release(index)
