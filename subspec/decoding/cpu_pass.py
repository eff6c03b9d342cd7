"""A pass over a few rows on a CPU by our own kernels (:mod:`subspec.kernels.cpu`), in float32.

The target's pass over a tree runs here, plain decoding's single row, and a draft's level. Layers change the residual
stream in place. A token's sums have the same order in a pass over any number of rows, up to :data:`MOST_ROWS`.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from subspec.decoding.batch import TokenBatch
from subspec.decoding.bitwise import altered, unsupported
from subspec.kernels.cpu import CpuKernels, Layer, Pass, cpu_kernels, float_matrix

MOST_ROWS = 48
"""More rows go through the model's own modules, whose matrix products are then as fast (``experiments/cpu``)."""

LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


@dataclass(frozen=True)
class CpuShape:
    """Sizes of a model's layers, and its rotary embedding.

    Attributes:
        frequency: float32 [dim / 2].
        factor: of the rotary tables.
    """

    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    dim: int
    eps: float
    frequency: Tensor
    factor: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CpuShape":
        config, rotary = model.config, model.get_decoder().rotary_emb
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim(config),
            config.rms_norm_eps,
            rotary.inv_freq.float(),
            float(getattr(rotary, "attention_scaling", 1.0)),
        )


def head_dim(config: PretrainedConfig) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def misfit(config: PretrainedConfig) -> str | None:
    """Why our kernels cannot run this model's layers, in a few words; None: they can."""
    if why := unsupported(config):
        return why
    dim = head_dim(config)
    if dim % 16 or dim > 256:
        return f"heads of {dim} are no multiple of 16 up to 256"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return "hidden or intermediate size is no multiple of 8"
    return None


def kernels_for(model: PreTrainedModel) -> CpuKernels | str:
    """The kernels for a model's passes over few rows; or why its own modules compute, in a few words."""
    embedding = model.get_input_embeddings().weight
    if embedding.device.type != "cpu" or embedding.dtype is not torch.float32:
        return "they are for float32 on a CPU"
    why = misfit(model.config) or altered(model)
    for layer in model.get_decoder().layers[:1]:
        biased = [role for role, path in LINEARS.items() if layer.get_submodule(path).bias is not None]
        if others := set(biased) - {"q", "k", "v"}:
            why = why or f"{', '.join(sorted(others))} has a bias"
    return why or cpu_kernels()


class CpuPass:
    """One pass.

    Args:
        x: float32 [rows, hidden], embeddings of the batch's tokens; becomes the residual stream.
    """

    def __init__(self, kernels: CpuKernels, shape: CpuShape, batch: TokenBatch, x: Tensor) -> None:
        view, rows = batch.view, x.shape[0]
        self._kernels, self._x, self._shape, self._cache = kernels, x, shape, view.rows
        angles = batch.positions[:, None].float() * shape.frequency
        # Attributes keep tensors alive whose addresses the kernels read.
        self._turns = torch.cat([angles.cos(), angles.sin()], dim=1)
        if shape.factor != 1:
            self._turns *= shape.factor
        mask, start = batch.drafted, 0
        if mask is None:
            mask = batch.ancestors
            if mask is None:
                mask = torch.ones(rows, rows, dtype=torch.bool).tril_()
            start = batch.past
        self._mask = mask
        (write, _), (read, end) = view.write, view.read
        self._run = run = Pass(
            rows=rows,
            hidden=shape.hidden,
            inner=shape.inner,
            q_heads=shape.q_heads,
            kv_heads=shape.kv_heads,
            dim=shape.dim,
            eps=shape.eps,
            scaling=shape.dim**-0.5,
            x=x.data_ptr(),
            turns=self._turns.data_ptr(),
            head_stride=view.rows.stride(2),
            write=write,
            read=read,
            length=end - read,
            mask=mask.data_ptr(),
            mask_stride=mask.stride(0),
            mask_start=start,
            masked=mask.shape[1],
        )
        kernels.begin(run)
        self._keys, self._of_layer, self._of_part = (view.rows.data_ptr(), *(4 * s for s in view.rows.stride()[:2]))

    def run(self, layer: Layer, index: int) -> None:
        """Run a layer whose keys and values are those of ``index`` in the cache."""
        keys = self._keys + index * self._of_layer
        self._kernels.layer(layer, self._run, keys, keys + self._of_part)

    def normed(self, weight: Tensor) -> Tensor:
        """The residual stream behind the final norm, [rows, hidden]."""
        return self._kernels.norm(self._x, weight, self._shape.eps)


class ExactCpuPass(CpuPass):
    """One pass by the parameters of the model's own modules, as :class:`~subspec.decoding.target_model.ModulePass`."""

    def __init__(self, exact: "ExactCpu", batch: TokenBatch, x: Tensor) -> None:
        super().__init__(exact.kernels, exact.shape, batch, x)
        self._exact = exact

    def layer(self, layer: nn.Module) -> None:
        self.run(self._exact.addresses(layer), layer.self_attn.layer_idx)

    def hidden(self) -> Tensor:
        return self._x.clone()

    def finish(self, norm: nn.Module) -> Tensor:
        return self.normed(norm.weight)


class ExactCpu:
    """Runs a float32 model's few rows by our kernels."""

    def __init__(self, model: PreTrainedModel, kernels: CpuKernels) -> None:
        self.kernels, self.shape = kernels, CpuShape.of(model)
        self._known: dict[int, tuple[nn.Module, Layer, list[Place]]] = {}

    def addresses(self, layer: nn.Module) -> Layer:
        """Addresses of the parameters as they are now: a module may serve many layers, whose parameters change."""
        known = self._known.get(id(layer))
        if known is None:
            found = Layer()
            known = self._known[id(layer)] = layer, found, _places(layer, found)
        for owner, field, parameters, name in known[2]:
            setattr(owner, field, parameters[name].data_ptr())
        return known[1]

    def logits(self, head: Tensor, hidden: Tensor) -> Tensor:
        """LM head [vocabulary, hidden] times few rows: [rows, vocabulary]."""
        return self.kernels.linear(float_matrix(head), hidden.contiguous(), head.shape[0])


Place = tuple[ctypes.Structure, str, dict[str, Any], str]
"""A structure, its field, and where the parameter is found whose address belongs there."""


def _places(layer: nn.Module, found: Layer) -> list[Place]:
    places: list[Place] = []
    for role, path in LINEARS.items():
        parameters = layer.get_submodule(path)._parameters
        places.append((getattr(found, role), "values", parameters, "weight"))
        if parameters["bias"] is not None:
            places.append((found, f"{role}_bias", parameters, "bias"))
    names = {name for name, _ in layer.named_modules()}
    places += [
        (found, role, layer.get_submodule(path)._parameters, "weight") for role, path in NORMS.items() if path in names
    ]
    return places
