"""FLUTE's kernel (Guo et al. 2024, arXiv 2407.10960) for ``quant=higgs``, where ``flute-kernel`` is installed.

Optional, and never chosen by ``auto``: its last release (0.4.2) is built for torch 2.5 and CUDA 12.1. It tunes itself
once per shape, and its sums of slices are not deterministic (acceptance may vary in the last bits, output may not).
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from subspec.kernels.few_rows import apply_swiglu
from subspec.quant.hadamard import Rotate, rotate
from subspec.quant.level_linear import LevelLinear
from subspec.quant.optional_package import import_problem
from subspec.quant.pairs import QuantizedPairs

GROUPS = (32, 64, 128, 256)
"""Group sizes that its kernels have."""


class FluteLinear(LevelLinear):
    """FLUTE's kernel behind the interface of a draft level's Linears.

    Raises:
        ValueError: it has no kernel for this group size or number of outputs.
    """

    kind, parts = "flute", ("words", "scale")

    def __init__(self, weight: QuantizedPairs, *, swiglu: bool = False, rotate: Rotate = rotate) -> None:
        if problem := unfit(weight.pairs.shape[0], weight.group_size):
            raise ValueError(f"FLUTE: {problem}")
        higgs: Any = importlib.import_module("flute.integrations.higgs")
        tune: Any = importlib.import_module("flute.tune")
        utils: Any = importlib.import_module("flute.utils")
        grid, pairs, device = weight.grid, weight.pairs, weight.pairs.device
        if grid.dim == 1:  # a point per weight
            pairs = torch.stack([pairs & (1 << grid.bits) - 1, pairs >> grid.bits], dim=-1).flatten(1)
        self.words, self.scale, self.table, table, self._tuned = higgs.prepare_data_transposed(
            pairs,
            weight.scale.to(torch.bfloat16),
            grid.points.to(device, torch.bfloat16).contiguous(),
            num_bits=grid.bits,
            group_size=weight.group_size,
            vector_size=grid.dim,
            dtype=torch.bfloat16,
            device=device,
            check_correctness=False,
        )
        self.pairs = table.view(dtype=torch.float32)
        self._product = tune.qgemm_v2
        self._workspace = utils.make_workspace_streamk(device=device)
        self.rotation, self.swiglu, self._rotate = weight.rotation, swiglu, rotate
        self.stride = weight.pairs.shape[0]
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._product(
            self._rotate(x, self.rotation), self.words, self.scale, self.table, self.pairs, self._workspace, self._tuned
        )
        return apply_swiglu(y) if self.swiglu else y.unsqueeze(0)


def unfit(out_features: int, group_size: int) -> str | None:
    """Why it does not take a weight; None if it does."""
    if group_size not in GROUPS:
        return f"it has groups of {', '.join(map(str, GROUPS))}, not {group_size}"
    if out_features % 16:
        return f"{out_features} outputs are not a multiple of 16"
    return None


def unavailable() -> str | None:
    """Why it cannot run here, in a few words; None if it can."""
    install = "pip install flute-kernel, whose releases need torch 2.5"
    return import_problem("flute", install, "flute.integrations.higgs", "flute.tune")
