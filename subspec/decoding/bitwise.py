"""The target's pass in batch-invariant arithmetic: a token's logits have the same bits in every pass.

A matrix library picks its kernel, and with it the order of a sum, by the number of rows. In bfloat16 that decides
between tokens whose logits nearly tie: a tree's pass and plain decoding then emit different texts. Here the order of
a row's sums is fixed (:mod:`subspec.kernels.invariant`), so plain decoding, prefill in chunks of any size and trees of
any shape give the same logits to the last bit. The operations between the sums are elementwise.

Layers are the model's own modules, of which only the parameters are used; between layers the residual stream is in
the model's dtype, partial sums are float32 until they are added to it.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from subspec.decoding.batch import JointBatch, TokenBatch
from subspec.decoding.pass_shapes import PassShapes
from subspec.kernels.invariant_attention import Heads, attend, path_table
from subspec.kernels.invariant_linear import Tiling, multiply, split_k
from subspec.kernels.modules import triton_kernels
from subspec.utils.rounding import next_power_of_two

LINEARS = {
    "qkv": attrgetter("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": lambda layer: (layer.self_attn.o_proj,),
    "gate_up": attrgetter("mlp.gate_proj", "mlp.up_proj"),
    "down": lambda layer: (layer.mlp.down_proj,),
}
"""A decoder layer's Linears by role."""

ROLES = (*LINEARS, "head")
"""The matrices of a pass; each has a tile shape of its own."""

DTYPES = (torch.bfloat16, torch.float16)
"""Arithmetic that is covered: in float32 rounding is far below the gaps between logits."""

ACTIVATION_BLOCK = 1024


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
        sliced: multiply the MLP's matrices in slices. A layer may then have an attribute ``restorer``, whose
            ``restored`` is asked for each slice (:class:`~subspec.codec.coded_layer.LayerRestorer`).
    """

    def __init__(self, model: PreTrainedModel, tilings: Mapping[str, Tiling], *, sliced: bool = False) -> None:
        config, base = model.config, model.get_decoder()
        self.shapes = PassShapes.of(config, model.get_input_embeddings().weight.dtype.itemsize, sliced=sliced)
        self.tilings = dict(tilings)
        self._slices = {role: self.shapes.slices(role) for role in LINEARS}
        self.eps: float = config.rms_norm_eps
        self.inverse_frequency: Tensor = base.rotary_emb.inv_freq
        self.attention_scaling: float = base.rotary_emb.attention_scaling
        self.no_paths = torch.zeros(1, dtype=torch.int32, device=self.inverse_frequency.device)

    def run_layer(self, state: BitwisePass, layer: nn.Module) -> None:
        """Run a decoder layer with the parameters of ``layer``; its keys and values go to the cache."""
        normed = state.buffer("normed", state.rows, self.shapes.hidden)
        self.norm(state, layer.input_layernorm.weight, normed)
        attended = self._attention(state, layer, normed)
        state.partial = self._parts(state, layer.self_attn.o_proj)
        self._multiply(layer, "out", attended, state.partial)
        self.norm(state, layer.post_attention_layernorm.weight, normed)
        self._mlp(state, layer, normed)

    def linear(self, role: str, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """x [n, k] @ weight [m, k].T into ``out`` [n, m], whose rows may be strided; returns it."""
        multiply(x, (weight,), (None,), out, self.tilings[role])
        return out

    def _multiply(self, layer: nn.Module, role: str, x: Tensor, out: Tensor) -> None:
        """x times the matrices of a role, slice by slice; of gate and up :meth:`_mlp` needs the parts."""
        for first, weights, biases in self._weights(layer, role):
            own = out[..., first : first + sum(len(weight) for weight in weights)]
            multiply(x, weights, biases, own, self.tilings[role], out.shape[-1])

    def _weights(self, layer: nn.Module, role: str) -> Iterator[tuple[int, list[Tensor], list[Tensor | None]]]:
        """First row, and rows, of every slice of a role's matrices, with their biases."""
        linears, restorer = LINEARS[role](layer), getattr(layer, "restorer", None)
        for first, count in self._slices[role]:
            rows = slice(first, first + count)
            weights = (
                [linear.weight[rows] for linear in linears] if restorer is None else restorer.restored(role, first)
            )
            yield first, weights, [None if linear.bias is None else linear.bias[rows] for linear in linears]

    def _parts(self, state: BitwisePass, linear: nn.Module) -> Tensor:
        """Place for the parts of a sum, which the next norm adds to the residual stream."""
        n, k = linear.weight.shape
        return state.buffer("added", split_k(n, k).parts, state.rows, n, dtype=torch.float32)

    def _mlp(self, state: BitwisePass, layer: nn.Module, normed: Tensor) -> None:
        invariant = triton_kernels("invariant", normed.device)
        inner = self.shapes.intermediate
        state.partial = self._parts(state, layer.mlp.down_proj)
        piece = self.shapes.mlp_piece(state.rows)
        for first in range(0, state.rows, piece):
            x = normed[first : first + piece]
            rows = x.shape[0]
            product, behind = state.buffer("wide", rows, inner), self.shapes.product_bytes(rows)
            for column, weights, biases in self._weights(layer, "gate_up"):
                count = len(weights[0])
                gate_up = state.buffer("wide", rows, 2 * count, after=behind)
                multiply(x, weights, biases, gate_up, self.tilings["gate_up"])
                blocks = -(-count // ACTIVATION_BLOCK)
                invariant.swiglu[(rows, blocks)](gate_up, product[:, column:], count, inner, BLOCK=ACTIVATION_BLOCK)
            self._multiply(layer, "down", product, state.partial[:, first : first + rows])

    def norm(self, state: BitwisePass, weight: Tensor, out: Tensor) -> Tensor:
        """residual += the parts that wait for it; ``out`` = its RMS norm."""
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

    def _attention(self, state: BitwisePass, layer: nn.Module, normed: Tensor) -> Tensor:
        level, attention = triton_kernels("level", normed.device), layer.self_attn
        heads, rows = self.shapes.heads, state.rows
        parts = split_k(self.shapes.qkv, self.shapes.hidden).parts
        sums = state.buffer("wide", parts, rows, self.shapes.qkv, dtype=torch.float32)
        self._multiply(layer, "qkv", normed, sums)
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
