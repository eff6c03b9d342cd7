"""The KV cache that the target and its substitute share.

One buffer per layer, laid out so that draft and target can never touch each other's rows:

    [ draft region | committed prefix ............ | target region ]
                 <-+ rows are taken leftwards      +-> starts right behind the prefix

The draft writes only in front of the prefix and reads "its rows + prefix"; the target writes only behind the
prefix and reads "prefix + its rows". Both are contiguous slices, so attention never reads padding. Rows carry
their rotary position inside the key, so their order in memory is free.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVView:
    """The rows that one forward pass writes and attends to; ``past_key_values`` of a transformers model.

    ``write`` and ``read`` are row ranges of ``rows`` (layers, 2, kv heads, rows, head dim).
    """

    rows: Tensor
    write: tuple[int, int]
    read: tuple[int, int]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new rows (1, kv heads, new, head dim) and return all rows to attend to."""
        layer = self.rows[layer_idx]
        layer[0, :, self.write[0] : self.write[1]] = key[0]
        layer[1, :, self.write[0] : self.write[1]] = value[0]
        visible = layer[:, :, self.read[0] : self.read[1]]
        return visible[0].unsqueeze(0), visible[1].unsqueeze(0)


class KVViews:
    """The rows of several caches, one behind the other, for transformers' modules."""

    def __init__(self, views: Sequence[KVView]) -> None:
        self.views = views
        self._new = [view.write[1] - view.write[0] for view in views]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`KVView.update`, each text's new rows behind the other's."""
        new = zip(self.views, key.split(self._new, dim=2), value.split(self._new, dim=2), strict=True)
        keys, values = zip(*(view.update(k, v, layer_idx) for view, k, v in new), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


class KVCache:
    """Keys and values of one sequence: shared prefix, separate draft and target regions.

    Args:
        layers, kv_heads, head_dim: shape of the model's cache.
        max_length: most tokens the committed prefix can hold.
        draft_rows: rows of the draft region (0 for drafts with a cache of their own).
        target_rows: rows of the target region: the largest tree.
        texts: number of caches in one buffer, for texts that run side by side; this is the first one.

    Attributes:
        rows: [layers, 2, kv heads, rows, head dim].
        buffer: [texts, layers, 2, kv heads, rows, head dim]. place: of this cache in it.
        attached: what holds addresses in the buffer, such as captured graphs, by owner; of all caches in it.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_length: int,
        draft_rows: int,
        target_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        texts: int = 1,
    ) -> None:
        self.max_length = max_length
        self.draft_rows = draft_rows
        self.target_rows = target_rows
        total = draft_rows + max_length + target_rows
        # Zeros, not empty memory: a masked row still enters attention with weight 0, and 0 * NaN is NaN.
        shape = (texts, layers, 2, kv_heads, total, head_dim)
        self.buffer = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = self.buffer[0]
        self.place = 0
        self.attached: dict[Any, Any] = {}
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel() * self.buffer.element_size()

    def all(self) -> "list[KVCache]":
        """The caches of all texts, this one first."""
        caches = [self, *(copy.copy(self) for _ in self.buffer[1:])]
        for cache, place, rows in zip(caches, range(len(caches)), self.buffer, strict=True):
            cache.place, cache.rows = place, rows
        return caches

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0

    def take_over(self, other: "KVCache") -> None:
        """Continue the sequence of ``other``, which lies in the same buffer: copy its prefix."""
        self.length = other.length
        prefix = slice(self.draft_rows, self.draft_rows + self.length)
        self.rows[:, :, :, prefix] = other.rows[:, :, :, prefix]

    def target_view(self, new: int) -> KVView:
        """Rows for a target pass over ``new`` tokens: written behind the prefix.

        A piece of a prompt may have more rows than the target region: its tokens become the prefix as they lie.
        """
        end = self.draft_rows + self.length
        if end + new > self.rows.shape[3]:
            raise ValueError(f"{new} rows do not fit behind a prefix of {self.length} tokens")
        return KVView(self.rows, write=(end, end + new), read=(self.draft_rows, end + new))

    def draft_view(self, used: int, new: int) -> KVView:
        """Rows for a draft pass over ``new`` tokens when ``used`` draft rows are taken: written in front of those."""
        start = self.draft_rows - used - new
        if start < 0:
            raise ValueError(f"{used + new} rows do not fit into the draft region of {self.draft_rows}")
        return KVView(self.rows, write=(start, start + new), read=(start, self.draft_rows + self.length))

    def extend(self, count: int) -> None:
        """Commit the first ``count`` rows of the target region (a prefill chunk) as they lie."""
        if self.length + count > self.max_length:
            raise ValueError(f"{self.length + count} tokens exceed max_length {self.max_length}")
        self.length += count

    def accept(self, path: Tensor) -> None:
        """Commit the target-region rows ``path`` (int64 [n], increasing), in order; all layers in one gather."""
        count = path.numel()
        start = self.draft_rows + self.length
        # index_select copies before the slice is written, so overlapping source and destination are safe.
        self.rows[:, :, :, start : start + count] = self.rows.index_select(3, path + start)
        self.extend(count)

    def adopt(self, rows: Tensor) -> None:
        """Commit copies of the draft-region rows ``rows`` (int64 [n]), in order, in a draft's own cache."""
        count = rows.numel()
        start = self.draft_rows + self.length
        self.rows[:, :, :, start : start + count] = self.rows.index_select(3, rows)
        self.extend(count)
