"""Streamed runs never wait for the device while they draft and verify, whatever drafts and however weights are kept."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from subspec.config.enums import Codec, Kernel
from subspec.config.schema import Config, PlantedTargetConfig, SmallModelDraftConfig, SubstituteDraftConfig
from subspec.decoding.sampling import Sampling
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.verify import read_all
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.levels.captured_draft import CapturedDraft
from subspec.planning.plan import plan_run
from subspec.session import Assembly, assemble_streamed
from subspec.targets.load import open_source
from tests.helpers.drafts import all_verified, begin
from tests.helpers.planning import settings

SAMPLED = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}


def tiny_settings(draft: str, codec: Codec, sampled: bool, texts: int = 1) -> Config:
    options = {"sampling": SAMPLED if sampled else None, "decoding": {"max_length": 128, "texts": texts}}
    config = settings(1.0, draft, tree=(4, 3), codec=codec, resident_layers=2, **options)
    drafts = {
        "subspec": SubstituteDraftConfig(name="subspec", kernel=Kernel.int4_mma),
        "small_model": SmallModelDraftConfig(name="small_model", path="planted:tiny_draft"),
    }
    target = PlantedTargetConfig(name="planted_tiny", shape="tiny")
    return replace(config, target=target, draft=drafts.get(draft, config.draft))


def tiny_assembly(draft: str, codec: Codec, sampled: bool, texts: int) -> Assembly:
    config, device = tiny_settings(draft, codec, sampled, texts), torch.device("cuda")
    source = open_source(config.target, torch.bfloat16, device, note=lambda text: None)
    plan = plan_run(config, source.config, link_gb_per_s=25.0, host_free=None, device=None)
    assert plan.codec is codec
    assert plan.streamed_layers
    return assemble_streamed(config, source, plan, device, note=lambda text: None)


KINDS = [*((draft, Codec.none) for draft in ("subspec", "small_model", "layer_skip")), ("subspec", Codec.substitute)]


@pytest.mark.gpu
@pytest.mark.parametrize(("draft", "codec"), KINDS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("texts", [1, 3])
def test_an_iteration_of_a_streamed_run_waits_for_the_acceptance_alone(draft, codec, sampled, texts):
    assembly = tiny_assembly(draft, codec, sampled, texts)
    engine = assembly.engine
    drafting = engine.draft.levels if isinstance(engine.draft, SeparateCacheDraft) else engine.draft
    assert isinstance(drafting, CapturedDraft)
    try:
        with torch.inference_mode():
            begin(engine, [1, 2, 3], texts)
            for _ in range(2):  # compiles and captures
                engine._grow(engine.running, 10)
                read_all([own.acceptance for own in all_verified(engine)])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    engine._grow(engine.running, 10)
                    judged = all_verified(engine)
                    for own in judged:
                        engine._commit(own, 1)
                with pytest.raises(RuntimeError, match="synchroniz"):
                    read_all([own.acceptance for own in judged])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        assembly.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("draft", "codec"), [*KINDS, ("none", Codec.none), ("none", Codec.substitute)])
def test_streamed_texts_side_by_side_have_the_bits_that_each_has_alone(draft, codec):
    assembly = tiny_assembly(draft, codec, sampled=False, texts=3)
    engine = assembly.engine
    engine.keeps_digests = True
    assert engine.target.bitwise is not None
    try:
        engine.prepare([1, 2, 3])
        scheduler, texts = Scheduler(engine, 3), []
        for number in range(6):
            prompt = [(7 * number + place) % 300 for place in range(1, 6 + 9 * number)]
            sampling = Sampling(0.8, top_p=0.9) if number % 2 else None
            options = {"seed": number, "max_new_tokens": 20 + 5 * number, "ignore_eos": True}
            texts.append((scheduler.add(prompt, sampling=sampling, **options), sampling, options))
        while not scheduler.idle:
            scheduler.step()
        for text, sampling, options in texts:
            engine.sampler.sampling = sampling or Sampling()
            alone = engine.generate(text.prompt, **options)
            assert text.error is None
            assert text.result.token_ids == alone.token_ids
            assert text.result.digests == alone.digests
        if isinstance(engine.draft, CapturedDraft):
            assert {key[1] for key in engine.draft._state.graphs} == {1, 2, 3}
    finally:
        assembly.close()
