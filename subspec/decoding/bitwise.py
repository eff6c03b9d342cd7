"""The target's pass in batch-invariant arithmetic: a token's logits have the same bits in every pass.

A matrix library picks its kernel, and with it the order of a sum, by the number of rows. In bfloat16 that decides
between tokens whose logits nearly tie: a tree's pass and plain decoding then emit different texts. Here the order of
a row's sums is fixed (:mod:`subspec.kernels.invariant`), so plain decoding, prefill in chunks of any size and trees of
any shape give the same logits to the last bit. The operations between the sums are elementwise.

Layers are the model's own modules, of which only the parameters are used; between layers the residual stream is in
the model's dtype, partial sums are float32 until they are added to it.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from subspec.decoding.batch import JointBatch, TokenBatch
from subspec.kernels.invariant_attention import Heads, attend, path_table
from subspec.kernels.invariant_linear import Tiling, multiply, split_k
from subspec.kernels.modules import triton_kernels
from subspec.utils.rounding import next_power_of_two, round_up

ROLES = ("qkv", "out", "gate_up", "down", "head")
"""The matrices of a pass; each has a tile shape of its own."""

DTYPES = (torch.bfloat16, torch.float16)
"""Arithmetic that is covered: in float32 rounding is far below the gaps between logits."""

ALIGNMENT = 256
"""Bytes: every buffer of a pass begins at a multiple."""

ACTIVATION_BLOCK = 1024

MLP_ROWS = 384
"""Most rows whose gate and up are in memory at once: more are processed in equal pieces, which changes no bits. The
paper's tree of 289 nodes is one piece."""


def uncovered(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a model's passes cannot be batch-invariant here, in a few words; None when they can.

    Args:
        config: of a supported family.
    """
    if device.type != "cuda":
        return f"it is for CUDA devices, and this run is on the {device.type}"
    if dtype not in DTYPES:
        names = " and ".join(str(known).removeprefix("torch.") for known in DTYPES)
        return f"it is for {names}, and this run computes in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (Ampere) or later"
    if device.index not in (None, torch.cuda.current_device()):
        return f"the model is on {device}, and the current device is another: torch.cuda.set_device({device.index})"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return unsupported(config)


def unsupported(config: PretrainedConfig) -> str | None:
    """The part of a model's configuration that the kernels do not support; None: all of it is supported."""
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation {config.hidden_act} is not built"
    return None


def altered(model: PreTrainedModel) -> str | None:
    """Changes to a loaded model that its parameters, which are all that is used, do not show; None: there are none.

    Adapters replace Linears, steering adds hooks, and a library may keep a weight in another order.
    """
    base, head = model.get_decoder(), model.get_output_embeddings()
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers leaves hooks behind that only take outputs down.
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            return "the model has forward hooks"
    if head.bias is not None:
        return "the LM head has a bias"
    if 2 * base.rotary_emb.inv_freq.numel() != PassShapes.of(model.config, 2).heads.dim:
        return "rotary embeddings turn a part of a head only"
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        own = [layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm]
        if not all(type(module).__module__.startswith("transformers.models.") for module in own):
            return "a decoder layer is not transformers' own"
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj, head]
        if not all(type(linear) is nn.Linear and linear.weight.is_contiguous() for linear in linears):
            return "a Linear is not torch's own, or keeps its weight in another order"
    return None


@dataclass(frozen=True)
class PassShapes:
    """The sizes that the buffers of a pass depend on."""

    hidden: int
    intermediate: int
    heads: Heads
    itemsize: int

    @classmethod
    def of(cls, config: PretrainedConfig, itemsize: int) -> "PassShapes":
        """Read off a transformers configuration."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim)
        return cls(config.hidden_size, config.intermediate_size, heads, itemsize)

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

    def mlp_piece(self, rows: int) -> int:
        """Rows of the MLP at a time; multiples of 16, so that every piece begins at an aligned address."""
        pieces = -(-rows // MLP_ROWS)
        return rows if pieces == 1 else round_up(-(-rows // pieces), 16)

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
        mlp = 3 * self.mlp_piece(rows) * self.intermediate * self.itemsize + ALIGNMENT
        sizes = {
            "normed": max(rows * self.hidden * self.itemsize, query),
            "wide": max(sums, partial, mlp),
            "added": max(4 * self.added_parts() * rows * self.hidden, query),
        }
        return {name: round_up(size, ALIGNMENT) for name, size in sizes.items()}


class _Rows:
    """The rows of one text in a pass, from row ``first`` on, or of several that are launched together.

    Args:
        parts: the texts; several are trees of as many rows, whose caches are equally far apart (:func:`_together`).
    """

    def __init__(self, parts: Sequence[TokenBatch], first: int, no_paths: Tensor) -> None:
        batch = parts[0]
        self.texts, self.rows = len(parts), sum(part.tokens.numel() for part in parts)
        self.part = slice(first, first + self.rows)
        self.view, self.is_tree = batch.view, batch.ancestors is not None
        self.length = max(part.length for part in parts)
        self.cache_stride = _offset(parts[1]) - _offset(batch) if len(parts) > 1 else 0
        self.depths, self.positions = _cat([part.depths for part in parts]), _cat([part.positions for part in parts])
        self.prefix, self.paths = _cat([_prefix(part) for part in parts]), no_paths
        if self.is_tree:
            levels = max(part.levels for part in parts)
            self.paths = _cat([path_table(part.ancestors, part.depths, levels) for part in parts])


def _offset(part: TokenBatch) -> int:
    """Place of a text's cache in the buffer of all, in numbers."""
    return int(part.view.rows.storage_offset())


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _prefix(part: TokenBatch) -> Tensor:
    if part.prefix is not None:
        return part.prefix
    return torch.full((1,), part.past, dtype=torch.int64, device=part.tokens.device)


