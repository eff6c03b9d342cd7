"""Hub ids, through the hub client, against a hub on this machine: fetched, cached, offline, refused."""

import json
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from subspec.config.schema import HubTargetConfig
from subspec.errors import ConfigError, SubspecError
from subspec.targets import load_target, load_target_config
from tests.helpers.fake_hub import COMMIT, FakeHub, use_hub
from tests.helpers.tiny import edit_config, tiny_checkpoint, tiny_model

CPU = torch.device("cpu")
NAME = "someone/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the repository :data:`NAME`, and an empty hub cache."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fake = FakeHub()
    fake.repositories[NAME] = tiny_checkpoint(tmp_path / "repository")
    with fake.serving():
        use_hub(fake.url, monkeypatch)
        yield fake


def load(note=lambda text: None, path=NAME, **options):
    return load_target(HubTargetConfig(name="mine", path=path, **options), CPU, note=note)


def refused(error, words, **options):
    with pytest.raises(error, match=words) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def fetched(hub):
    """Names of the files that were asked for."""
    return {path.rsplit("/", 1)[-1] for path in hub.requests if "/resolve/" in path}


def go_offline(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{probe.getsockname()[1]}", monkeypatch)


def test_a_repository_is_fetched_and_named_by_commit(hub, notes):
    target = load(notes.append)
    ids = torch.tensor([[1, 50, 99]])
    assert torch.equal(target.model(ids).logits, tiny_model()(ids).logits)
    assert target.source == f"{NAME}@{COMMIT}"
    assert len(notes) == 1
    assert f"fetching {NAME}@{COMMIT[:12]}" in notes[0]
    notes.clear()
    load(notes.append)
    assert notes == []


def test_only_what_a_target_needs_is_fetched(hub):
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
        (hub.repositories[NAME] / extra).write_bytes(b"x")
    load()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= fetched(hub)
    assert not fetched(hub) & {"pytorch_model.bin", "consolidated.safetensors", "README.md"}


def test_the_shards_that_an_index_names_are_fetched_and_no_others(hub):
    folder, weights = hub.repositories[NAME], "model.safetensors"
    tensors = load_file(folder / weights)
    (folder / weights).rename(folder / "model.fp16.safetensors")
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / f"{weights}.index.json").write_text(json.dumps({"weight_map": files}))
    load()
    assert {name for name in fetched(hub) if name.endswith(".safetensors")} == set(files.values())
    (folder / "part-1.safetensors").unlink()
    refused(ConfigError, r"lacks part-1\.safetensors, which its .*index\.json names")


def test_the_configuration_alone_fetches_no_weights(hub):
    assert load_target_config(HubTargetConfig(name="mine", path=NAME)).model_type == "llama"
    assert fetched(hub) == {"config.json"}


def test_a_cached_repository_loads_without_a_network(hub, monkeypatch, notes):
    load()
    go_offline(monkeypatch)
    assert load(notes.append).source == f"{NAME}@{COMMIT}"
    assert notes == [
        "the model hub is not used: 127.0.0.1 cannot be reached (Connection refused): "
        f"using the cached {NAME}@{COMMIT[:12]}"
    ]


def test_a_cached_commit_is_not_asked_for_again(hub):
    load(revision=COMMIT)
    hub.requests.clear()
    assert load(revision=COMMIT).source == f"{NAME}@{COMMIT}"
    assert hub.requests == []


def test_offline_is_honoured(hub, monkeypatch, notes):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(SubspecError, "no complete copy in the hub cache, .*HF_HUB_OFFLINE is set")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load(notes.append).source == f"{NAME}@{COMMIT}"
    assert hub.requests == notes == []


def test_no_network_and_nothing_whole_in_the_cache(hub, monkeypatch):
    with monkeypatch.context() as patch:
        go_offline(patch)
        refused(SubspecError, "no such folder, no complete copy in the hub cache, .*cannot be reached")
    load()
    next(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/model.safetensors")).unlink()
    go_offline(monkeypatch)
    refused(SubspecError, "no complete copy")  # half a repository is not used


def test_a_failing_hub_falls_back_on_the_cache_and_says_so(hub, notes):
    load()
    hub.statuses[NAME] = (500, None)
    assert load(notes.append).source == f"{NAME}@{COMMIT}"
    assert "using the cached" in notes[0]


# ------------------------------------------------------------------------------------------------ refused


def test_no_such_repository_or_revision(hub):
    refused(ConfigError, "no such folder, and no such model on the hub .*HF_TOKEN", path="some/typo")
    refused(ConfigError, "target.revision=old: .* no such branch, tag or commit", revision="old")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms.*HF_TOKEN"),
        ((401, None), "HF_TOKEN"),
        ((400, None), "cannot fetch someone/tiny from the hub"),
    ],
)
def test_a_hub_that_refuses(hub, status, words):
    hub.statuses[NAME] = status
    refused(SubspecError, words)


def test_another_family_is_refused_before_its_weights_are_fetched(hub):
    edit_config(hub.repositories[NAME], model_type="gpt2")
    refused(ConfigError, "'gpt2'; targets of these types")
    assert fetched(hub) == {"config.json"}


@pytest.mark.parametrize(
    ("files", "rename", "words"),
    [
        ("config.json", None, "has no config.json"),
        ("model.safetensors", "pytorch_model.bin", r"holds no weights.*\(it has .bin\).*save_pretrained"),
        ("model.safetensors", None, "holds no weights"),
        ("tokenizer*", None, "holds no tokenizer"),
    ],
)
def test_a_repository_that_lacks_something(hub, files, rename, words):
    for path in hub.repositories[NAME].glob(files):
        path.rename(path.with_name(rename)) if rename else path.unlink()
    refused(ConfigError, words)


def test_too_little_disk_is_said_before_the_weights(hub, monkeypatch):
    monkeypatch.setattr("subspec.utils.disk.free_space", lambda folder: 1000)
    refused(SubspecError, r"GB are free; make room, or set HF_HUB_CACHE")
    assert fetched(hub) == {"config.json"}


def test_a_disk_that_fills_up(hub, monkeypatch):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    refused(SubspecError, "the disk of the hub cache is full")
