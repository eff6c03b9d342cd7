"""What the device holds for a moment while a target and its substitute are loaded, from shapes alone.

One exact layer is there at a time (:mod:`subspec.offload.loader`), with the codes of its Linears, and then one of: what
quantizing a Linear takes, what packing a fused one takes, or what coding the exact weights takes. The KV cache, the
ring, the resident layers and every workspace come later, so there is room for this; where it is more than they are,
some of the substitute's layers wait on the host (:meth:`subspec.planning.layout.Layout.waiting_layers`). A layer from
the cache of coded layers takes less: nothing exact.
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
"""Bytes per weight of those packed at once: 64-bit copies before, while and after they are shifted (counted: 18 for
``int4_mma``, 26 for ``triton_wq``)."""

ENCODING = 124
"""Bytes per weight of those encoded at once: cells, symbols, lengths, positions (counted: 113 for HQQ's intervals, 117
for HIGGS's)."""


def loading_bytes(
    quantization: LevelQuantization,
    layer: Mapping[str, torch.Size],
    head: tuple[int, int],
    itemsize: int,
    coded_bytes: int,
    *,
    head_is_coded: bool = False,
) -> int:
    """Most that loading layers holds besides what stays: packed layers and what is not in layers.

    exact layer + codes of its Linears + the largest of

    * quantizing the largest Linear (``CodeQuantizer.peak_bytes``);
    * packing: the codes of the largest fused Linear once more, and :data:`PACKING`;
    * coding: the code, and once more in one run of bytes or, before that, :data:`ENCODING` beside a decoded Linear.

    An LM head of the draft's own is quantized last, when no layer is there any more, unless the exact one is coded
    (:func:`head_loading_bytes`).

    Args:
        layer: shape of every parameter of a layer by name.
        head: vocabulary and hidden size.
        itemsize: bytes per exact weight.
        coded_bytes: of a coded layer; 0: the target is not coded.
        head_is_coded: whether the exact LM head is coded, and so made before the layers.
    """
    quantizer = quantization.quantizer
    fused = {role: shape for role, shape in quantization.shapes.items() if role != "head"}
    linears = [
        (layer[f"{name}.weight"][0], layer[f"{name}.weight"][1], name)
        for role in fused
        for name in ROLES[role]
    ]
    codes = sum(quantizer.codes_bytes((n, k), name) for n, k, name in linears)
    steps = [quantizer.peak_bytes((n, k), name) for n, k, name in linears]
    steps += [_packing(quantization, role) for role in fused]
    if coded_bytes:
        decoded = max(n * k * 2 for n, k, _ in linears)
        steps.append(coded_bytes + max(coded_bytes, ENCODING * BLOCK + decoded))
    most = PlainCodec(itemsize).layer_bytes(layer) + codes + max(steps, default=0)
    if "head" in quantization.shapes and not head_is_coded:
        own = max(quantizer.peak_bytes(head, "head.lm_head"), _packing(quantization, "head"))
        most = max(most, quantizer.codes_bytes(head, "head.lm_head") + own)
    return most


def head_loading_bytes(
    quantization: LevelQuantization, head: tuple[int, int], room: int, coded_bytes: int
) -> int:
    """Most that making the draft's LM head and coding the exact one hold besides the packed one.

    exact head + codes + the largest of

    * quantizing it (``CodeQuantizer.peak_bytes``);
    * packing it: its codes once more, and :data:`PACKING`;
    * coding it: the code, and once more in one run of bytes or, before that, that of a slice once more and
      :data:`ENCODING` or the decoded slice and what compares it.

    That is done first of all, when neither the layers nor what comes later are there.

    Args:
        head: vocabulary and hidden size.
        room: bytes of the buffer that slices are decoded into.
        coded_bytes: of the coded head.
    """
    n, k = head
    name = "head.lm_head"
    rows = max(count for _, count in slice_rows(n, k, room))
    slice_code = math.ceil(coded_bytes * rows / n)
    coding = coded_bytes + max(coded_bytes, slice_code + max(ENCODING * min(BLOCK, rows * k), 3 * rows * k))
    quantizer = quantization.quantizer
    steps = [quantizer.peak_bytes(head, name), _packing(quantization, "head"), coding]
    return 2 * n * k + quantizer.codes_bytes(head, name) + max(steps)


def _packing(quantization: LevelQuantization, role: str) -> int:
    n, k = quantization.shapes[role]
    name = "lm_head" if role == "head" else ROLES[role][0]
    return quantization.quantizer.codes_bytes((n, k), name) + PACKING * min(n * k, PACKED_AT_ONCE)
