"""Measurement of this machine's GPU for predictions."""

from subspec.config.schema import Device
from subspec.errors import ConfigError
from subspec.planning.gpu_specs import DRIVER_SHARE, GpuSpec, find_gpu

COPY_SHARE = 2713 / 4800
"""Large device copies (bytes read and written) over the data sheet's bandwidth: measured on an H200."""


def measure_gpu() -> GpuSpec:
    """This machine's GPU: its link measured, its memory bandwidth from the table or from a copy.

    Raises:
        ConfigError: there is no CUDA device.
    """
    import torch

    from subspec.offload.bandwidth import measure_link
    from subspec.targets import resolve_device

    device = resolve_device(Device.auto)
    if device.type != "cuda":
        known = "card=NAME (e.g. card=rtx_4090) predicts without one"
        raise ConfigError(f"card=auto measures a CUDA device, and there is none here: {known}")
    properties = torch.cuda.get_device_properties(device)
    link, tensor = measure_link(device), None
    try:
        known_gpu = find_gpu(properties.name)
        memory, tensor = known_gpu.memory_gb_per_s, known_gpu.tensor
    except ConfigError:
        memory = measured_memory_gb_per_s(device) / COPY_SHARE
    # The driver reports less than the nominal size.
    total = properties.total_memory / 2**30 / DRIVER_SHARE
    return GpuSpec(properties.name, total, memory, (4, 16), tensor, measured_link=link)


def measured_memory_gb_per_s(device: object) -> float:
    """Bytes read and written by device copies of 1 GiB, in GB/s."""
    import torch
    from torch.utils.benchmark import Timer

    size = 2**30
    source = torch.empty(size, dtype=torch.uint8, device=device)
    copy = Timer("target.copy_(source)", globals={"source": source, "target": torch.empty_like(source)})
    seconds = copy.timeit(5).median
    del source, copy
    torch.cuda.empty_cache()
    return 2 * size / seconds / 1e9
