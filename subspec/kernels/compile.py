"""CUDA sources of this package, compiled by the run-time compiler that ships with PyTorch."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch


def compile_cuda(sources: Sequence[str], settings: Mapping[str, int], name: str, device: int) -> Any:
    """A kernel.

    Args:
        sources: files of this package, compiled as one.
        settings: macros that they expect.
        name: of the kernel.
        device: number of the CUDA device that it is for.
    """
    folder = resources.files("subspec.kernels")
    header = "".join(f"#define {key} {value}\n" for key, value in settings.items())
    text = "".join(folder.joinpath(source).read_text(encoding="utf-8") for source in sources)
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(header + text, name)
