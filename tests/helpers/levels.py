"""Drafts of captured levels, and the same weights as plain modules to compare them with."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from subspec.config.quant_checks import linear_names
from subspec.config.schema import HiggsConfig, HqqConfig
from subspec.decoding.draft import Draft
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.levels.build import SubstituteBuilder, level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.model import Attention
from subspec.levels.quantization import LevelQuantization, level_quantization
from subspec.quant.level_linear import Variant
from subspec.quant.weight_format import FormatQuantizer
from subspec.targets.model_spec import ModelSpec
from tests.helpers.drafts import begin
from tests.helpers.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 17, 33, 99, 4, 8, 77, 12, 300]
HQQ = HqqConfig(name="hqq")


def model_of(family: str, device: torch.device | str, **shape: int | bool) -> PreTrainedModel:
    """A tiny model in bfloat16 whose layers can be captured."""
    options = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 192, **shape}
    return tiny_model(family, **options).to(device, torch.bfloat16)


def quantization_of(
    model: PreTrainedModel, quant: HqqConfig | HiggsConfig = HQQ, kernel: str = "auto"
) -> LevelQuantization:
    """The quantization of the model's levels."""
    spec = ModelSpec.of(model.config)
    return level_quantization(quant, spec.layer, (spec.vocab, spec.hidden), kernel=kernel)


def fused_draft(
    model: PreTrainedModel,
    device: torch.device,
    quant: HqqConfig | HiggsConfig = HQQ,
    kernel: str | Mapping[str, Variant] | None = None,
    **options: object,
) -> CapturedDraft:
    """Captured levels.

    Args:
        kernel: None: those with a torch reference; the others are measured, and tested for themselves.
    """
    found = quantization_of(model, quant)
    kernel = kernel or {role: kept.reference(role) for role, kept in found.formats.items()}
    kept = {"formats": found.formats, "keep_exact": found.keep_exact}
    builder = SubstituteBuilder(found.quantizer, kernel=kernel, **kept)
    layers = model.get_decoder().layers
    built = [builder.build_layer(dict(one.named_parameters()), device, index=n) for n, one in enumerate(layers)]
    head = builder.build_head(model.get_output_embeddings().weight.data)
    return CapturedDraft(level_model(model, built, head), **{"attention": Attention(splits=4), **options})


def module_draft(
    model: PreTrainedModel,
    quant: HqqConfig | HiggsConfig = HQQ,
    quantizer: FormatQuantizer | None = None,
    names: Sequence[str] | None = None,
) -> SubstituteDraft:
    """The quantized weights of the same Linears as plain modules."""
    substitute, quantizer = share_parameters(model), quantizer or quantization_of(model, quant).quantizer
    for name, module in list(substitute.named_modules()):
        if name.rpartition(".")[2] in (names or linear_names(quant.modules)):
            weight = quantizer.quantize(module.weight.data, name).dequantize().to(model.dtype)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return SubstituteDraft(substitute)


def grown_alike(
    model: PreTrainedModel, drafts: Sequence[Draft], policy: Beam, temperature: float = 0.2
) -> tuple[list[Engine], list[list[Tensor]]]:
    """The engines of all drafts, and their logits of every level, on the first one's tree.

    Trees of their own would differ after a near-tie.
    """
    options = {"max_length": 96, "prefill_chunk": 16}
    engines = [Engine(TargetModel(model), draft, policy, **options) for draft in drafts]
    logits: list[list[Tensor]] = [[] for _ in engines]
    with torch.inference_mode():
        frontiers = [engine.tree.plant(begin(engine, PROMPT)) for engine in engines]
        for _ in range(policy.max_depth):
            for engine, frontier, seen in zip(engines, frontiers, logits, strict=True):
                seen.append(engine.draft.expand(engine.tree, frontier).clone())
            own = zip(engines, frontiers, strict=True)
            frontiers = [policy.grow(e.tree, frontier, logits[0][-1], temperature) for e, frontier in own]
    return engines, logits


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors relative to the first."""
    return float((other.float() - one.float()).norm() / one.float().norm())
