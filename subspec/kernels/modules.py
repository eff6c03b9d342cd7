"""Modules of Triton kernels by name, with a stand-in for the meta device."""

import importlib
from collections.abc import Callable
from typing import Any

import torch


class _NoLaunch:
    """A module of kernels whose launches do nothing: kernels allocate no memory, and meta tensors hold no data."""

    def __getattr__(self, name: str) -> "_NoLaunch":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


_NO_LAUNCH = _NoLaunch()


def triton_kernels(name: str, device: torch.device) -> Any:
    """The module ``subspec.kernels.<name>``; on the meta device a stand-in that needs no Triton.

    The import is deferred: machines that only compose configurations or plan have no Triton.
    """
    return _NO_LAUNCH if device.type == "meta" else importlib.import_module(f"subspec.kernels.{name}")
