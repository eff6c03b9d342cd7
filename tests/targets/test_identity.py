"""Digests of the contents of checkpoints and heads: they follow the contents and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from subspec.config.schema import (
    Config,
    Eagle2DraftConfig,
    HubTargetConfig,
    NoDraftConfig,
    PlantedTargetConfig,
    SmallModelDraftConfig,
)
from subspec.session import weights_identity
from subspec.targets import identity as module
from tests.helpers.eagle import SHAPES, published
from tests.helpers.tiny import edit_config, edit_weights, shard_weights, tiny_checkpoint


def change_one_number(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1


CHANGES = {
    "a weight": lambda folder: edit_weights(folder, change_one_number),
    "the configuration": lambda folder: edit_config(folder, rms_norm_eps=1e-4),
    "the chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
}


def identities(folder, draft=None):
    target = HubTargetConfig(name="mine", path=str(folder))
    return weights_identity(Config(target=target, draft=draft or NoDraftConfig(name="none")), lambda text: None)


@pytest.mark.parametrize("sampled", [False, True])
def test_an_identity_follows_the_contents(tmp_path, monkeypatch, sampled):
    folder = tiny_checkpoint(tmp_path / "model")
    if sampled:
        monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    first = identities(folder)
    assert list(first) == ["target"]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, copy_function=shutil.copyfile)
    (moved / "model.safetensors.index.json").write_text(json.dumps(shard_weights(moved)))
    (moved / "model.safetensors").unlink()
    (moved / "README.md").write_text("not read")
    assert identities(moved) == first
    for change in CHANGES.values():
        shutil.rmtree(moved)
        shutil.copytree(folder, moved)
        change(moved)
        assert identities(moved) != first


def test_large_tensors_are_sampled_from_end_to_end(monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    large = torch.zeros(1000, 100)
    first = module.identity([("w", large)], [])
    seen = []
    for index in (0, -1, 33_400, 66_300, 20_000):
        changed = large.clone()
        changed.view(-1)[index] = 1
        seen.append(module.identity([("w", changed)], []) != first)
    assert seen == [True, True, True, True, False]
    assert module.identity([("w", large.to(torch.int32))], []) != first
    assert module.identity([("w", large.view(100, 1000))], []) != first


def test_drafts_with_weights_of_their_own_have_an_identity(tmp_path):
    folder, small = tiny_checkpoint(tmp_path / "model"), tiny_checkpoint(tmp_path / "small")
    head = published(tmp_path / "head", SHAPES["llama3"])
    draft = Eagle2DraftConfig(name="eagle2", path=str(head))
    first = identities(folder, draft)["draft"]
    tensors = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    torch.save(tensors, head / "pytorch_model.bin")
    assert identities(folder, draft)["draft"] == first  # the format of the file does not count
    tensors["fc.weight"][0, 0] += 1
    torch.save(tensors, head / "pytorch_model.bin")
    assert identities(folder, draft)["draft"] != first
    draft = SmallModelDraftConfig(name="small_model", path=str(small))
    both = identities(folder, draft)
    assert both["draft"] == both["target"]
    planted = Config(
        target=PlantedTargetConfig(name="planted_tiny", shape="tiny"),
        draft=Eagle2DraftConfig(name="eagle2", path="planted"),
    )
    assert set(weights_identity(planted)) == {"target", "draft"}
