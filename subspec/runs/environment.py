"""Environment of a run: versions, source revision, hardware, command line, and peak memory.

No user name and no host name are collected, and the home folder is written as ``~``.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from subspec import __version__
from subspec.memory.allocator import GIB
from subspec.memory.device import bytes_of_cuda, bytes_of_process
from subspec.utils.cpu import cpu_name
from subspec.utils.paths import PACKAGE

PACKAGES = (
    *("torch", "transformers", "hqq", "gemlite", "triton", "hydra-core"),
    *("omegaconf", "datasets", "safetensors", "accelerate", "wandb"),
)
"""Packages whose version can change a result or its speed; missing ones are left out."""


def environment() -> dict[str, Any]:
    """The content of ``environment.json``."""
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "versions": versions(),
        "git": git_state(),
        "platform": platform.platform(),
        "hardware": hardware(),
    }


def command_line() -> list[str]:
    """Arguments of this process, with the home folder as ``~``."""
    home = os.path.expanduser("~").rstrip(os.sep)
    return [argument.replace(home + os.sep, "~" + os.sep) if home else argument for argument in sys.orig_argv]


def versions() -> dict[str, str]:
    """Versions of Python, of this project and of the packages in :data:`PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "subspec": __version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(package: Path = PACKAGE) -> dict[str, Any] | None:
    """``commit`` and ``dirty`` of the checkout that the folder ``package`` is in; None if it is in none."""
    root = package.parent
    git = partial(_output, "git", "--no-optional-locks", "-C", str(root))
    # An installed package may lie inside another repository (a virtual environment in a checkout). Only a repository
    # that tracks our files counts.
    if git("ls-files", "--error-unmatch", f"{package.name}/__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--", package.name, "conf")
    if commit is None or status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def hardware() -> dict[str, Any]:
    """CPU, memory and GPU. ``gpu`` is None without a CUDA device."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 2),
        "gpu": _gpu(),
    }


def peak_ram_gib() -> float:
    """Peak resident memory of this process in GiB."""
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peak_vram_gib() -> float | None:
    """Peak sum of PyTorch's allocations on the current CUDA device, in GiB as all of these; None without one."""
    return _device_gib(torch.cuda.max_memory_allocated)


def reserved_vram_gib() -> float | None:
    """Peak memory that PyTorch's allocator held of the device, cached and fragmented included: what a budget caps."""
    return _device_gib(torch.cuda.max_memory_reserved)


def device_vram_gib() -> float | None:
    """Memory that this process holds of the device now, as the driver counts it, with CUDA's own."""
    return _device_gib(bytes_of_process)


def cuda_vram_gib() -> float | None:
    """The part of :func:`device_vram_gib` that CUDA takes beside PyTorch's allocator."""
    return _device_gib(bytes_of_cuda)


def _device_gib(measure: Callable[[int], int]) -> float | None:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return measure(torch.cuda.current_device()) / GIB


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 2),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver, from the kernel module if readable, else from nvidia-smi."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)", text):
            return found[1]
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.split()[0] if listed else None
