"""Plans of the published targets in their published budgets, and how many layers are resident in each.

    python experiments/planner/plans.py

Needs no GPU and no checkpoint. What it printed is in this folder's README.
"""

import io
import re

from subspec.config.enums import Codec
from subspec.config.schema import (
    BeamTreeConfig,
    BenchmarkConfig,
    Config,
    DecodingConfig,
    DraftConfig,
    HqqConfig,
    NoDraftConfig,
    NoLoggerConfig,
    PlantedTargetConfig,
    StreamOffloadConfig,
    SubstituteDraftConfig,
)
from subspec.planning.plan import Plan, plan_run
from subspec.planning.plan_table import plan_table
from subspec.runs.console import RunConsole
from subspec.targets.planted import SHAPES

BUDGETS = {"qwen2_5_7b": 8.0, "llama3_1_8b": 8.0, "qwen2_5_14b": 12.0, "qwen2_5_32b": 24.0}
"""GiB, as published."""

PUBLISHED = {"qwen2_5_7b": (11, 0), "llama3_1_8b": (11, 0), "qwen2_5_14b": (15, 0), "qwen2_5_32b": (20, 0)}
"""Resident layers of the published runs: plain decoding, and with the substitute."""

LINK_GB_PER_S = 25.0
"""PCIe 4 x16."""


WIDTH = 96
"""Columns of a plan: what breaks no line of these."""

CODECS = {Codec.none: "as they are", Codec.substitute: "coded"}
"""How exact weights cross the link: as published, and coded by the substitute."""


def plan(shape: str, draft: DraftConfig, codec: Codec = Codec.none) -> Plan:
    """The paper's settings: tree 48 x 6, HQQ 4 bits in groups of 64, 2048 tokens, greedy."""
    config = Config(
        target=PlantedTargetConfig(name=shape, shape=shape),
        draft=draft,
        quant=HqqConfig(name="hqq"),
        tree=BeamTreeConfig(name="beam", depth=48, width=6),
        decoding=DecodingConfig(name="greedy"),
        offload=StreamOffloadConfig(name="stream", vram_gib=BUDGETS[shape], link_gb_per_s=LINK_GB_PER_S, codec=codec),
        benchmark=BenchmarkConfig(name="mt_bench"),
        logger=NoLoggerConfig(name="none"),
    )
    return plan_run(config, SHAPES[shape](), link_gb_per_s=None, host_free=None, device=None)


def drafted(shape: str, codec: Codec) -> Plan:
    """A substitute's plan."""
    return plan(shape, SubstituteDraftConfig(name="subspec"), codec)


def comparison() -> list[str]:
    """Lines of two tables: how many layers are resident, and what that makes of a pass over the link."""
    lines = ["resident layers        plain: here  published   substitute: as they are  coded  published"]
    plans = {shape: {codec: drafted(shape, codec) for codec in CODECS} for shape in BUDGETS}
    for shape, budget in BUDGETS.items():
        plain = len(plan(shape, NoDraftConfig(name="none")).resident_layers)
        exact, coded = (len(plans[shape][codec].resident_layers) for codec in CODECS)
        published = PUBLISHED[shape]
        lines.append(
            f"{shape:<12} {budget:>2.0f} GiB {plain:>15} {published[0]:>10} {exact:>24} {coded:>6} {published[1]:>10}"
        )
    lines += ["", "a target pass          as they are: GB   tokens/s at tau 26    coded: GB   tokens/s at tau 26"]
    for shape, budget in BUDGETS.items():
        exact, coded = (plans[shape][codec] for codec in CODECS)
        cells = [(each.streamed_bytes_per_pass / 1e9, each.ceiling(26)) for each in (exact, coded)]
        lines.append(
            f"{shape:<12} {budget:>2.0f} GiB {cells[0][0]:>19.2f} {cells[0][1]:>20.2f} {cells[1][0]:>12.2f} "
            f"{cells[1][1]:>20.2f}"
        )
    return lines


def in_full(shape: str, codec: Codec) -> str:
    """A substitute's whole plan as a table."""
    out = io.StringIO()
    RunConsole(file=out, width=WIDTH).rich.print(plan_table(drafted(shape, codec)))
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()
    return re.sub(r"\n{3,}", "\n\n", text)


def main() -> None:
    """Print the comparison and the eight plans."""
    print("\n".join(comparison()))
    for shape in BUDGETS:
        for codec, how in CODECS.items():
            print(f"\n{shape}, exact weights {how} (offload.codec={codec.value})\n\n{in_full(shape, codec)}")


if __name__ == "__main__":
    main()
