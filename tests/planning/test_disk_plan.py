"""The plan of a target that streams from a disk: what fits stays, and a refusal's remedies work."""

import re
from dataclasses import replace

import pytest

from subspec.config.schema import Device
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB, headroom
from subspec.planning.disk_plan import plan_disk
from subspec.targets.planted import SHAPES
from tests.helpers.planning import settings

PROCESS = GIB // 2


def planned(draft="subspec", shape="qwen2_5_7b", host_free=1 << 50, tree=(16, 4), itemsize=2, decoding=None, **offload):
    config = replace(settings(draft=draft, tree=tree, decoding=decoding, **offload), device=Device.cpu)
    return plan_disk(config, SHAPES[shape](), itemsize=itemsize, process_bytes=PROCESS, host_free=host_free)


def total(plan):
    return sum(item.bytes for item in plan.items)


@pytest.mark.parametrize("draft", ["none", "subspec", "prompt_lookup"])
def test_as_many_layers_stay_as_fit(draft):
    least = planned(draft, ram_gib=100, resident_layers=0, link_gb_per_s=2)
    assert least.streamed_layers == tuple(range(28))
    assert least.pass_seconds == 28 * least.layer_bytes / 2e9
    assert least.plain_resident == 28
    seen = []
    for extra in (0.2, 1.2, 5.5, 40):
        budget = total(least) * 1.012 + 2**26 + extra * least.layer_bytes
        plan = planned(draft, ram_gib=budget / GIB)
        seen.append(len(plan.resident_layers))
        assert total(plan) + headroom(plan.budget) <= plan.budget == int(budget)
        assert sorted(plan.resident_layers + plan.streamed_layers) == list(range(28))
        assert plan.ring_slots == min(2, len(plan.streamed_layers))
        assert plan.plain_resident >= len(plan.resident_layers)
        if plan.streamed_layers:  # no further layer fits
            assert total(plan) + headroom(plan.budget) + plan.layer_bytes > plan.budget
            assert {0, 27} <= set(plan.streamed_layers)
    assert seen == sorted(seen)
    assert seen[-1] == 28
    assert seen[1] < seen[2] < 28


def test_rows_name_what_takes_memory():
    rows = {item.name: item.bytes for item in planned(ram_gib=12, resident_layers=3).items}
    layer = planned(ram_gib=12).layer_bytes
    assert rows["process"] == PROCESS
    assert rows["resident layers"] == 3 * layer
    assert 2 * layer <= rows["ring"] <= 2 * layer + 2**16
    weights = 28 * (layer // 2)
    # 4 bits a weight, a scale and a zero of 16 bits per 64 weights; the head in 8 bits, with our own kernels and a
    # factor of 32 bits per 64 weights.
    assert 0.97 * weights < (rows["substitute"] - 152064 * 3584 * 17 / 16) * 16 / 9 < weights
    assert rows["embedding, norm, LM head"] == (2 * 152064 * 3584 + 3584) * 2
    exact = planned(ram_gib=12, itemsize=4, resident_layers=0)
    assert exact.layer_bytes == 2 * layer


@pytest.mark.parametrize(
    ("draft", "length", "remedy"), [("none", 16384, "decoding.max_length"), ("subspec", 2048, "draft")]
)
def test_remedies_of_a_refusal_work(draft, length, remedy):
    run = {"draft": draft, "decoding": {"max_length": length}}
    run["ram_gib"] = total(planned(**run | {"ram_gib": 100}, resident_layers=0)) / GIB - 0.2
    with pytest.raises(ConfigError, match=r"offload\.ram_gib=\S+ cannot hold this run") as caught:
        planned(**run)
    line = str(caught.value)
    parts = re.search(r"GiB: (.*); raise", line)[1].split(" + ")
    needed = float(re.search(r"needs (\S+) GiB", line)[1])
    assert sum(float(part.rpartition(" ")[2]) for part in parts) == pytest.approx(needed, abs=0.1)
    raised = float(re.search(r"raise offload\.ram_gib to at least (\S+),", line)[1])
    assert len(planned(**run | {"ram_gib": raised}).resident_layers) <= 1
    key, value = re.search(r"or set (\S+)=(\w+)", line).groups()
    assert key == remedy
    planned(**run | ({"draft": value} if key == "draft" else {"decoding": {"max_length": int(value)}}))


def test_the_smaller_of_the_allowed_and_the_free_counts():
    free = planned(host_free=14 * GIB)
    assert free.budget == 14 * GIB + PROCESS
    assert planned(ram_gib=12, host_free=14 * GIB).budget == 12 * GIB
    assert planned(ram_gib=80, host_free=14 * GIB).budget == free.budget
    with pytest.raises(ConfigError, match=r"device=cpu needs .* 1\.50 GiB are free: free some memory, or "):
        planned(ram_gib=80, host_free=GIB)


def test_texts_side_by_side_have_a_cache_each():
    plans = [planned(ram_gib=12, decoding={"texts": texts}) for texts in (1, 8)]
    one, eight = ({item.name: item.bytes for item in plan.items} for plan in plans)
    assert (eight["KV cache"], eight["tree"]) == (8 * one["KV cache"], 8 * one["tree"])
    assert eight["draft level"] == 8 * one["draft level"]
    assert planned(ram_gib=12, decoding={"texts": "auto"}).texts == 8
    with pytest.raises(ConfigError, match=r"set decoding\.texts=4"):
        planned(ram_gib=11, decoding={"texts": 8})
