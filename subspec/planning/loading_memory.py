"""Peak device memory while a target and its substitute are loaded, from shapes.

These sizes are formulas, not traces: quantizing and coding do not run on the meta device, since HQQ's optimiser reads
its error back to stop, and a code is as long as its weights make it. The loader (:mod:`subspec.offload.loader`) holds
one exact layer with the quantized weights of its Linears and, one after another, the temporaries of quantizing a
Linear, of packing a fused Linear, and of coding the exact weights. The KV cache, the ring, the resident layers and the
workspaces are allocated later. If loading needs more room than they do, layers of the substitute are staged on the host
(:meth:`subspec.planning.memory_layout.MemoryLayout.staged_layers`). A layer from the cache of coded layers needs less.
"""

import math
from collections.abc import Mapping

import torch

from subspec.codec.coded_head import slice_rows
from subspec.codec.format import BLOCK
from subspec.kernels.int4 import PACKED_AT_ONCE
from subspec.levels.build import ROLES
from subspec.levels.quantization import LevelQuantization
from subspec.targets.layer_bytes import PlainCodec

PACKING = 27
"""Bytes per weight that is packed at once: 64-bit copies before, while and after they are shifted."""

ENCODING = 124
"""Bytes per weight that is encoded at once: cells, symbols, lengths, positions (counted: 113 for HQQ's intervals, 117
for HIGGS's)."""

HEAD = "head.lm_head"


def loading_bytes(
    quantization: LevelQuantization,
    layer: Mapping[str, torch.Size],
    head: tuple[int, int],
    itemsize: int,
    coded_bytes: int,
    *,
    head_is_coded: bool = False,
) -> int:
    """Peak of loading layers, beside packed layers and the parameters outside the layers.

    Args:
        layer: shape of every parameter of a layer by name.
        head: vocabulary and hidden size.
        itemsize: bytes per exact weight.
        coded_bytes: of a coded layer; 0: the target is not coded.
        head_is_coded: whether the exact LM head is coded: the draft's own is then quantized before the layers
            (:func:`head_loading_bytes`), else after them.
    """
    quantizer = quantization.quantizer
    fused = [role for role in quantization.shapes if role != "head"]
    linears = {name: tuple(layer[f"{name}.weight"]) for role in fused for name in ROLES[role]}
    quantized = sum(quantizer.format_of(name).quantized_bytes(*shape) for name, shape in linears.items())
    steps = [quantizer.format_of(name).peak_bytes(*shape) for name, shape in linears.items()]
    steps += [_packing(quantization, role) for role in fused]
    if coded_bytes:
        restored = max(n * k * 2 for n, k in linears.values())
        steps.append(_coding(coded_bytes, ENCODING * BLOCK + restored))
    peak = PlainCodec(itemsize).layer_bytes(layer) + quantized + max(steps, default=0)
    if "head" in quantization.shapes and not head_is_coded:
        own = max(quantizer.format_of(HEAD).peak_bytes(*head), _packing(quantization, "head"))
        peak = max(peak, quantizer.format_of(HEAD).quantized_bytes(*head) + own)
    return peak


def head_loading_bytes(quantization: LevelQuantization, head: tuple[int, int], room: int, coded_bytes: int) -> int:
    """Peak of making the draft's LM head and coding the exact one, beside the packed one: the first step of loading.

    Args:
        head: vocabulary and hidden size.
        room: bytes of the buffer that slices are restored into.
        coded_bytes: of the coded head.
    """
    n, k = head
    quantizer = quantization.quantizer
    rows = max(count for _, count in slice_rows(n, k, room))
    # A slice's code, and the encoder's temporaries or the restored slice with its comparison.
    slice_bytes = math.ceil(coded_bytes * rows / n) + max(ENCODING * min(BLOCK, rows * k), 3 * rows * k)
    steps = [
        quantizer.format_of(HEAD).peak_bytes(*head),
        _packing(quantization, "head"),
        _coding(coded_bytes, slice_bytes),
    ]
    return 2 * n * k + quantizer.format_of(HEAD).quantized_bytes(*head) + max(steps)


def _coding(coded_bytes: int, temporaries: int) -> int:
    """The code with, first, the encoder's temporaries, and in the end a copy of it in one run of bytes."""
    return coded_bytes + max(coded_bytes, temporaries)


def _packing(quantization: LevelQuantization, role: str) -> int:
    n, k = quantization.shapes[role]
    name = HEAD if role == "head" else ROLES[role][0]
    return quantization.quantizer.format_of(name).quantized_bytes(n, k) + PACKING * min(n * k, PACKED_AT_ONCE)
