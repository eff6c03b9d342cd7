"""Sizes of a batch-invariant pass: its matrices, the slices of those of a coded layer, and its buffers."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from subspec.kernels.invariant_attention import Heads
from subspec.kernels.invariant_linear import split_k
from subspec.utils.rounding import equal_slices, round_up

ALIGNMENT = 256
"""Bytes: every buffer of a pass begins at a multiple."""

MLP_ROWS = 384
"""Most rows whose gate and up are in memory at once, where matrices are whole: more are processed in equal pieces,
which changes no bits. The paper's tree of 289 nodes is one piece."""

SLICED = ("gate_up", "down")
"""Roles whose matrices are multiplied in slices where layers are coded."""

SLICE_BYTES, SLICE_ROWS = 96 << 20, 128
"""Most bytes of a slice, unless a tile has more; rows of a tile, of which a slice has a multiple. A coded matrix is
restored slice by slice; slices change no bits."""


@dataclass(frozen=True)
class PassShapes:
    """The sizes that the buffers of a pass depend on."""

    hidden: int
    intermediate: int
    heads: Heads
    itemsize: int
    sliced: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig, itemsize: int, *, sliced: bool = False) -> "PassShapes":
        """Read off a transformers configuration; ``sliced``: the MLP's matrices are multiplied in slices."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim)
        return cls(config.hidden_size, config.intermediate_size, heads, itemsize, sliced)

    @property
    def qkv(self) -> int:
        """Outputs of the query, key and value projections together."""
        return (self.heads.query + 2 * self.heads.kv) * self.heads.dim

    def matrices(self, vocab: int) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of the matrices by role."""
        query = self.heads.query * self.heads.dim
        return {
            "qkv": (self.qkv, self.hidden),
            "out": (self.hidden, query),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (vocab, self.hidden),
        }

    def slices(self, role: str) -> list[tuple[int, int]]:
        """First row and number of rows of each slice of a role's matrices; gate and up have the same rows."""
        if role not in SLICED:
            return [(0, self.qkv if role == "qkv" else self.hidden)]
        rows, inputs = (self.intermediate, 2 * self.hidden) if role == "gate_up" else (self.hidden, self.intermediate)
        if not self.sliced:
            return [(0, rows)]
        return equal_slices(rows, max(SLICE_BYTES // (inputs * self.itemsize), SLICE_ROWS), SLICE_ROWS)

    def mlp_piece(self, rows: int) -> int:
        """Rows of the MLP at a time; multiples of 16, so that every piece begins at an aligned address."""
        pieces = 1 if self.sliced else -(-rows // MLP_ROWS)  # each would restore all slices
        return rows if pieces == 1 else round_up(-(-rows // pieces), 16)

    def product_bytes(self, rows: int) -> int:
        """Bytes of the product of gate and up, behind which those of a slice lie."""
        return round_up(rows * self.intermediate * self.itemsize, ALIGNMENT)

    def added_parts(self) -> int:
        """Most parts of a sum that is added to the residual stream."""
        query = self.heads.query * self.heads.dim
        return max(split_k(self.hidden, query).parts, split_k(self.hidden, self.intermediate).parts)

    def buffers(self, rows: int, groups: Sequence[tuple[int, int]]) -> dict[str, int]:
        """Bytes of each buffer of a pass over ``rows`` tokens.

        Args:
            groups: rows that are launched together, and a number that no position of theirs reaches.

        ``normed`` holds a layer's normed input, later attention's output. ``wide`` holds, one after the other, the sums
        of the q/k/v projection, attention's partial sums, and gate, up and their product; ``added`` the queries and the
        sums that are added to the residual stream.
        """
        query = rows * self.heads.query * self.heads.dim * self.itemsize
        sums = 4 * split_k(self.qkv, self.hidden).parts * rows * self.qkv
        partial = 4 * max(self.heads.partial_floats(*group) for group in groups)
        piece = self.mlp_piece(rows)
        mlp = self.product_bytes(piece) + 2 * piece * self.slices("gate_up")[0][1] * self.itemsize
        sizes = {
            "normed": max(rows * self.hidden * self.itemsize, query),
            "wide": max(sums, partial, mlp),
            "added": max(4 * self.added_parts() * rows * self.hidden, query),
        }
        return {name: round_up(size, ALIGNMENT) for name, size in sizes.items()}
