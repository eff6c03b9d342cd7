"""The budget of a run: ``offload.vram_gib``, what CUDA takes beside PyTorch's allocations, and what the card has.

``offload.vram_counts`` says what the budget bounds. With ``allocator``, the paper's way, it is the cap of PyTorch's
allocator, and CUDA's share comes on top. With ``device`` the cap is the budget less CUDA's share, and the driver shows
no more than the budget. In either case the card must have room for both.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from subspec.config.enums import AUTO, VramCounts
from subspec.config.schema import BudgetedOffloadConfig
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, Allocation, least_budget
from subspec.memory.device import CONTEXT_BYTES, KERNEL_BYTES, bytes_of_cuda, bytes_of_others, index_of
from subspec.planning.gpu_specs import DRIVER_SHARE, GpuSpec

MARGIN = GIB // 10
"""Bytes that ``offload.vram_gib=auto`` leaves free on this machine's device."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a GPU, in bytes.

    Attributes:
        name: for messages.
        free: for this process, CUDA's share included.
        cuda: CUDA's share, once everything is loaded.
        margin: left free by ``offload.vram_gib=auto``.
    """

    name: str
    free: int
    cuda: Allocation
    margin: int

    @classmethod
    def of_card(cls, card: GpuSpec) -> "DeviceMemory":
        """Of a GPU of the table, empty."""
        size = int(card.vram_gib * GIB)
        return cls(card.name, size, _cuda(None), int(size * (1 - DRIVER_SHARE)))

    @classmethod
    def measured(cls, device: torch.device) -> "DeviceMemory":
        """Of this machine's device, now. Creates a CUDA context."""
        index = index_of(device)
        others = bytes_of_others(index)
        _, total = torch.cuda.mem_get_info(index)
        return cls("this machine's GPU", total - others, _cuda(bytes_of_cuda(index)), MARGIN)


@dataclass(frozen=True)
class Budget:
    """Device memory of a run.

    Attributes:
        bytes: ``offload.vram_gib``, resolved.
        counts: what it bounds.
        cuda: CUDA's share.
    """

    bytes: int
    counts: VramCounts
    cuda: Allocation

    @property
    def items(self) -> tuple[Allocation, ...]:
        """Allocations within the budget that are not PyTorch's."""
        return (self.cuda,) if self.counts is VramCounts.device else ()

    @property
    def allocator(self) -> int:
        """Bytes that PyTorch's allocator may hold."""
        return self.bytes - sum(item.bytes for item in self.items)

    def least(self, used: int) -> int:
        """The smallest ``offload.vram_gib``, in bytes, that holds ``used`` bytes of PyTorch's allocations."""
        return least_budget(used) + self.bytes - self.allocator

    def facts(self) -> dict[str, Any]:
        """For the record. GiB; ``cuda_gib`` is the planned share."""
        return {
            "vram_gib": round(self.bytes / GIB, 4),
            "vram_counts": self.counts.value,
            "cuda_gib": round(self.cuda.bytes / GIB, 4),
        }


def budget_of(offload: BudgetedOffloadConfig, memory: DeviceMemory | None) -> Budget:
    """The budget that ``offload`` asks for on a device; ``auto`` is all that is free there.

    Args:
        memory: of the device; None: unknown, nothing is checked.

    Raises:
        ConfigError: the device cannot hold it together with CUDA's share, or ``auto`` without a device.
    """
    counts, auto = offload.vram_counts, offload.vram_gib == AUTO
    if memory is None:
        if auto:
            raise ConfigError(
                "offload.vram_gib=auto needs a CUDA device, or plan_only=true and offload.card=NAME: set a number"
            )
        return Budget(int(offload.vram_gib * GIB), counts, _cuda(None))
    beside = memory.cuda.bytes if counts is VramCounts.allocator else 0
    room = memory.free - beside
    asked = _floor_gib(room - memory.margin) if auto else offload.vram_gib
    if 0 < asked * GIB <= room:
        return Budget(int(asked * GIB), counts, memory.cuda)
    what = f"offload.vram_gib={AUTO if auto else f'{asked:g}'}"
    what += f" and the {beside / GIB:.2g} GiB that CUDA itself takes are" if beside else " is"
    remedy = f"set offload.vram_gib to at most {_floor_gib(room):g}, or to auto"
    if auto or _floor_gib(room) <= 0:
        remedy = "free device memory"
    raise ConfigError(f"{what} more than the {memory.free / GIB:.4g} GiB free on {memory.name}: {remedy}")


def _floor_gib(size: int) -> float:
    """GiB, rounded down to 0.1."""
    return math.floor(10 * size / GIB) / 10


def _cuda(measured: int | None) -> Allocation:
    """CUDA's share, of which ``measured`` bytes are taken already."""
    if measured is None:
        note = "context, kernels, graphs: estimated"
        return Allocation("CUDA itself", ((CONTEXT_BYTES + KERNEL_BYTES, 1),), note)
    size = max(measured, min(measured, CONTEXT_BYTES) + KERNEL_BYTES)
    note = f"{measured / GIB:.2f} measured, the rest estimated: kernels and graphs come later"
    return Allocation("CUDA itself", ((size, 1),), note)
