"""Loading a run's target: what the device allocator is told, and what host memory must hold."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from subspec import session
from subspec.config.enums import Device, VramCounts
from subspec.config.schema import (
    AccelerateOffloadConfig,
    NoDraftConfig,
    OffloadConfig,
    Placement,
    PlantedTargetConfig,
    StreamOffloadConfig,
)
from subspec.errors import ConfigError, SubspecError
from subspec.memory.allocator import Allocation
from subspec.offload.accelerate import host_bytes
from subspec.planning.budget import Budget
from subspec.records.method import method_label
from subspec.runs import loading, runner
from subspec.runs.console import RunConsole
from subspec.runs.inputs import with_first_budget
from subspec.session import GIB, assemble_accelerate, cap_device, check_offload, plan_for
from subspec.targets import device as device_module
from subspec.targets.planted import SHAPES
from tests.helpers.device import fake_device
from tests.helpers.planning import settings


@pytest.mark.parametrize(("device", "number"), [("cuda", 1), ("cuda:0", 0), ("cuda:2", 2)])
def test_the_allocator_is_capped_at_the_budget(monkeypatch, device, number):
    """A device without a number is the current one: PyTorch's own check of its argument runs here."""
    told = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    card = lambda index: SimpleNamespace(total_memory=(index + 1) << 34)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *args: told.append(args), raising=False)
    cap_device(8.0, torch.device(device))
    assert told == [(0.5 / (number + 1), number)]
    cap_device(1000.0, torch.device(device))  # more than the card has
    assert told[1:] == [(1.0, number)]


def of_32b(planted):
    """What is known of a source before a weight is drawn or read: 32.8 billion of them, 61 GiB in bfloat16."""
    facts = {"name": "a 32B", "config": SHAPES["qwen2_5_32b"](), "dtype": torch.bfloat16, "notes": ()}
    return SimpleNamespace(**facts, planted=planted)


def test_accelerate_needs_the_host_for_what_it_does_not_move():
    whole = host_bytes(of_32b(planted=True), 22 * GIB)
    assert 60 * GIB < whole < 62 * GIB, "drawn on the host, all of it, before accelerate moves anything"
    assert host_bytes(of_32b(planted=False), 22 * GIB) == whole - 22 * GIB
    assert host_bytes(of_32b(planted=False), 100 * GIB) == 0


@pytest.mark.parametrize(("planted", "needs"), [(True, "61.0"), (False, "54.5")])
def test_accelerate_is_refused_before_the_host_swaps(monkeypatch, planted, needs):
    monkeypatch.setattr("subspec.offload.accelerate.build_model", Mock(side_effect=AssertionError("built")))
    capped = []
    fake_device(monkeypatch, total=16.0, others=1.0)
    monkeypatch.setattr(session, "cap_device", lambda gib, device: capped.append(gib))
    monkeypatch.setattr(session, "open_source", lambda *arguments, **options: of_32b(planted))
    monkeypatch.setattr(device_module, "free_memory", lambda device: 50 * GIB)
    offload = AccelerateOffloadConfig(name="accelerate", vram_gib=8.0)
    config = SimpleNamespace(target=PlantedTargetConfig(name="x"), offload=offload)
    line = rf"offload=accelerate .* host memory: the weights need {needs} GiB of memory and 50\.0 GiB are free"
    with pytest.raises(SubspecError, match=line):
        assemble_accelerate(config, torch.device("cuda"))
    monkeypatch.setattr(device_module, "free_memory", lambda device: 62 * GIB)
    with pytest.raises(AssertionError, match="built"):
        assemble_accelerate(config, torch.device("cuda"))
    offload.vram_gib, offload.vram_counts = "auto", VramCounts.device
    notes = []
    with pytest.raises(AssertionError, match="built"):
        assemble_accelerate(config, torch.device("cuda"), notes.append)
    assert notes == ["offload.vram_gib=auto: 14.9 GiB"]
    assert capped == [8.0, 8.0, pytest.approx(14.0)]
    offload.vram_gib = 2.3
    with pytest.raises(ConfigError, match=r"vram_gib=2\.3 leaves 1\.40 GiB"):
        assemble_accelerate(config, torch.device("cuda"))


@pytest.mark.parametrize("kind", [StreamOffloadConfig, AccelerateOffloadConfig])
def test_a_budget_that_the_device_cannot_hold_is_refused_before_anything_is_fetched(monkeypatch, kind):
    fake_device(monkeypatch)
    offload, draft = kind(name="x", vram_gib=7.2), NoDraftConfig(name="none")
    config = SimpleNamespace(offload=offload, draft=draft, device=Device.auto)
    with pytest.raises(ConfigError, match=r"offload\.vram_gib=7\.2 .*at most 7\.1"):
        check_offload(config, torch.device("cuda"))
    config.offload.vram_gib = 7.1
    check_offload(config, torch.device("cuda"))


