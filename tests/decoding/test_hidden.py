"""Hidden states of named layers, of every kind of target, as a draft asks for them."""

import pytest
import torch

from subspec.decoding.bitwise import ROLES, BitwiseArithmetic
from subspec.decoding.engine import Engine
from subspec.decoding.hidden import FINAL_HIDDEN, NO_HIDDEN, Hidden, HiddenRequest
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.offload.loader import load_streamed
from tests.helpers.drafts import OracleDraft, hf_greedy
from tests.helpers.tiny import tiny_model
from tests.offload.test_streaming import ModelSource, plan_for

PROMPT = [5, 17, 33, 99, 4]
LAYERS = (2, 0)


def states(target, device="cpu"):
    cache = target.new_cache(max_length=8, draft_rows=0, target_rows=8)
    with torch.inference_mode():
        return target.append(torch.tensor(PROMPT, device=device), cache, hidden_of=LAYERS)


def expected(model):
    output = model(torch.tensor([PROMPT], device=model.device), output_hidden_states=True)
    return output.hidden_states  # behind the embedding and every layer; the last one after the final norm


@pytest.mark.parametrize("kind", ["whole", "streamed"])
def test_a_pass_returns_the_residual_stream_behind_named_layers(kind):
    model = tiny_model("qwen2", layers=4)
    target = TargetModel(model)
    if kind == "streamed":
        target = load_streamed(ModelSource(model), plan_for([2]), torch.device("cpu")).target
    hidden, reference = states(target), expected(model)
    torch.testing.assert_close(hidden.final, reference[-1][0], rtol=1e-5, atol=1e-5)
    assert sorted(hidden.layers) == sorted(LAYERS)
    for index in LAYERS:
        torch.testing.assert_close(hidden.layers[index], reference[index + 1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_batch_invariant_passes_return_them_too():
    from subspec.kernels.invariant_linear import CANDIDATES

    model = tiny_model("qwen2", layers=4, hidden_size=128, intermediate_size=192).cuda().bfloat16()
    target = TargetModel(model)
    target.bitwise = BitwiseArithmetic(model, dict.fromkeys(ROLES, CANDIDATES[2]))
    hidden, reference = states(target, "cuda"), expected(model)
    for index in LAYERS:
        error = (hidden.layers[index] - reference[index + 1][0]).norm() / reference[index + 1][0].norm()
        assert error < 0.02


def test_a_request_selects_states_and_rows():
    final, first, second = (torch.full((3, 2), float(value)) for value in (9, 1, 2))
    hidden = Hidden(final, {0: first, 4: second})
    assert NO_HIDDEN.select(hidden) is None
    assert FINAL_HIDDEN.select(hidden) is final
    both = HiddenRequest(layers=(4, 0)).select(hidden, torch.tensor([1, 2]))
    assert both.tolist() == [[2, 2, 1, 1]] * 2
    assert HiddenRequest(final=True, layers=(0,)).select(hidden).shape == (3, 4)


def test_a_draft_receives_the_layers_that_it_wants():
    model = tiny_model("llama", layers=3)
    text = hf_greedy(model, PROMPT, 12)
    draft = OracleDraft(model.config.vocab_size, text)
    draft.wants = HiddenRequest(layers=(0, 2))
    engine = Engine(TargetModel(model), draft, Beam(3, 2), max_length=64, prefill_chunk=3)
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == text
    received = torch.cat(draft.features)
    assert received.shape[1] == 2 * model.config.hidden_size
