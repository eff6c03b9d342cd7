"""A CUDA device of numbers, for what is computed from its memory."""

import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from subspec.memory import device as module
from subspec.memory.allocator import GIB, MIB


@dataclass
class FakeDevice:
    """Memory in GiB: ``others`` is taken by other processes, ``context`` by CUDA, ``reserved`` by PyTorch."""

    total: float = 8.0
    others: float = 0.0
    context: float = 0.5
    reserved: float = 0.0

    @property
    def free(self) -> float:
        return self.total - self.others - self.context - self.reserved


def fake_device(monkeypatch: pytest.MonkeyPatch, *, answers: bool = True, **memory: float) -> FakeDevice:
    """A device whose driver tells ``memory``; ``answers``: nvidia-smi does, before this process has a context."""
    made = FakeDevice(**memory)

    def smi(*arguments, **options):
        if not answers:
            raise FileNotFoundError
        return SimpleNamespace(stdout=f"{round(made.others * GIB / MIB)}\n")

    def sizes(*values):
        return tuple(int(value * GIB) for value in values)

    monkeypatch.setattr(module, "_others", {})
    monkeypatch.setattr(subprocess, "run", smi)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: sizes(made.free, made.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: int(made.reserved * GIB))
    return made