def _together(parts: Sequence[TokenBatch], heads: Heads) -> list[list[TokenBatch]]:
    """Texts in groups that are launched together, which saves the host most launches of a pass (``experiments/texts``).

    The trees of a group have the same number of rows. Their caches are equally far apart in one buffer, and all rows
    fit into one launch of attention.
    """
    groups: list[list[TokenBatch]] = []
    for part in parts:
        group = [*groups[-1], part] if groups else [part]
        first, rows, offsets = group[0], part.tokens.numel(), [_offset(own) for own in group]
        if (
            len(group) > 1
            and first.ancestors is not None
            and part.ancestors is not None
            and first.tokens.numel() == rows
            and first.view.read[0] == part.view.read[0]
            and first.view.rows.untyped_storage()._cdata == part.view.rows.untyped_storage()._cdata
            and offsets[-1] - offsets[-2] == offsets[1] - offsets[0]
            and heads.piece_rows(rows * len(group), max(own.length for own in group)) == rows * len(group)
        ):
            groups[-1] = group
        else:
            groups.append([part])
    return groups


class BitwisePass:
    """One pass; its buffers are one allocation, which is freed with the pass.

    Args:
        residual: [n, hidden], embedding rows of the batch's tokens; overwritten.
    """

    def __init__(self, arithmetic: "BitwiseArithmetic", batch: TokenBatch | JointBatch, residual: Tensor) -> None:
        self._arithmetic = arithmetic
        shapes = arithmetic.shapes
        self.residual = residual
        self.rows = residual.shape[0]
        self.groups: list[_Rows] = []
        for parts in _together(batch.parts, shapes.heads):
            first = self.groups[-1].part.stop if self.groups else 0
            self.groups.append(_Rows(parts, first, arithmetic.no_paths))
        sizes = shapes.buffers(self.rows, [(group.rows, group.length) for group in self.groups])
        flat = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=residual.device)
        self._buffers = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        self.partial: Tensor | None = None

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None, after: int = 0) -> Tensor:
        """The first bytes of a buffer, from byte ``after`` on, as a tensor (by default of the residual's dtype)."""
        dtype = dtype or self.residual.dtype
        count = 1
        for size in shape:
            count *= size
        return self._buffers[name][after : after + count * dtype.itemsize].view(dtype).view(shape)

    def layer(self, layer: nn.Module) -> None:
        """Run a decoder layer; its keys and values go to the cache rows of its ``layer_idx``."""
        self._arithmetic.run_layer(self, layer)

    def hidden(self) -> Tensor:
        """The residual stream [n, hidden] behind the last layer that was run."""
        total = self.residual.float()
        for part in () if self.partial is None else self.partial:
            total = total + part
        return total.to(self.residual.dtype)

    def finish(self, norm: nn.Module) -> Tensor:
        """Hidden states [n, hidden] after the final norm, in place of the residual stream."""
        return self._arithmetic.norm(self, norm.weight, self.residual)


