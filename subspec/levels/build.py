"""Build draft levels from a target's exact layers: quantize, pack, and assign the chosen kernels."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspec.errors import ConfigError
from subspec.levels.model import LevelLayer, LevelModel
from subspec.quant.hqq import HqqFormat
from subspec.quant.level_linear import Dense, LevelLinear, Variant
from subspec.quant.quantized_weight import QuantizedWeight, stack_rows
from subspec.quant.weight_format import TILES, FormatQuantizer, WeightFormat
from subspec.utils.rounding import round_up

ROLES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""A layer's fused Linears and their parts."""


def check_biases(names: Iterable[str], what: str) -> None:
    """Refuse a layer that adds a bias anywhere but in its query, key and value projections.

    Args:
        names: of the layer's parameters. what: the model, for the message.
    """
    for name in names:
        linear, _, leaf = name.rpartition(".")
        if leaf == "bias" and linear not in ROLES["qkv"]:
            raise ConfigError(
                f"{what} has a bias in {linear}, which captured levels of offload=stream do not support: set "
                "offload=none, or take another model or draft"
            )


class SubstituteBuilder:
    """Builds :class:`LevelLayer` objects from exact layer weights.

    Args:
        formats: of each role's quantized weight (``head``: the draft has an LM head of its own); None: HQQ with 4 bits
            in groups of 64 for a layer's Linears.
        kernel: of the quantized Linears by role (:func:`subspec.quant.choose_kernels.choose_kernels`), or the name of
            one kernel for all, with its default settings.
        keep_exact: names of Linears (``q_proj``...) that are not quantized.
        skip_layers: layers whose Linears all stay exact (``quant.skip_layers``).
        dtype: of everything that is not quantized.
        ids: int64, rows of the LM head that the draft's own has; None: all.

    Attributes:
        head: the draft's own LM head; None: the target's.
        codes: the quantized weights of the layer taken last, by parameter name, while ``keeps_codes``.
    """

    def __init__(
        self,
        quantizer: FormatQuantizer,
        *,
        kernel: str | Mapping[str, Variant],
        keep_exact: frozenset[str],
        formats: Mapping[str, WeightFormat] | None = None,
        skip_layers: frozenset[int] = frozenset(),
        dtype: torch.dtype = torch.bfloat16,
        ids: Tensor | None = None,
    ) -> None:
        self.dtype, self.ids = dtype, ids
        self.skip_layers = skip_layers
        self.layers: list[LevelLayer] = []
        self.head: LevelLinear | None = None
        self.keeps_codes = False
        self.codes: dict[str, QuantizedWeight] = {}
        self.quantizer = quantizer
        self.formats: Mapping[str, WeightFormat] = formats or dict.fromkeys(ROLES, HqqFormat())
        if isinstance(kernel, str):
            kernel = {role: Variant(kernel, TILES[role]) for role in self.formats}
        self.kernels = kernel
        self.keep_exact = keep_exact
        self.modules = self.weights = self.stored_bytes = 0
        self.bits: dict[str, float] = {}

    @property
    def linears(self) -> list[str]:
        """Names of a layer's quantized parameters."""
        roles = [role for role in ROLES if not is_kept(role, self.keep_exact)]
        return [f"{name}.weight" for role in roles for name in ROLES[role]]

    def needs(self, index: int) -> bool:
        return True

    def take(self, index: int, layer: Mapping[str, Tensor]) -> None:
        """Append decoder layer ``index``, whose exact parameters are ``layer``."""
        self.codes = {}
        device = next(iter(layer.values())).device
        keep = self.codes if self.keeps_codes else None
        self.layers.append(self.build_layer(layer, device, exact=index in self.skip_layers, index=index, keep=keep))

    def build_layer(
        self,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        *,
        exact: bool = False,
        index: int | None = None,
        keep: dict[str, QuantizedWeight] | None = None,
        known: Mapping[str, QuantizedWeight] | None = None,
    ) -> LevelLayer:
        """Build one layer.

        Args:
            tensors: the layer's exact parameters by name; those of ``known`` may be missing.
            exact: keep every Linear exact (a layer in ``quant.skip_layers``).
            index: the layer's number, under which a quantizer may store the quantized weights; None: do not store them.
            keep: receives the quantized weights, by parameter name.
            known: all of the layer's quantized weights, by parameter name; None: quantize ``tensors``.
        """
        bias = [tensors.get(f"self_attn.{name}_proj.bias") for name in "qkv"]

        def small(name: str) -> Tensor | None:
            # A copy, because a view of a mapped file would keep all of its pages.
            return tensors[name].to(device, self.dtype, copy=True) if name in tensors else None

        def linear(role: str) -> LevelLinear:
            names, swiglu = [f"{name}.weight" for name in ROLES[role]], role == "gate_up"
            if exact or is_kept(role, self.keep_exact):
                rows = stack_rows([tensors[name].to(self.dtype) for name in names], swiglu=swiglu)
                return Dense(rows, swiglu=swiglu)
            if known is not None:
                return self._quantized(role, [known[name] for name in names])
            codes = [
                self.quantizer.quantize(tensors[name], None if index is None else f"{index}.{own}")
                for name, own in zip(names, ROLES[role], strict=True)
            ]
            if keep is not None:
                keep.update(zip(names, codes, strict=True))
            return self._quantized(role, codes)

        input_norm, post_norm = (small(f"{name}_layernorm.weight") for name in ("input", "post_attention"))
        linears = {role: linear(role) for role in ROLES}
        self.quantizer.end_layer()
        joined = None if bias[0] is None else torch.cat([part.to(device, self.dtype) for part in bias])
        q_norm, k_norm = (small(f"self_attn.{name}_norm.weight") for name in "qk")
        small_ones = {"input_norm": input_norm, "post_norm": post_norm, "q_norm": q_norm, "k_norm": k_norm}
        layer = LevelLayer(**linears, qkv_bias=joined, **small_ones)
        compact([layer])
        return layer

    def build_head(self, weight: Tensor, keep: list[QuantizedWeight] | None = None) -> LevelLinear | None:
        """The draft's own LM head, from the target's exact one [vocabulary, hidden]; None: it uses the target's.

        ``keep`` receives the quantized weight.
        """
        if "head" not in self.formats:
            return None
        if self.ids is not None:
            weight = weight.index_select(0, self.ids.to(weight.device))
        # By its bits: a head that is added or left out makes no other substitute of the layers.
        codes = [self.quantizer.quantize(weight, f"head{self.formats['head'].bits}.lm_head")]
        if keep is not None:
            keep += codes
        head = self._quantized("head", codes)
        self.quantizer.end_layer()
        return head

    def _quantized(self, role: str, codes: list[QuantizedWeight]) -> LevelLinear:
        swiglu = role == "gate_up"
        count, modules = sum(math.prod(own.shape) for own in codes), len(codes)
        stacked = codes[0].stacked(codes[1:], swiglu=swiglu)
        codes.clear()
        linear = self.formats[role].linear(self.kernels[role], stacked, swiglu=swiglu)
        self.modules += modules
        self.weights += count
        self.stored_bytes += linear.nbytes
        self.bits[role] = round(8 * linear.nbytes / count, 4)
        return linear


