"""A draft of modules, quantized in place: read where earlier runs kept it, else quantized and kept there."""

import time
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from subspec.config.schema import Cache, QuantConfig
from subspec.drafts.base import Progress
from subspec.quant.base import HEAD, Quantizer, QuantReport, linear_names, quantize_model
from subspec.quant.build import build_quantizer
from subspec.store.folder import open_store
from subspec.store.module_cache import CachedModules, StorableQuantizer
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
    progress: Progress | None = None,
) -> QuantReport:
    """Quantize the Linears that ``quant`` chooses, as ``quant.folder`` and ``quant.cache`` say where results are kept.

    Args:
        model: its modules are replaced.
        identity: of the exact weights (``LayerSource.identity``); what is kept under another is never used.
        dtype, device: of the model.
        unpack: keep the quantized values as plain Linears.
        what: is quantized, for messages.

    Raises:
        SubspecError: no quantizer, unknown modules or layers, or a ``quant.folder`` that holds something else.
    """
    started = time.perf_counter()
    quantizer = build_quantizer(quant, dtype, device, unpack=unpack, what=what)
    modules, skip = list(getattr(quant, "modules", [])), list(getattr(quant, "skip_layers", []))
    cached = _cached_modules(quantizer, model, quant, identity, dtype, note)
    with cached or nullcontext():
        report = quantize_model(
            model, cached or quantizer, modules=modules, skip_layers=skip, progress=progress
        )
    if cached is not None:
        report.details["cache"] = cached.store.report()
    report.seconds = time.perf_counter() - started
    return report


def _cached_modules(
    quantizer: Quantizer,
    model: PreTrainedModel,
    quant: QuantConfig,
    identity: str,
    dtype: torch.dtype,
    note: Note,
) -> CachedModules | None:
    """``quantizer`` with its results of earlier runs; None when it cannot keep them."""
    if not isinstance(quantizer, StorableQuantizer):
        return None
    facts = {"target": identity, "dtype": str(dtype), **quantizer.facts}
    config = model.config
    layer, _ = parameter_shapes(config)
    chosen = linear_names(list(getattr(quant, "modules", [])))
    layers = config.num_hidden_layers - len(getattr(quant, "skip_layers", ()))
    expected = layers * sum(
        quantizer.stored_shape_bytes(shape, name.split(".")[-2])
        for name, shape in layer.items()
        if len(shape) == 2 and name.split(".")[-2] in chosen
    )
    if HEAD in chosen:
        head = model.get_output_embeddings().weight
        # The target's vocabulary may cut a small model's head: what is kept of it is for that vocabulary alone.
        if head.shape[0] != config.vocab_size:
            facts["target"] = f"{identity}, LM head of {head.shape[0]} rows"
        expected += quantizer.stored_shape_bytes(head.shape, HEAD)
    store = open_store(
        getattr(quant, "cache", Cache.off), getattr(quant, "folder", None), facts, expected, note
    )
    return CachedModules(quantizer, store)
