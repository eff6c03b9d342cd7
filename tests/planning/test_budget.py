"""Budgets that a card can keep: what CUDA takes, ``offload.vram_gib=auto``, and refusals before anything is loaded."""

import pytest
import torch

from subspec.config.enums import VramCounts
from subspec.config.schema import AccelerateOffloadConfig, Placement
from subspec.errors import ConfigError
from subspec.memory.allocator import GIB
from subspec.memory.device import bytes_of_cuda, bytes_of_others, bytes_of_process
from subspec.planning.budget import DeviceMemory, budget_of
from tests.helpers.device import fake_device
from tests.helpers.planning import planned, settings

CUDA = torch.device("cuda")


def offload(vram_gib, counts="allocator"):
    return AccelerateOffloadConfig(name="accelerate", vram_gib=vram_gib, vram_counts=VramCounts(counts))


@pytest.mark.parametrize(
    ("answers", "memory", "others", "cuda"),
    [
        (True, {"others": 2.0}, 2.0, 0.5),
        (True, {"others": 2.0, "reserved": 1.0}, 2.0, 0.5),
        (True, {"others": 2.0, "context": 0.0}, 1.1, 0.9),  # read too late: the context was there already
        (False, {"others": 2.0}, 1.6, 0.9),  # all that CUDA ever takes is taken to be its own
        (False, {}, 0.0, 0.5),
    ],
)
def test_the_drivers_figures_are_divided_among_processes(monkeypatch, answers, memory, others, cuda):
    device = fake_device(monkeypatch, answers=answers, **memory)
    assert bytes_of_others(0) / GIB == pytest.approx(others)
    assert bytes_of_cuda(0) / GIB == pytest.approx(cuda)
    device.reserved += 3.0
    device.context += 0.2
    assert bytes_of_cuda(0) / GIB == pytest.approx(cuda + 0.2)
    assert bytes_of_process(0) / GIB == pytest.approx(cuda + 0.2 + device.reserved)


@pytest.mark.parametrize(("context", "share"), [(0.3, 0.7), (0.5, 0.9), (0.7, 0.9), (1.1, 1.1)])
def test_cudas_share_is_what_is_measured_and_what_comes_later(monkeypatch, context, share):
    """Kernels of an earlier run in this process are counted once."""
    fake_device(monkeypatch, context=context)
    memory = DeviceMemory.measured(CUDA)
    assert memory.cuda.bytes / GIB == pytest.approx(share)
    assert f"{context:.2f} measured" in memory.cuda.note
    assert memory.free == 8 * GIB


@pytest.mark.parametrize(
    ("counts", "asked", "vram", "allocator"),
    [
        ("allocator", 4.0, 4.0, 4.0),
        ("device", 4.0, 4.0, 3.1),
        ("allocator", 6.1, 6.1, 6.1),
        ("device", 7.0, 7.0, 6.1),
        ("allocator", "auto", 6.0, 6.0),  # 8 less 1 of others, 0.9 of CUDA and a margin of 0.1
        ("device", "auto", 6.9, 6.0),
    ],
)
def test_a_budget_in_both_ways_of_counting(monkeypatch, counts, asked, vram, allocator):
    fake_device(monkeypatch, others=1.0)
    found = budget_of(offload(asked, counts), DeviceMemory.measured(CUDA))
    assert found.bytes / GIB == pytest.approx(vram)
    assert found.allocator / GIB == pytest.approx(allocator)
    assert found.facts() == {"vram_gib": vram, "vram_counts": counts, "cuda_gib": 0.9}


@pytest.mark.parametrize(
    ("counts", "asked", "others", "line"),
    [
        ("allocator", 6.2, 1.0, r"=6\.2 and the 0\.9 GiB .* more than the 7 GiB free .* at most 6\.1, or to auto$"),
        ("device", 7.1, 1.0, r"=7\.1 is more than the 7 GiB free on this machine's GPU: .* at most 7, or to auto$"),
        ("allocator", 1.0, 7.3, r"=1 and .*: free device memory$"),
        ("allocator", "auto", 7.3, r"=auto and .*: free device memory$"),
    ],
)
def test_a_budget_that_the_device_cannot_hold_is_refused(monkeypatch, counts, asked, others, line):
    fake_device(monkeypatch, others=others)
    with pytest.raises(ConfigError, match=rf"^offload\.vram_gib{line}"):
        budget_of(offload(asked, counts), DeviceMemory.measured(CUDA))


def test_without_a_device_only_a_number_is_a_budget():
    assert budget_of(offload(8.0, "device"), None).allocator == 8 * GIB - int(0.9 * GIB)
    with pytest.raises(ConfigError, match=r"offload\.vram_gib=auto needs"):
        budget_of(offload("auto"), None)


@pytest.mark.parametrize(("counts", "gib"), [("allocator", 10.2), ("device", 11.1)])
def test_a_plan_takes_what_a_named_card_has(counts, gib):
    """0.93 of its nominal 12 GiB; either way of counting has the same place for tensors."""
    config = settings("auto", card="RTX 3060", vram_counts=VramCounts(counts))
    plan = planned(config)
    written = plan.to_dict()
    assert written["budget"] / GIB == pytest.approx(gib)
    assert (written["vram_counts"], written["cuda_bytes"]) == (counts, int(0.9 * GIB))
    assert plan.notes[0] == f"offload.vram_gib=auto: {gib} GiB"
    inside = [item for item in plan.items if item.name == "CUDA itself"]
    assert len(inside) == (counts == "device")
    assert plan.total(Placement.device) + plan.headroom <= plan.budget
    assert len(plan.resident_layers) == len(planned(settings(10.2)).resident_layers)


def test_a_refused_plan_counts_cudas_share():
    with pytest.raises(ConfigError, match=r"CUDA itself 0\.90 \+ .*at least ") as refusal:
        planned(settings(5.5, vram_counts=VramCounts.device))
    needed = float(str(refusal.value).split("at least ")[1].split(",")[0])
    planned(settings(needed, vram_counts=VramCounts.device))
    planned(settings(needed - 0.9))
    with pytest.raises(ConfigError):
        planned(settings(needed - 0.01, vram_counts=VramCounts.device))


def test_a_card_too_small_for_the_run_is_not_asked_for_more(monkeypatch):
    fake_device(monkeypatch, total=4.0)
    with pytest.raises(ConfigError, match=r"=auto \(3 GiB\) cannot hold .*; free device memory, or set draft=none"):
        planned(settings("auto"), device=DeviceMemory.measured(CUDA))
