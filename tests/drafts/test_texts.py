"""Text that heads and block models have drafted is plain decoding's, greedy and sampled, whatever was accepted."""

import pytest

from subspec.decoding.sampling import Sampling
from tests.helpers.blocks import BLOCKS
from tests.helpers.drafts import engine_for, hf_greedy
from tests.helpers.eagle import SHAPES3
from tests.helpers.taught import PARD_LEVELS, PARDS, POLICIES, PROMPT, draft_engine
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3", layers=8)


@pytest.mark.parametrize(
    ("draft", "policy"),
    [
        *((draft, policy) for draft in ("qwen2", "official", "dspark", "pard") for policy in POLICIES),
        *((draft, "eagle2") for draft in ("llama3", "wide heads", *SHAPES3, "dflash", "pard2") if draft != "official"),
        *((draft, policy) for draft, policy in (("jetspec", "beam"), ("bare dspark", "beam"), ("pard2", "adaptive"))),
    ],
)
def test_greedy_and_sampled_text_is_plain_decodings(model, draft, policy):
    text = PROMPT + hf_greedy(model, PROMPT, 60)
    engine = draft_engine(model, POLICIES[policy](), draft, future=text)
    result = engine.generate(PROMPT, max_new_tokens=48)
    assert result.token_ids == text[len(PROMPT) :][:48]
    assert result.stats.iterations < 30
    assert sum(result.stats.accepted_by_depth) > 0
    if draft in {*BLOCKS, *PARDS}:
        assert len(result.stats.drafted_by_depth) <= (BLOCKS[draft].levels if draft in BLOCKS else PARD_LEVELS)
    for sampling in (Sampling(), Sampling(0.9, 20, 0.95)):
        plain = engine_for(model, sampling=sampling)
        engine = draft_engine(model, POLICIES[policy](), draft, sampling=sampling, prefill_chunk=1)
        for prompt in (PROMPT[:1], PROMPT):  # one engine for texts of any length
            expected = plain.generate(prompt, max_new_tokens=12, seed=1).token_ids
            assert engine.generate(prompt, max_new_tokens=12, seed=1).token_ids == expected