def test_a_streamed_run_is_planned_for_what_is_free(monkeypatch):
    fake_device(monkeypatch, total=12.0, others=2.0)
    monkeypatch.setattr(session, "measure_link", lambda device: 25.0)
    monkeypatch.setattr(session, "why_not", lambda *arguments: None)
    plan = plan_for(settings("auto"), SHAPES["qwen2_5_7b"](), torch.device("cuda"))
    assert (plan.budget, plan.vram.allocator) == (9 * GIB, 9 * GIB)
    assert "0.50 measured" in plan.vram.cuda.note


@pytest.mark.parametrize(("counts", "held", "warned"), [("device", 8.1, 1), ("device", 7.9, 0), ("allocator", 8.9, 0)])
def test_a_run_that_holds_more_than_its_budget_warns(monkeypatch, counts, held, warned):
    """CUDA's share is in part an estimate."""
    monkeypatch.setattr(runner, "device_vram_gib", lambda: held)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    warnings = []
    vram = Budget(8 * GIB, VramCounts(counts), Allocation("CUDA itself", ()))
    parts = {"assembly": SimpleNamespace(vram=vram), "console": SimpleNamespace(warn=warnings.append)}
    runner._Run._end_loading(SimpleNamespace(device=torch.device("cuda"), **parts))
    assert len(warnings) == warned


def test_a_resumed_run_keeps_the_budget_that_auto_came_to(monkeypatch, tmp_path):
    def vram(asked):
        return with_first_budget(settings(asked), tmp_path, torch.device("cuda")).offload.vram_gib

    fake_device(monkeypatch)
    assert vram("auto") == "auto"
    (tmp_path / "facts.json").write_text('{"vram_gib": 6.9}')
    assert (vram("auto"), vram(5.0)) == (6.9, 5.0)
    whole = replace(settings(8.0), offload=OffloadConfig(name="none"))
    assert with_first_budget(whole, tmp_path, torch.device("cpu")) is whole
    fake_device(monkeypatch, others=1.0)
    with pytest.raises(ConfigError, match=r"resume=true, but offload\.vram_gib=auto was 6\.9 GiB.*run_dir="):
        vram("auto")


@pytest.mark.parametrize("kind", [OffloadConfig, StreamOffloadConfig, AccelerateOffloadConfig])
def test_every_way_of_loading_begins_with_a_free_device(monkeypatch, kind):
    """In a sweep within one process the run before may have left a cap and peaks, which are not this run's."""
    monkeypatch.setattr(loading, "free_device", Mock(side_effect=InterruptedError))
    config = SimpleNamespace(target=None, offload=kind(name="x"))
    with pytest.raises(InterruptedError):
        loading.load(config, torch.device("cuda"), SimpleNamespace(note=None))


@pytest.mark.parametrize(("disk_gb_per_s", "slower"), [(0.5, "disk"), (5000.0, "link")])
def test_shares_are_of_the_slower_of_two_links(tmp_path, monkeypatch, disk_gb_per_s, slower):
    """Layers beyond ``offload.ram_gib``, with the CPU in place of a GPU."""
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "measure_disk", lambda layers, slots: disk_gb_per_s)
    target = PlantedTargetConfig(name="planted_tiny", shape="tiny")
    options = {"resident_layers": 2, "link_gb_per_s": 50.0, "decoding": {"max_length": 128}}

    def config(**memory):
        return replace(settings(8.0, "none", **options, **memory), target=target)

    pinned = loading.load(config(), torch.device("cpu"), RunConsole())
    plan = pinned.plan
    ram = (sum(item.bytes for item in plan.items if item.place is Placement.host) - 2 * plan.layer_bytes) / GIB
    tiered = loading.load(config(ram_gib=ram), torch.device("cpu"), RunConsole())
    on_disk = tiered.plan.disk_layers
    assert 0 < len(on_disk) < len(tiered.plan.streamed_layers) == 6
    streamer = tiered.assembly.streamed.target.streamer
    assert tiered.link.gb_per_s == {"disk": disk_gb_per_s, "link": 50.0}[slower]
    assert tiered.link.bytes_per_pass == {"disk": streamer.disk, "link": streamer}[slower].bytes_per_pass
    facts = tiered.facts()
    assert (facts["slower_link"], facts["link_gb_per_s"]) == (slower, tiered.link.gb_per_s)
    assert facts["disk"]["gb_per_s"] == facts["plan"]["disk"]["gb_per_s"] == disk_gb_per_s
    assert facts["disk"]["layers"] == facts["plan"]["disk_layers"] == list(on_disk)
    label = method_label({"offload": {"name": "stream", "ram_gib": 4}, "draft": {"name": "none"}}, facts)
    assert label.endswith("disk beyond 4 GiB of RAM")
    texts = [run.assembly.engine.generate([1, 2, 3], max_new_tokens=6) for run in (pinned, tiered)]
    assert texts[0].token_ids == texts[1].token_ids
    assert pinned.assembly.streamed.target.disk is None
    for run in (pinned, tiered):
        run.assembly.close()
