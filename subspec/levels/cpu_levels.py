"""A substitute's forward pass on a CPU in float32: the :class:`~subspec.levels.model.LevelModel` of captured levels.

Our own kernels run a layer at a time (:mod:`subspec.decoding.cpu_pass`). Without them torch's operations do: with a few
rows their time goes to reading weights and to starting operations, so q/k/v and gate/up are one Linear each, rotary
tables and the mask are made once per level, and no module is called.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from subspec.decoding.batch import JointBatch, TokenBatch
from subspec.decoding.cpu_pass import CpuPass, CpuShape, misfit
from subspec.decoding.hidden import Hidden
from subspec.decoding.target_model import TargetModel
from subspec.errors import ConfigError
from subspec.kernels.cpu import CpuKernels, Layer, Matrix, cpu_kernels, float_matrix
from subspec.levels.build import ROLES, check_biases
from subspec.levels.model import NEVER, LevelLayer, LevelModel
from subspec.levels.quantization import TILE_ROWS
from subspec.quant.cpu_linear import OwnCpuLinear, gate_then_up
from subspec.quant.level_linear import Dense, LevelLinear
from subspec.targets.meta_model import parameter_shapes


def why_modules(config: PretrainedConfig) -> str | None:
    """Why a substitute of this model runs as modules, in a few words; None: it runs as :class:`CpuLevels`."""
    layer = parameter_shapes(config)[0]
    try:
        check_biases(layer, "the target")
    except ConfigError:
        return "it has other biases than those of q/k/v"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1) != 1:
        return "partial_rotary_factor"
    outputs = layer[f"{ROLES['gate_up'][0]}.weight"][0]
    return f"{outputs} outputs of gate_proj are no multiple of {TILE_ROWS}" if outputs % TILE_ROWS else None


class _TextRows:
    """One text's rows of a pass: what it writes to its cache and attends to there."""

    def __init__(self, batch: TokenBatch, model: "CpuLevels") -> None:
        levels, view = model.levels, batch.view
        self.rows, self.group = batch.tokens.numel(), levels.q_heads // levels.kv_heads
        self.mask = model.additive_mask(batch.visible())[0, 0].repeat(self.group, 1)
        # Views of all layers at once: a slice costs as much as a small operation.
        self.written = view.rows[:, :, :, view.write[0] : view.write[1]].unflatten(-1, (2, -1)).unbind()
        read = view.rows[:, :, None, :, view.read[0] : view.read[1]]
        self.keys, self.values = (part.unbind() for part in read.unbind(1))

    def attend(self, index: int, query: Tensor, new: Tensor) -> Tensor:
        """Store keys and values, and attend: [rows, heads * dim]; arguments as of :meth:`CpuLevels._turned`.

        Args:
            index: of the layer in the cache.
        """
        self.written[index].copy_(new)
        keys = self.keys[index]
        # Heads that share keys are more rows of one matrix product.
        query = query.flatten(1, 2)[None].to(keys.dtype)
        out = functional.scaled_dot_product_attention(query, keys, self.values[index], attn_mask=self.mask)
        return out.unflatten(2, (self.group, self.rows))[0].permute(2, 0, 1, 3).reshape(self.rows, -1)