def layers_together(layer_bytes: int, room: int) -> int:
    """Layers of ``layer_bytes`` that :func:`compact` moves at a time, if ``room`` bytes may be taken meanwhile."""
    return room // max(1, 2 * layer_bytes)


def compact(layers: Sequence[LevelLayer], device: torch.device | None = None) -> None:
    """Move layers' packed weights into one allocation.

    The allocator rounds tensors above 1 MiB to multiples of 2 MiB: 7 % of a 7B substitute with separate tensors.

    Args:
        device: destination; None: their own device.
    """
    linears = [linear for layer in layers for linear in layer.linears]
    tensors = [tensor for linear in linears for tensor in linear.tensors]
    if not tensors:
        return
    sizes = [round_up(tensor.nbytes, 256) for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device or tensors[0].device)
    moved = iter(
        [
            place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            for place, tensor in zip(flat.split(sizes), tensors, strict=True)
        ]
    )
    for linear in linears:
        linear.adopt([next(moved) for _ in linear.tensors])


def is_kept(role: str, keep_exact: frozenset[str]) -> bool:
    """Whether a fused Linear stays exact, which it does if any of its parts does."""
    return any(name.rpartition(".")[2] in keep_exact for name in ROLES[role])


def role_shapes(
    layer: Mapping[str, torch.Size], keep_exact: frozenset[str] = frozenset()
) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of a layer's quantized fused Linears, from the shapes of its parameters by name."""
    return {
        role: (sum(layer[f"{name}.weight"][0] for name in names), layer[f"{names[0]}.weight"][1])
        for role, names in ROLES.items()
        if not is_kept(role, keep_exact)
    }


def level_model(
    model: PreTrainedModel, layers: list[LevelLayer], draft_head: LevelLinear | None = None, ids: Tensor | None = None
) -> LevelModel:
    """Combine fused layers with a model's embedding, final norm, LM head and rotary frequencies.

    Args:
        model: its layers need no weights. An LM head on the meta device is coded by ``draft_head``.
        draft_head: the draft's own LM head (``SubstituteBuilder.build_head``).
        ids: int64, those that the draft's LM head knows; None: all.
    """
    config, base = model.config, model.get_decoder()
    embedding, final_norm = model.get_input_embeddings().weight.data, base.norm.weight.data
    output = model.get_output_embeddings().weight
    head = embedding if output is model.get_input_embeddings().weight else output.data
    vocab_size = head.shape[0]
    if ids is not None:
        ids = ids.to(final_norm.device)
        head = head if draft_head is not None else head.index_select(0, ids)
    rotary: Any = base.rotary_emb
    return LevelModel(
        layers=layers,
        embedding=embedding,
        final_norm=final_norm,
        head=None if head.is_meta else head,
        draft_head=draft_head,
        inverse_frequency=rotary.inv_freq.float().to(final_norm.device),
        attention_scaling=float(getattr(rotary, "attention_scaling", 1.0)),
        eps=config.rms_norm_eps,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden=config.hidden_size,
        vocab_size=vocab_size,
        ids=ids,
    )
