"""Device and dtype: what auto takes, and what cannot be had."""

import pytest
import torch

from subspec.config.schema import Device, Dtype
from subspec.errors import ConfigError, SubspecError
from subspec.targets import device as module
from subspec.targets import resolve_device, resolve_dtype


def test_auto_takes_the_current_gpu_and_without_one_the_cpu(monkeypatch):
    assert resolve_device(Device.cpu) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(Device.auto) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert resolve_device(Device.auto) == resolve_device(Device.cuda) == torch.device("cuda", 0)


@pytest.mark.parametrize(("built", "why"), [(None, "built without CUDA"), ("13.0", "CUDA_VISIBLE_DEVICES")])
def test_cuda_without_a_gpu_says_why(monkeypatch, built, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(ConfigError, match=f"device=cuda but no CUDA device.*{why}.*device=cpu"):
        resolve_device(Device.cuda)


def test_dtypes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (resolve_dtype(Dtype.auto, cpu), resolve_dtype(Dtype.auto, cuda)) == (torch.float32, torch.bfloat16)
    for dtype in set(Dtype) - {Dtype.auto}:
        assert resolve_dtype(dtype, cpu) == resolve_dtype(dtype, cuda) == getattr(torch, dtype.value)


def test_weights_that_cannot_fit_are_refused_with_both_figures(monkeypatch):
    assert module.free_memory(torch.device("cpu")) > 2**20
    monkeypatch.setattr(module, "free_memory", lambda device: 4 * 2**30)
    module.check_memory(4 * 2**30, torch.device("cpu"), "mine")
    with pytest.raises(SubspecError, match=r"mine: the weights need 5.0 GiB of memory and 4.0 GiB are free"):
        module.check_memory(5 * 2**30, torch.device("cpu"), "mine")