class BitwiseArithmetic:
    """Runs decoder layers so that a row's bits do not depend on the rows beside it.

    Args:
        model: a causal LM of a supported family; only its configuration, rotary frequencies and parameters are used.
        tilings: tile shape by role (:data:`ROLES`).
    """

    def __init__(self, model: PreTrainedModel, tilings: Mapping[str, Tiling]) -> None:
        config, base = model.config, model.get_decoder()
        self.shapes = PassShapes.of(config, model.get_input_embeddings().weight.dtype.itemsize)
        self.tilings = dict(tilings)
        self.eps: float = config.rms_norm_eps
        self.inverse_frequency: Tensor = base.rotary_emb.inv_freq
        self.attention_scaling: float = base.rotary_emb.attention_scaling
        self.no_paths = torch.zeros(1, dtype=torch.int32, device=self.inverse_frequency.device)

    def run_layer(self, state: BitwisePass, layer: nn.Module) -> None:
        """Run a decoder layer with the parameters of ``layer``; its keys and values go to the cache."""
        shapes, attention, mlp = self.shapes, layer.self_attn, layer.mlp
        rows, hidden = state.rows, shapes.hidden
        normed = state.buffer("normed", rows, hidden)
        self.norm(state, layer.input_layernorm.weight, normed)
        attended = self._attention(state, attention, normed)
        self._add(state, "out", attended, attention.o_proj)
        self.norm(state, layer.post_attention_layernorm.weight, normed)
        self._mlp(state, mlp, normed)

    def linear(self, role: str, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """x [n, k] @ weight [m, k].T into ``out`` [n, m], whose rows may be strided; returns it."""
        multiply(x, (weight,), (None,), out, self.tilings[role])
        return out

    def _multiply(self, role: str, x: Tensor, linears: tuple[nn.Module, ...], out: Tensor) -> None:
        weights = [linear.weight for linear in linears]
        multiply(x, weights, [linear.bias for linear in linears], out, self.tilings[role])

    def _add(self, state: BitwisePass, role: str, x: Tensor, linear: nn.Module) -> None:
        """Multiply, and leave the parts of the sum for the next norm to add to the residual stream."""
        state.partial = self._parts(state, linear)
        self._multiply(role, x, (linear,), state.partial)

    def _parts(self, state: BitwisePass, linear: nn.Module) -> Tensor:
        n, k = linear.weight.shape
        return state.buffer("added", split_k(n, k).parts, state.rows, n, dtype=torch.float32)

    def _mlp(self, state: BitwisePass, mlp: nn.Module, normed: Tensor) -> None:
        invariant = triton_kernels("invariant", normed.device)
        inner = self.shapes.intermediate
        state.partial = self._parts(state, mlp.down_proj)
        for first in range(0, state.rows, self.shapes.mlp_piece(state.rows)):
            x = normed[first : first + self.shapes.mlp_piece(state.rows)]
            count = x.shape[0]
            gate_up = state.buffer("wide", count, 2 * inner)
            product = state.buffer("wide", count, inner, after=round_up(gate_up.nbytes, ALIGNMENT))
            self._multiply("gate_up", x, (mlp.gate_proj, mlp.up_proj), gate_up)
            blocks = -(-inner // ACTIVATION_BLOCK)
            invariant.swiglu[(count, blocks)](gate_up, product, inner, BLOCK=ACTIVATION_BLOCK)
            self._multiply("down", product, (mlp.down_proj,), state.partial[:, first : first + count])

    def norm(self, state: BitwisePass, weight: Tensor, out: Tensor) -> Tensor:
        """residual += the parts that :meth:`_add` left; ``out`` = its RMS norm."""
        level = triton_kernels("level", out.device)
        partial, hidden = state.partial, self.shapes.hidden
        level.add_rms_norm[(state.rows,)](
            state.residual,
            state.residual if partial is None else partial,
            weight,
            out,
            state.rows,
            self.eps,
            hidden,
            hidden,
            SPLITS=0 if partial is None else partial.shape[0],
            BLOCK=next_power_of_two(hidden),
            num_warps=8,
        )
        state.partial = None
        return out

    def _attention(self, state: BitwisePass, attention: nn.Module, normed: Tensor) -> Tensor:
        level = triton_kernels("level", normed.device)
        heads, rows = self.shapes.heads, state.rows
        parts = split_k(self.shapes.qkv, self.shapes.hidden).parts
        sums = state.buffer("wide", parts, rows, self.shapes.qkv, dtype=torch.float32)
        self._multiply("qkv", normed, (attention.q_proj, attention.k_proj, attention.v_proj), sums)
        query = state.buffer("added", rows, heads.query, heads.dim)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        for group in state.groups:
            own = sums[0, group.part]
            k_rows, v_rows = group.view.rows[attention.layer_idx]
            level.rope_store[(group.rows, heads.query + 2 * heads.kv)](
                own, own,  # the bias is in the sums
                own if q_norm is None else q_norm.weight, own if k_norm is None else k_norm.weight,
                self.inverse_frequency, group.depths, group.prefix, query[group.part], k_rows, v_rows,
                rows,  # a slice of the sums has those of all groups
                group.view.read[0], k_rows.stride(1), k_rows.stride(0), self.attention_scaling, self.eps,
                group.rows // group.texts, group.cache_stride, heads.query, heads.kv, self.shapes.qkv,
                SPLITS=parts, HAS_BIAS=False, HAS_NORM=q_norm is not None, HALF=heads.dim // 2,
                HALF_BLOCK=next_power_of_two(heads.dim // 2), BEHIND=True, num_warps=1,
            )  # fmt: skip
        attended = state.buffer("normed", rows, heads.query * heads.dim)
        for group in state.groups:  # the partial sums take the place of the projections'
            begin = group.view.read[0]
            k_rows, v_rows = group.view.rows[attention.layer_idx]
            attend(
                query[group.part],
                k_rows[:, begin:],
                v_rows[:, begin:],
                group.positions,
                group.prefix,
                group.paths,
                is_tree=group.is_tree,
                length=group.length,
                heads=heads,
                scale=attention.scaling,
                partial=state.buffer("wide", heads.partial_floats(group.rows, group.length), dtype=torch.float32),
                out=attended[group.part],
                texts=group.texts,
                cache_stride=group.cache_stride,
            )
        return attended
