"""A draft that keeps what it has computed finds its rows again after nodes were taken out of the tree."""

import pytest
import torch

from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from tests.helpers.drafts import hf_greedy, substitute_of
from tests.helpers.tiny import tiny_model

PROMPT = [5, 17, 33, 99, 4, 8, 77]


@pytest.mark.parametrize("total", [6, 12, 60])
def test_a_small_models_rows_are_those_of_the_accepted_text(total):
    model = tiny_model("qwen2", layers=3)
    growth = Eagle2(4, 4, total)
    small = substitute_of(model, bits=4)  # nearly the target, so that much is accepted
    draft = SeparateCacheDraft(
        SubstituteDraft(small, 1.0),
        TargetModel(small),
        max_length=128,
        draft_rows=growth.draft_rows,
        vocab_size=320,
        width=growth.width,
    )
    engine = Engine(TargetModel(model), draft, growth, max_length=128, prefill_chunk=4)
    result = engine.generate(PROMPT, max_new_tokens=50)
    assert result.token_ids == hf_greedy(model, PROMPT, 50)
    assert sum(result.stats.accepted_by_depth) > 10
    length = engine.cache.length
    assert draft.cache.length == length
    fresh = TargetModel(small).new_cache(max_length=128, draft_rows=0, target_rows=128)
    with torch.inference_mode():
        TargetModel(small).append(torch.tensor((PROMPT + result.token_ids)[:length]), fresh)
    start = draft.cache.draft_rows
    ours = draft.cache.rows[:, :, :, start : start + length]
    torch.testing.assert_close(ours, fresh.rows[:, :, :, :length], rtol=1e-3, atol=1e-3)
