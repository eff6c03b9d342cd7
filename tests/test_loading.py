"""Loading a run's target: what the device allocator is told."""

from types import SimpleNamespace

import pytest
import torch

from subspec.loading import cap_device


@pytest.mark.parametrize(("device", "number"), [("cuda", 1), ("cuda:0", 0), ("cuda:2", 2)])
def test_the_allocator_is_capped_at_the_budget(monkeypatch, device, number):
    """A device without a number is the current one: PyTorch's own check of its argument runs here."""
    told = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=(index + 1) << 34)
    )
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *args: told.append(args), raising=False)
    cap_device(8.0, torch.device(device))
    assert told == [(0.5 / (number + 1), number)]
    cap_device(1000.0, torch.device(device))  # more than the card has
    assert told[1:] == [(1.0, number)]
