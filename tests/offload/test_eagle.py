"""An EAGLE head beside a streamed target: planned from its files, loaded within the plan, lossless."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from subspec.config.schema import BeamTreeConfig, Eagle2DraftConfig, Eagle2TreeConfig, Eagle3DraftConfig, Placement
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.eagle_head import EagleHead, EagleShape
from subspec.errors import ConfigError
from subspec.session import assemble_streamed
from tests.helpers.eagle import QWEN2_BIASES, SHAPES, published
from tests.helpers.planning import planned, settings
from tests.helpers.tiny import tiny_model
from tests.offload.test_streaming import DEVICES, PROMPT, ModelSource, plan_for

META = torch.device("meta")
QWEN2_7B = EagleShape(3584, 28, 28, 128, 18944, QWEN2_BIASES)


def eagle_settings(path, tree=None, **changes):
    tree = tree or Eagle2TreeConfig(name="eagle2", depth=6, width=10, total_tokens=60)
    return replace(settings(**changes), draft=Eagle2DraftConfig(name="eagle2", path=str(path)), tree=tree)


@pytest.fixture
def head_7b(tmp_path, monkeypatch):
    """A folder with the sizes of the head for Qwen2-7B and none of its bytes."""
    with torch.device("meta"):
        tensors = EagleHead(QWEN2_7B).state_dict()
    folder = published(tmp_path / "head", SHAPES["qwen2"], num_attention_heads=28)
    monkeypatch.setattr("subspec.drafts.eagle_checkpoint.read_tensors", lambda *_, **__: dict(tensors))
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tree", ["eagle2", "beam"])
@pytest.mark.parametrize("resident", [[], [1]])
def test_a_streamed_target_with_a_head_emits_its_own_text(tmp_path, resident, tree, device):
    device = torch.device(device)
    model = tiny_model("qwen2", layers=4).to(device)
    expected = Engine(TargetModel(model), max_length=64).generate(PROMPT, max_new_tokens=20).token_ids
    folder = published(tmp_path / "head", SHAPES["qwen2"], binary=True)
    shape = BeamTreeConfig(name="beam", depth=3, width=3) if tree == "beam" else None
    config = eagle_settings(folder, shape, decoding={"max_length": 64})
    plan = plan_for(resident)
    object.__setattr__(plan, "prefill_chunk", 4)
    assembly = assemble_streamed(config, ModelSource(model), plan, device)
    try:
        for _ in range(2):
            assert assembly.engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        assert isinstance(assembly.engine.draft, EagleDraft)
        assert assembly.engine.draft.head.fc.weight.device.type == device.type
        assert assembly.draft_facts["head"] == str(folder)
        assert assembly.draft_facts["kv_heads"] == 4
        assert assembly.quant is None
    finally:
        assembly.close()


def test_the_plan_counts_the_head_and_gives_the_rest_to_layers(head_7b):
    plan = planned(eagle_settings(head_7b))
    items = {item.name: item for item in plan.items}
    weights = 2 * sum(size.numel() for size in QWEN2_7B.shapes().values())
    assert items["EAGLE head"].bytes == weights
    assert items["EAGLE head"].place is Placement.device
    assert items["EAGLE KV cache"].bytes == 2 * 2 * 28 * 128 * (51 + 2048)
    assert items["EAGLE features"].bytes == 2 * 511 * 3584
    assert items["draft level"].note == "width 10"  # nothing is captured
    assert items["KV cache"].note.startswith("0 + 2048 +")
    assert plan.total(Placement.device) <= plan.budget - plan.headroom
    # A quantized substitute takes several times as much: a head leaves room for more of the target.
    assert len(plan.resident_layers) > len(planned(settings()).resident_layers)
    plain = planned(settings(draft="none"))
    assert 0 < len(plain.resident_layers) - len(plan.resident_layers) <= 3
    assert plan.level_read_bytes == weights + 2 * 152064 * 3584


def test_a_head_of_another_size_is_refused_before_anything_is_loaded(tmp_path):
    folder = published(tmp_path / "head", SHAPES["qwen2"])
    with pytest.raises(ConfigError, match="hidden size 64, and planted has 3584"):
        planned(eagle_settings(folder))


def test_a_plan_alone_fetches_no_head(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = replace(eagle_settings("someone/EAGLE"), plan_only=True)
    items = {item.name: item for item in planned(config).items}
    assert items["EAGLE head"].note == "not fetched for a plan: counted as the largest"
    biases = 2 * (3584 * 5)
    weights = 2 * sum(size.numel() for size in QWEN2_7B.shapes().values())
    assert 0 <= items["EAGLE head"].bytes - weights <= biases
    config = replace(config, draft=Eagle3DraftConfig(name="eagle3", path="someone/EAGLE3"))
    items = {item.name: item for item in planned(config).items}
    assert items["EAGLE head"].note == "not fetched for a plan: counted as the largest"
    tables = 2 * 152064 * 3584
    assert items["EAGLE head"].bytes > weights + 2 * tables  # an embedding and an LM head of its own
