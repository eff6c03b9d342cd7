"""Streamed runs never wait for the device while they draft and verify, whatever drafts and however weights are kept."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.enums import Codec, Kernel
from subspec.config.schema import Config, PlantedTargetConfig, SmallModelDraftConfig, SubstituteDraftConfig
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.levels.captured_draft import CapturedDraft
from subspec.planning.plan import plan_run
from subspec.session import assemble_streamed
from subspec.targets.load import open_source
from tests.helpers.drafts import begin, grow, verified
from tests.helpers.planning import settings

SAMPLED = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}


def tiny_settings(draft: str, codec: Codec, sampled: bool) -> Config:
    options = {"sampling": SAMPLED if sampled else None, "decoding": {"max_length": 128}}
    config = settings(1.0, draft, tree=(4, 3), codec=codec, resident_layers=2, **options)
    drafts = {
        "subspec": SubstituteDraftConfig(name="subspec", kernel=Kernel.int4_mma),
        "small_model": SmallModelDraftConfig(name="small_model", path="planted:tiny_draft"),
    }
    target = PlantedTargetConfig(name="planted_tiny", shape="tiny")
    return replace(config, target=target, draft=drafts.get(draft, config.draft))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("draft", "codec"),
    [
        *((draft, Codec.none) for draft in ("subspec", "small_model", "layer_skip")),
        ("subspec", Codec.substitute),
    ],
)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampling"])
def test_an_iteration_of_a_streamed_run_waits_for_the_acceptance_alone(draft, codec, sampled):
    config, device = tiny_settings(draft, codec, sampled), torch.device("cuda")
    source = open_source(config.target, torch.bfloat16, device, note=lambda text: None)
    plan = plan_run(config, source.config, link_gb_per_s=25.0, host_free=None, device=None)
    assert plan.codec is codec
    assert plan.streamed_layers
    assembly = assemble_streamed(config, source, plan, device, note=lambda text: None)
    engine = assembly.engine
    drafting = engine.draft.levels if isinstance(engine.draft, SeparateCacheDraft) else engine.draft
    assert isinstance(drafting, CapturedDraft)
    try:
        with torch.inference_mode():
            root = begin(engine, [1, 2, 3])
            for _ in range(2):  # compiles and captures
                grow(engine, root, 10)
                judged = verified(engine)
                judged.acceptance.read()
                engine._commit(judged, 1)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    grow(engine, root, 10)
                    judged = verified(engine)
                    engine._commit(judged, 1)
                with pytest.raises(RuntimeError, match="synchroniz"):
                    judged.acceptance.read()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        assembly.close()
