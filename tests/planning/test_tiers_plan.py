"""Layers that host memory cannot hold go to a disk: as few as possible, evenly, and the slower link is named."""

import itertools
import re

import pytest
from rich.console import Console

from subspec.config.enums import Codec
from subspec.config.schema import Cache, Placement
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB
from subspec.planning.plan_table import plan_table
from tests.helpers.planning import planned, settings

LINK = {"link_gb_per_s": 50.0}


def host(plan):
    return plan.total(Placement.host)


@pytest.mark.parametrize(
    ("draft", "codec"), [("subspec", Codec.substitute), ("subspec", Codec.none), ("none", Codec.none)]
)
def test_as_few_layers_as_possible_go_to_the_disk(draft, codec):
    whole = planned(settings(8.0, draft, codec=codec, ram_gib=64.0))
    assert whole.disk_layers == ()
    assert whole.disk_bytes_per_pass == 0
    if codec is Codec.substitute:  # resident layers leave host memory first, where they only wait
        assert not whole.coded_in_files
        whole = planned(settings(8.0, draft, codec=codec, ram_gib=(host(whole) - 1) / GIB))
        assert whole.coded_in_files
        assert whole.disk_layers == ()
    counts = []
    for less in (0.01, 1.5, 4.2, 5.7):
        ram = (host(whole) - less * whole.layer_bytes) / GIB
        plan = planned(settings(8.0, draft, codec=codec, ram_gib=ram), **LINK)
        counts.append(len(plan.disk_layers))
        assert host(plan) <= plan.host_limit == int(ram * GIB)
        assert plan.resident_layers == whole.resident_layers
        assert set(plan.disk_layers) < set(plan.streamed_layers)
        items = {item.name: item for item in plan.items}
        pinned = len(plan.streamed_layers) - counts[-1]
        assert items["streamed layers"].bytes == pinned * plan.layer_bytes
        slots = min(2, counts[-1])
        assert slots * plan.layer_bytes < items["disk ring"].bytes < slots * plan.layer_bytes + 2**16
        assert host(plan) + plan.layer_bytes > plan.host_limit  # one more in pinned memory would not fit
        gaps = [plan.streamed_layers.index(index) for index in plan.disk_layers]
        steps = [after - before for before, after in itertools.pairwise(gaps)]
        assert not steps or max(steps) - min(steps) <= 1
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] > counts[1]


def test_free_memory_alone_leaves_no_layer_to_a_disk():
    with pytest.raises(ConfigError, match=r"set offload\.ram_gib=10 to read the layers beyond it from a disk"):
        planned(settings(8.0), host_free=10 * GIB)
    assert planned(settings(8.0, ram_gib=64.0), host_free=10 * GIB).disk_layers


@pytest.mark.parametrize(("disk", "slower"), [(1.0, "disk"), (500.0, "link"), (None, None)])
def test_the_floor_is_the_slower_links(disk, slower):
    plan = planned(settings(8.0, codec=Codec.substitute, ram_gib=4.5, disk_gb_per_s=disk), **LINK)
    link_s = plan.streamed_bytes_per_pass / 50e9
    assert plan.disk_bytes_per_pass == len(plan.disk_layers) * plan.layer_bytes > 0
    assert plan.slower_link == slower
    console = Console(width=120)
    with console.capture() as capture:
        console.print(plan_table(plan))
    text = capture.get()
    assert f"{len(plan.disk_layers)} of them from a disk" in text
    if disk is None:
        assert plan.pass_seconds is plan.ceiling(4) is plan.plain_ceiling is None
        assert "measured when the run starts" in text
        return
    disk_s = plan.disk_bytes_per_pass / (disk * 1e9)
    assert plan.pass_seconds == pytest.approx(max(link_s, disk_s))
    assert plan.plain_ceiling == pytest.approx(
        1 / max(plan.plain_bytes_per_pass / 50e9, plan.plain_disk_bytes / (disk * 1e9))
    )
    assert f"(the {slower} is slower)" in text
    assert f"ceiling of the {slower}" in text
    written = plan.to_dict()
    assert written["slower_link"] == slower
    assert written["disk_layers"] == list(plan.disk_layers)


def test_plain_decoding_in_the_same_memory_reads_more_from_the_disk():
    """Its layers are not coded."""
    plan = planned(settings(8.0, codec=Codec.substitute, ram_gib=4.5))
    assert plan.plain_bytes_per_pass > plan.plain_disk_bytes > 2 * plan.disk_bytes_per_pass


def test_memory_below_the_ring_and_loading_is_refused():
    with pytest.raises(ConfigError, match=r"disk ring 0\.\d+.*raise offload\.ram_gib to at least") as caught:
        planned(settings(8.0, codec=Codec.substitute, ram_gib=2.0))
    least = float(re.search(r"at least (\S+) ", str(caught.value))[1])
    plan = planned(settings(8.0, codec=Codec.substitute, ram_gib=least))
    assert set(plan.disk_layers) < set(plan.streamed_layers)  # some fit where loading was


def test_coded_layers_on_a_disk_need_the_cache():
    quant = {"cache": Cache.off}
    with pytest.raises(ConfigError, match=r"offload\.ram_gib=6.*quant\.cache=auto"):
        planned(settings(8.0, codec=Codec.substitute, ram_gib=6.0, quant=quant))
    assert not planned(settings(8.0, codec=Codec.substitute, ram_gib=60.0, quant=quant)).disk_layers
    assert planned(settings(8.0, ram_gib=6.0, quant=quant)).disk_layers