class CpuLevels(TargetModel):
    """Runs the layers of ``levels`` on the cache of the model that they were made of.

    Args:
        model: the exact model; its layers are not run.
        levels: float32, with a draft head.
    """

    def __init__(self, model: PreTrainedModel, levels: LevelModel) -> None:
        super().__init__(model)
        self.levels = levels
        self._least = torch.tensor(levels.eps).sqrt()
        kernels = misfit(model.config) or cpu_kernels()
        self._shape = CpuShape.of(model)
        found = [_addresses(layer, self._shape) for layer in levels.layers]
        self._layers = [layer for layer in found if layer is not None]
        fit = self.dtype is torch.float32 and len(self._layers) == len(found)
        self._kernels = kernels if fit and isinstance(kernels, CpuKernels) else None

    @property
    def own(self) -> bool:
        """Whether our own kernels run the layers of a single text."""
        return self._kernels is not None

    def forward(self, batch: TokenBatch | JointBatch, *, hidden_of: Sequence[int] = ()) -> Hidden:
        """Run the tokens of ``batch``; hidden states of single layers are not available."""
        levels = self.levels
        if self._kernels is not None and isinstance(batch, TokenBatch):
            embedded = functional.embedding(batch.tokens, levels.embedding)
            run = CpuPass(self._kernels, self._shape, batch, embedded)
            for place, (layer, own) in enumerate(zip(levels.layers, self._layers, strict=True)):
                run.run(own, place if layer.cache_layer is None else layer.cache_layer)
            return Hidden(run.normed(levels.final_norm), {})
        texts = [_TextRows(part, self) for part in batch.parts]
        counts = [text.rows for text in texts]
        rotary = self._rotary(batch.positions)
        residual = functional.embedding(batch.tokens, levels.embedding).float()
        for place, layer in enumerate(levels.layers):
            index = place if layer.cache_layer is None else layer.cache_layer
            query, new = self._turned(layer.qkv(self._norm(residual, layer.input_norm))[0], layer, rotary)
            if len(texts) == 1:
                attended = texts[0].attend(index, query, new)
            else:
                own = zip(texts, query.split(counts, dim=2), new.split(counts, dim=2), strict=True)
                attended = torch.cat([text.attend(index, *parts) for text, *parts in own])
            residual += layer.out(attended.float())[0]
            residual += layer.down(layer.gate_up(self._norm(residual, layer.post_norm)))[0]
        return Hidden(self._norm(residual, levels.final_norm), {})

    def logits(self, hidden: Tensor) -> Tensor:
        levels = self.levels
        known = levels.draft_head(hidden)[0].float()
        if levels.ids is None:
            return known
        return known.new_full((len(known), levels.vocab_size), NEVER).index_copy_(1, levels.ids, known)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # Half the operations of torch's own rms_norm.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(weight.numel() ** -0.5)
        return (x * weight).div_(torch.hypot(size, self._least))

    def _rotary(self, positions: Tensor) -> Tensor:
        """Factors that turn queries and keys and leave values as they are: complex [rows, heads, dim / 2]."""
        levels = self.levels
        angles = positions[:, None, None].float() * levels.inverse_frequency
        turned = torch.polar(torch.full_like(angles, levels.attention_scaling), angles)
        heads = levels.q_heads + levels.kv_heads
        kept = turned.new_ones(len(positions), levels.kv_heads, angles.shape[-1])
        return torch.cat([turned.expand(-1, heads, -1), kept], dim=1)

    def _turned(self, qkv: Tensor, layer: LevelLayer, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [kv heads, group, rows, dim], and keys and values [2, kv heads, rows, 2, dim / 2]."""
        levels, rows, qkv = self.levels, qkv.shape[0], qkv.float()
        heads, kv_heads, dim = levels.q_heads, levels.kv_heads, levels.head_dim
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        x = qkv.view(rows, heads + 2 * kv_heads, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = x.split([heads, kv_heads, kv_heads], dim=1)
            x = torch.cat([self._norm(q, layer.q_norm), self._norm(k, layer.k_norm), v], dim=1)
        # A head's halves are real and imaginary parts.
        turned = torch.complex(*x.chunk(2, dim=-1)).mul_(rotary)
        x = torch.view_as_real(turned).transpose(-1, -2)  # [rows, heads, 2, dim / 2]
        query, new = x[:, :heads], x[:, heads:]
        query = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3, 4).flatten(3)
        return query, new.unflatten(1, (2, kv_heads)).permute(1, 2, 0, 3, 4)


def _addresses(layer: LevelLayer, shape: CpuShape) -> Layer | None:
    """Where our kernels find a layer's weights; None: a Linear has another kernel."""
    linears = layer.linears
    if not all(isinstance(linear, OwnCpuLinear | Dense) for linear in linears):
        return None
    if isinstance(layer.gate_up, Dense) and layer.gate_up.interleaved:
        layer.gate_up = Dense(gate_then_up(layer.gate_up.weight), swiglu=True, interleaved=False)
    keys, values = shape.q_heads * shape.dim, (shape.q_heads + shape.kv_heads) * shape.dim
    norms = {
        role: weight.data_ptr()
        for role in ("input_norm", "post_norm", "q_norm", "k_norm")
        if (weight := getattr(layer, role)) is not None
    }
    places = {} if layer.qkv_bias is None else {"q_bias": 0, "k_bias": keys, "v_bias": values}
    biases = {role: layer.qkv_bias.data_ptr() + 4 * row for role, row in places.items()}
    return Layer(
        q=_matrix(layer.qkv),
        k=_matrix(layer.qkv, keys),
        v=_matrix(layer.qkv, values),
        out=_matrix(layer.out),
        gate=_matrix(layer.gate_up),
        up=_matrix(layer.gate_up, shape.inner),
        down=_matrix(layer.down),
        **norms,
        **biases,
    )


def _matrix(linear: LevelLinear, row: int = 0) -> Matrix:
    if isinstance(linear, OwnCpuLinear):
        return linear.tiles.matrix(row)
    assert isinstance(linear, Dense)
    return float_matrix(linear.weight[row:])
