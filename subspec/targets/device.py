"""Resolve ``device=auto|cpu|cuda`` and ``target.dtype=auto|...``; check free memory."""

import psutil
import torch

from subspec.config.schema import Device, Dtype
from subspec.errors import ConfigError, SubspecError


def resolve_device(device: Device) -> torch.device:
    """The device of a run; ``auto`` is the current CUDA device if there is one, else the CPU.

    ConfigError for ``cuda`` without a CUDA device.
    """
    if device is Device.cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if device is Device.auto:
        return torch.device("cpu")
    if torch.version.cuda is None:
        why = "this PyTorch is built without CUDA"
    else:
        why = "PyTorch sees no GPU (check the driver and CUDA_VISIBLE_DEVICES)"
    raise ConfigError(f"device=cuda but no CUDA device: {why}; run with device=cpu, or install a CUDA build")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The target's arithmetic; ``auto`` is float32 on a CPU (token-exact) and bfloat16 on a GPU."""
    if dtype is Dtype.auto:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype.value)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Refuse (SubspecError) to load ``needed`` bytes of weights that do not fit, instead of being killed half-way."""
    free = free_memory(device)
    if needed <= free:
        return
    place = "GPU memory" if device.type == "cuda" else "memory"
    remedy = "target.dtype=bfloat16 halves float32 weights" if device.type == "cpu" else "device=cpu"
    raise SubspecError(
        f"{what}: the weights need {needed / 2**30:.1f} GiB of {place} and {free / 2**30:.1f} GiB are free; "
        f"free some, choose a smaller target, or {remedy}"
    )
