import pytest
import torch

from subspec.decoding.audit import NEAR_TIE_MARGIN, Auditor
from subspec.decoding.digest import digest_rows
from subspec.decoding.engine import Engine
from subspec.decoding.result import FinishReason
from subspec.decoding.sampling import Sampling, keep_mask
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.decoding.verify import NotFiniteError
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from tests.helpers.drafts import engine_for
from tests.helpers.tiny import tiny_model

PROMPT = [5, 17, 33, 99, 4]
SAMPLINGS = {"greedy": Sampling(), "sampling": Sampling(1.0), "filtered": Sampling(0.8, 10, 0.8)}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=2)


@pytest.fixture(scope="module", params=SAMPLINGS)
def text(request, model):
    """How tokens are chosen, and a drafted text of 40."""
    sampling = SAMPLINGS[request.param]
    engine = engine_for(model, Beam(5, 3), sampling=sampling)
    return sampling, engine.generate(PROMPT, max_new_tokens=40, seed=7).token_ids


@pytest.mark.parametrize("chunk", [3, 256])
def test_every_token_of_a_speculative_text_is_exact(model, text, chunk):
    result = Auditor(TargetModel(model), text[0], chunk=chunk).audit(PROMPT, text[1], seed=7)
    assert result.exact + result.near_tie == 40
    assert result.exact >= 39
    assert result.mismatch == 0
    assert result.max_gap <= result.margin == NEAR_TIE_MARGIN[torch.float32]
    assert result.first_mismatch is None


@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_wrong_token_is_found_where_it_stands(model, text, place):
    wrong = list(text[1])
    wrong[place] = (wrong[place] + 1) % 320
    result = Auditor(TargetModel(model), text[0], chunk=8).audit(PROMPT, wrong, seed=7)
    assert result.mismatch >= 1
    assert result.first_mismatch == place
    assert result.max_gap > result.margin


def test_samples_of_another_seed_do_not_pass(model):
    text = engine_for(model, sampling=Sampling(1.0)).generate(PROMPT, max_new_tokens=40, seed=1).token_ids
    assert Auditor(TargetModel(model), Sampling(1.0)).audit(PROMPT, text, seed=2).mismatch > 10


def test_the_margin_separates_near_ties_from_mismatches(model):
    plain = engine_for(model).generate(PROMPT, max_new_tokens=1).token_ids
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    second = int(logits.topk(2).indices[1])
    gap = float(logits[plain[0]] - logits[second])
    wide = Auditor(TargetModel(model), margin=gap * 1.01).audit(PROMPT, [second])
    narrow = Auditor(TargetModel(model), margin=gap * 0.99).audit(PROMPT, [second])
    assert (wide.near_tie, wide.mismatch) == (1, 0)
    assert (narrow.near_tie, narrow.mismatch) == (0, 1)
    assert narrow.max_gap == pytest.approx(gap, rel=1e-3)


def test_a_single_token_prompt_and_answer(model):
    text = engine_for(model).generate([3], max_new_tokens=1).token_ids
    assert Auditor(TargetModel(model)).audit([3], text).exact == 1


def test_a_target_without_numbers_vouches_for_nothing():
    broken = tiny_model("llama", layers=2)
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        Auditor(TargetModel(broken)).audit(PROMPT, [7] * 8)


FILTERS = (Sampling(), Sampling(0.7, top_p=0.9), Sampling(1.0, top_k=2), Sampling(0.9, 20, 0.9))


@pytest.mark.parametrize(
    ("value", "draft", "sampling"),
    zip([torch.nan, torch.inf, -torch.inf] * 3, [False, True] * 4, FILTERS * 2, strict=False),
)
def test_logits_that_are_not_finite_end_the_text(value, draft, sampling):
    """From the start, and where only a later token's row of the embedding is damaged."""
    whole = tiny_model("llama", layers=2)
    # Three rows: filters of two tokens would keep them from being chosen.
    whole.lm_head.weight.data[[11, 40, 77]] = value
    later = tiny_model("llama", layers=2)
    text = engine_for(later, sampling=sampling).generate(PROMPT, max_new_tokens=6, seed=3).token_ids
    damaged = next(token for token in text[1:] if token not in PROMPT)
    later.model.embed_tokens.weight.data[damaged] = value
    for broken in (whole, later):
        engine = Engine(
            TargetModel(broken),
            SubstituteDraft(share_parameters(broken)) if draft else None,
            Beam(4, 2) if draft else None,
            sampling=sampling,
            max_length=256,
        )
        with pytest.raises(NotFiniteError, match="not finite"):
            engine.generate(PROMPT, max_new_tokens=40, seed=3)


