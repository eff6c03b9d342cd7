import json
import os
import subprocess
import sys
from types import SimpleNamespace

import torch

import subspec
from subspec.runs import environment as module
from subspec.runs.environment import environment, git_state, peak_ram_gib, versions


def test_what_ran_where():
    made = environment()
    assert json.loads(json.dumps(made)) == made
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["subspec"] == subspec.__version__
    assert made["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"transformers", "hqq", "hydra-core", "wandb"} <= set(made["versions"])
    assert made["hardware"]["torch_threads"] == torch.get_num_threads()
    assert made["hardware"]["ram_gib"] > 0.1
    assert made["hardware"]["cpu"]
    assert (made["hardware"]["gpu"] is None) == (not torch.cuda.is_available())


def test_packages_that_are_missing_are_left_out(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-of-that-name"))
    assert set(versions()) == {"python", "subspec", "torch"}


def test_the_home_folder_is_not_spelt_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "orig_argv", [f"{tmp_path}/bin/python", "-m", "subspec.run", f"run_dir={tmp_path}/x"])
    made = environment()
    assert made["command"] == ["~/bin/python", "-m", "subspec.run", "run_dir=~/x"]
    assert str(tmp_path) not in json.dumps(made)


def test_revision_of_a_checkout(tmp_path):
    package = tmp_path / "subspec"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(package) is None
    git("init", "-q")
    assert git_state(package) is None, "a repository that does not track the package says nothing about it"
    git("add", ".")
    git("commit", "-qm", "x")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "records.jsonl").write_text("")
    assert git_state(package)["dirty"] is False, "a run's own output does not change the code"
    (package / "new.py").write_text("")
    assert git_state(package)["dirty"] is True


def test_without_git_there_is_no_revision(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None


def test_peak_ram_grows_with_what_is_used():
    before = peak_ram_gib()
    assert 0.01 < before < 1000
    held = bytearray(os.urandom(1)) * int((before + 0.1) * 2**30)
    assert peak_ram_gib() > before + 0.05
    del held
    assert peak_ram_gib() > before + 0.05, "a peak does not fall"


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.peak_vram_gib() is module.device_vram_gib() is module.reserved_vram_gib() is None
    card = SimpleNamespace(name="A Card", total_memory=8 * 2**30, major=9, minor=0)
    shown = {"is_available": True, "is_initialized": True, "current_device": 0, "device_count": 2}
    shown |= {"max_memory_allocated": 3 * 2**29, "max_memory_reserved": 2**31, "get_device_properties": card}
    for name, value in shown.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert (module.peak_vram_gib(), module.reserved_vram_gib()) == (1.5, 2.0)
    gpu = module.hardware()["gpu"]
    assert (gpu["name"], gpu["memory_gib"], gpu["compute_capability"], gpu["count"]) == ("A Card", 8.0, "9.0", 2)
    assert set(gpu) >= {"driver", "cuda"}
