"""CUDA sources of this package, compiled by the run-time compiler that ships with PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch


def compile_cuda(
    sources: Sequence[str], settings: Mapping[str, int], name: str, device: int, capability: str | None = None
) -> Any:
    """Compile a kernel from files of ``kernels/csrc`` (as one) and macros by name, for the CUDA device of a number.

    Args:
        capability: compute capability with a suffix for instructions of one architecture, like ``90a``; None: the
            device's.
    """
    folder = resources.files("subspec.kernels").joinpath("csrc")
    header = "".join(f"#define {key} {value}\n" for key, value in settings.items())
    text = "".join(folder.joinpath(source).read_text(encoding="utf-8") for source in sources)
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(header + text, name, compute_capability=capability)


def problem(trial: Callable[[], object]) -> str | None:
    """Why sources for tensor cores cannot be compiled here, in a few words; None if ``trial`` compiles one of them."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 (Ampere) or later"
    try:
        trial()
    except Exception as error:
        return f"the run-time compiler failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None