# ------------------------------------------------------------------------------------------- the filters


def test_no_token_that_a_filter_excludes_is_exact():
    """bfloat16's margin widens the filter: what lies outside is at best a near-tie."""
    sampling = Sampling(1.0, top_p=0.5)
    model = tiny_model("llama", layers=2, std=0.2).to(torch.bfloat16)
    outside = exact = 0
    for seed in range(8):
        plain = Engine(TargetModel(model), sampling=Sampling(1.0), max_length=64)
        text = plain.generate([5, 6, 7], max_new_tokens=30, seed=seed).token_ids
        exact += Auditor(TargetModel(model), sampling).audit([5, 6, 7], text, seed=seed).exact
        logits = model(torch.tensor([[5, 6, 7, *text[:-1]]])).logits[0, 2:].float()
        kept = keep_mask(logits, sampling).gather(1, torch.tensor(text)[:, None])
        outside += int((~kept).sum())
    assert outside > 20
    assert exact <= 8 * 30 - outside


# ------------------------------------------------------------------------------------------------ endings


@pytest.mark.parametrize(
    ("tokens", "reason", "right"),
    [
        (20, FinishReason.length, True),
        (12, FinishReason.length, False),  # too early
        (20, FinishReason.eos, False),  # for another reason
        (21, FinishReason.length, False),  # too late
    ],
)
def test_the_end_of_a_text_is_audited(model, tokens, reason, right):
    engine = engine_for(model, eos_token_ids=())
    text = engine.generate(PROMPT, max_new_tokens=21).token_ids[:tokens]
    ending = (engine.output_buffer(PROMPT, max_new_tokens=20), reason)
    result = Auditor(TargetModel(model)).audit(PROMPT, text, ending=ending)
    assert result.exact == tokens
    assert result.ending is right
    assert result.mismatch == (0 if right else 1)


def test_an_end_of_sequence_token_that_was_run_over_is_a_mismatch(model):
    text = engine_for(model, eos_token_ids=()).generate(PROMPT, max_new_tokens=12).token_ids
    engine = engine_for(model, eos_token_ids=(text[5],))
    replay = engine.output_buffer(PROMPT, max_new_tokens=12)
    auditor = Auditor(TargetModel(model))
    assert auditor.audit(PROMPT, text, ending=(replay, FinishReason.length)).ending is False
    cut = text[: text.index(text[5]) + 1]
    replay = engine.output_buffer(PROMPT, max_new_tokens=12)
    assert auditor.audit(PROMPT, cut, ending=(replay, FinishReason.eos)).ending is True


def test_the_two_likeliest_tokens_are_recorded(model):
    text = engine_for(model).generate(PROMPT, max_new_tokens=9).token_ids
    result = Auditor(TargetModel(model), chunk=4).audit(PROMPT, text)
    assert [pair[0] for pair in result.top_ids] == text
    assert all(first >= second for first, second in result.top_logits)
    assert len(result.top_logits) == 9


# ------------------------------------------------------------------------------------------------- digests


def test_digests_tell_rows_of_other_bits_apart():
    logits = torch.randn(20, 331, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    digests = digest_rows(logits)
    assert torch.equal(digest_rows(logits[7:9]), digests[7:9])
    assert digests.unique().numel() == 20
    flipped = logits.clone()
    flipped.view(torch.int16)[3, 330] ^= 1
    assert (digest_rows(flipped) != digests).nonzero().flatten().tolist() == [3]
    swapped = logits.clone()
    swapped[5, :2] = logits[5, :2].flip(0)
    assert digest_rows(swapped)[5] != digests[5]


def test_an_engine_keeps_a_digest_of_every_token(model):
    engine = engine_for(model, Beam(5, 3))
    engine.keeps_digests = True
    drafted = engine.generate(PROMPT, max_new_tokens=23)
    assert len(drafted.digests) == 23
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *drafted.token_ids[:-1]]])).logits[0, len(PROMPT) - 1 :]
    # Passes of other shapes may round differently here; the choice must be the logits'.
    assert logits.argmax(-1).tolist() == drafted.token_ids


def test_near_ties_are_counted_behind_a_filter_of_one_token(model):
    text = engine_for(model).generate(PROMPT, max_new_tokens=9).token_ids
    text[4] = (text[4] + 1) % 320
    greedy = Auditor(TargetModel(model), margin=1e6).audit(PROMPT, text)
    filtered = Auditor(TargetModel(model), Sampling(1.0, top_k=1), margin=1e6).audit(PROMPT, text, seed=3)
    assert greedy.near_tie >= 1
    assert filtered.exact < 9
