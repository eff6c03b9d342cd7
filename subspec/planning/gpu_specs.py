"""Memory, memory bandwidth and PCIe interface of common NVIDIA GPUs, for plans on other machines.

The figures are those of NVIDIA's public data sheets and product pages
(GeForce: the specification tables; data centre: the data sheets of T4, V100, A10, A100, L4, L40S, A6000, RTX 6000
Ada, H100, H200). Sizes are nominal; a driver reports up to 7 % less (ECC, reserved pages). Multiprocessors, boost
clocks and operations per cycle (dense bfloat16, sums in float32) are those of the architecture white papers; their
product is the tensor cores' rate on the data sheet. GPUs without bfloat16 tensor cores have none.

Link rates are *estimates*: copies from pinned memory reach about 0.87 of a PCIe link's raw rate (packet headers
and flow control take the rest). One is measured: 55.5 GB/s on an H200 (PCIe 5 x16, copies of 8 MiB and more),
0.88 of the raw 63.0. They hold for a slot with all of the GPU's lanes at its generation; for a slower slot set
``offload.link_gb_per_s``.
"""

import re
from dataclasses import dataclass

from subspec.errors import ConfigError

LANE_GB_PER_S = {3: 0.985, 4: 1.969, 5: 3.938}
"""Raw rate of one PCIe lane in one direction, GB/s, by generation (8, 16, 32 GT/s with 128b/130b coding)."""

LINK_EFFICIENCY = 0.87
"""Estimated share of the raw rate that pinned host-to-device copies reach."""


DRIVER_SHARE = 0.93
"""Smallest share of the nominal memory that a driver reports."""


@dataclass(frozen=True)
class GpuSpec:
    """A GPU.

    Attributes:
        vram_gib: device memory, GiB. memory_gb_per_s: its bandwidth, GB/s (1e9 bytes).
        pcie: (generation, lanes).
        tensor: multiprocessors times their boost clock in GHz, and tensor operations of one per cycle; None: unknown.
        measured_link: pinned host-to-device GB/s; None: not measured.
    """

    name: str
    vram_gib: float
    memory_gb_per_s: float
    pcie: tuple[int, int]
    tensor: tuple[float, int] | None = None
    measured_link: float | None = None

    @property
    def link_gb_per_s(self) -> float:
        """Pinned host-to-device bandwidth, GB/s: measured, else 0.87 of the raw link."""
        generation, lanes = self.pcie
        return self.measured_link or LINK_EFFICIENCY * LANE_GB_PER_S[generation] * lanes


GPU_SPECS = (
    GpuSpec("T4", 16, 320, (3, 16)),
    GpuSpec("V100 16GB", 16, 900, (3, 16)),
    GpuSpec("V100 32GB", 32, 900, (3, 16)),
    GpuSpec("RTX 2080 Ti", 11, 616, (3, 16)),
    GpuSpec("RTX 3060 12GB", 12, 360, (4, 16), (28 * 1.78, 512)),
    GpuSpec("RTX 3070", 8, 448, (4, 16), (46 * 1.73, 512)),
    GpuSpec("RTX 3080 10GB", 10, 760, (4, 16), (68 * 1.71, 512)),
    GpuSpec("RTX 3090", 24, 936, (4, 16), (82 * 1.70, 512)),
    GpuSpec("RTX 4060", 8, 272, (4, 8), (24 * 2.46, 512)),
    GpuSpec("RTX 4060 Ti 8GB", 8, 288, (4, 8), (34 * 2.54, 512)),
    GpuSpec("RTX 4060 Ti 16GB", 16, 288, (4, 8), (34 * 2.54, 512)),
    GpuSpec("RTX 4070", 12, 504, (4, 16), (46 * 2.48, 512)),
    GpuSpec("RTX 4070 Ti Super", 16, 672, (4, 16), (66 * 2.61, 512)),
    GpuSpec("RTX 4080", 16, 717, (4, 16), (76 * 2.51, 512)),
    GpuSpec("RTX 4090", 24, 1008, (4, 16), (128 * 2.52, 512)),
    GpuSpec("RTX 5060 Ti 16GB", 16, 448, (5, 8), (36 * 2.57, 512)),
    GpuSpec("RTX 5070", 12, 672, (5, 16), (48 * 2.51, 512)),
    GpuSpec("RTX 5070 Ti", 16, 896, (5, 16), (70 * 2.45, 512)),
    GpuSpec("RTX 5080", 16, 960, (5, 16), (84 * 2.62, 512)),
    GpuSpec("RTX 5090", 32, 1792, (5, 16), (170 * 2.41, 512)),
    GpuSpec("A10", 24, 600, (4, 16), (72 * 1.70, 1024)),
    GpuSpec("A6000", 48, 768, (4, 16), (84 * 1.80, 1024)),
    GpuSpec("RTX 6000 Ada", 48, 960, (4, 16), (142 * 2.51, 1024)),
    GpuSpec("L4", 24, 300, (4, 16), (58 * 2.04, 1024)),
    GpuSpec("L40S", 48, 864, (4, 16), (142 * 2.49, 1024)),
    GpuSpec("A100 40GB", 40, 1555, (4, 16), (108 * 1.41, 2048)),
    GpuSpec("A100 80GB PCIe", 80, 1935, (4, 16), (108 * 1.41, 2048)),
    GpuSpec("A100 80GB SXM", 80, 2039, (4, 16), (108 * 1.41, 2048)),
    GpuSpec("H100 PCIe", 80, 2000, (5, 16), (114 * 1.62, 4096)),
    GpuSpec("H100 SXM", 80, 3350, (5, 16), (132 * 1.83, 4096)),
    GpuSpec("H200", 140, 4800, (5, 16), (132 * 1.83, 4096), measured_link=55.5),
)
"""The table, by age and class."""


def find_gpu(name: str) -> GpuSpec:
    """The GPU called ``name``; case, spaces, ``NVIDIA``, ``GeForce`` and ``RTX`` are ignored.

    Raises:
        ConfigError: no such GPU, or several (``A100``); the message lists them.
    """
    wanted = _key(name)
    for card in GPU_SPECS:
        if _key(card.name) == wanted:
            return card
    begins = [card for card in GPU_SPECS if wanted and re.match(rf"{wanted}(\D|\d+gb|$)", _key(card.name))]
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise ConfigError(f"offload.card={name} could be any of {', '.join(card.name for card in begins)}: say which")
    raise ConfigError(
        f"offload.card={name}: unknown card; known are {', '.join(card.name for card in GPU_SPECS)}. "
        "For another one leave offload.card out and set offload.vram_gib and offload.link_gb_per_s"
    )


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
