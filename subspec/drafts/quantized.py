"""Quantization of a draft of modules, in place: read from the store of earlier runs, else quantized and stored."""

import time
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from subspec.config.quant_checks import HEAD, linear_names
from subspec.config.schema import Cache, QuantConfig
from subspec.quant.build import build_quantizer
from subspec.quant.hqq import HqqQuantizer
from subspec.quant.quantize_model import Quantizer, QuantReport, quantize_model
from subspec.store.substitutes import CachedModules, SubstituteStore
from subspec.targets.meta_model import parameter_shapes
from subspec.utils.console import Note


def quantize_draft(
    model: PreTrainedModel,
    quant: QuantConfig,
    *,
    identity: str,
    dtype: torch.dtype,
    device: torch.device,
    unpack: bool,
    note: Note,
    what: str = "a substitute",
    quantizer: Quantizer | None = None,
) -> QuantReport:
    """Quantize the Linears that ``quant`` chooses; results are kept where ``quant.folder`` and ``quant.cache`` say.

    Args:
        model: its modules are replaced.
        identity: of the exact weights (``LayerSource.identity``), part of the key that results are kept under.
        dtype, device: of the model.
        unpack: keep the quantized values as plain Linears.
        what: the model, for messages.
        quantizer: used instead of the one that ``quant`` configures.

    Raises:
        SubspecError: no quantizer, unknown modules or layers, or a ``quant.folder`` that holds something else.
    """
    started = time.perf_counter()
    quantizer = quantizer or build_quantizer(quant, dtype, device, unpack=unpack, what=what)
    modules, skip = getattr(quant, "modules", []), list(getattr(quant, "skip_layers", []))
    cached = _cached_modules(quantizer, model, quant, identity, dtype, note)
    with cached or nullcontext():
        report = quantize_model(model, cached or quantizer, modules=modules, skip_layers=skip)
    if cached is not None:
        report.details["cache"] = cached.store.report()
    report.seconds = time.perf_counter() - started
    return report


def _cached_modules(
    quantizer: Quantizer, model: PreTrainedModel, quant: QuantConfig, identity: str, dtype: torch.dtype, note: Note
) -> CachedModules | None:
    """``quantizer`` with its results of earlier runs; None if its results cannot be stored."""
    if not isinstance(quantizer, HqqQuantizer):
        return None
    facts = {"target": identity, "dtype": str(dtype), **quantizer.facts}
    config = model.config
    layer, _ = parameter_shapes(config)
    chosen = linear_names(getattr(quant, "modules", []))
    layers = config.num_hidden_layers - len(getattr(quant, "skip_layers", ()))
    expected = layers * sum(
        quantizer.stored_shape_bytes(shape, name.split(".")[-2])
        for name, shape in layer.items()
        if len(shape) == 2 and name.split(".")[-2] in chosen
    )
    if HEAD in chosen:
        head = model.get_output_embeddings().weight
        # A small model's head may be cut to the target's vocabulary: its results serve that vocabulary alone.
        if head.shape[0] != config.vocab_size:
            facts["target"] = f"{identity}, LM head of {head.shape[0]} rows"
        expected += quantizer.stored_shape_bytes(head.shape, HEAD)
    store = SubstituteStore(
        facts,
        cache=getattr(quant, "cache", Cache.off),
        folder=getattr(quant, "folder", None),
        expected_bytes=expected,
        note=note,
    )
    return CachedModules(quantizer, store)
