"""The drafts that ship with the project: their files. Their acceptance: ``tests/test_default_target.py`` (slow)."""

import pytest
import torch

from subspec.config.schema import BlockHeadDraftConfig, Eagle2DraftConfig, Eagle3DraftConfig, EmbeddedTargetConfig
from subspec.drafts import shipped
from subspec.drafts.eagle_checkpoint import kind_of, load_head, locate_for

TARGET = EmbeddedTargetConfig(name="smollm2_135m")
DRAFTS = {"eagle2": Eagle2DraftConfig, "eagle3": Eagle3DraftConfig, "block_head": BlockHeadDraftConfig}


@pytest.mark.parametrize("name", shipped.HEADS)
def test_a_head_loads_whole_and_has_a_model_card(name):
    draft = DRAFTS[name](name)
    files, kind = locate_for(draft, TARGET, print), kind_of(draft)
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "kind": kind}
    loaded = load_head(files, hidden=576, target=TARGET.name, **options)
    assert loaded.dropped == []
    assert all(tensor.isfinite().all() for tensor in loaded.head.state_dict().values())
    parameters = sum(parameter.numel() for parameter in loaded.head.parameters())
    card = (files.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"- parameters: {parameters:,};" in card
    assert "one NVIDIA H200" in card


def test_all_weights_together_are_small():
    assert sum(file.stat().st_size for file in shipped.FOLDER.rglob("*.safetensors")) < 45e6
