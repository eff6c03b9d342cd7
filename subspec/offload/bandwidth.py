"""The host-to-device link of this machine, measured."""

from statistics import median

import torch

from subspec.utils.pinned import PinnedBuffer

PROBE_BYTES = 256 * 2**20


def measure_link(device: torch.device) -> float:
    """Bandwidth of pinned host-to-device copies of 256 MiB, in 1e9 bytes per second (median of five)."""
    buffer = PinnedBuffer(PROBE_BYTES)
    try:
        target = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(buffer.tensor, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        del target
        torch.cuda.empty_cache()  # a budget planned from this may be smaller than the probe
        return PROBE_BYTES / median(times[1:]) / 1e9
    finally:
        buffer.close()
