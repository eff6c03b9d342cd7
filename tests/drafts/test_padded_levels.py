"""A cascade over captured levels: passes with a fixed number of rows give the substitute's own trees."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.decoding.adaptive import Adaptive
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam, likeliest
from subspec.drafts.cascade import CascadeDraft
from subspec.drafts.cascade_spec import passes_of
from subspec.drafts.known_nodes import KnownNodes
from subspec.drafts.padded_levels import PaddedLevels
from tests.helpers.drafts import begin
from tests.helpers.levels import DEVICES, fused_draft, model_of

PROMPT = [5, 17, 33, 99, 5, 17, 33, 99, 5, 17]


def padded(model, device, policy, proposed):
    passes = passes_of(policy, proposed)
    return PaddedLevels(fused_draft(model, device), passes.width, passes.max_depth, device)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_of_any_nodes_are_those_of_whole_levels(device):
    """Nodes of two levels in one pass, out of order, with others behind them in the next."""
    device = torch.device(device)
    model, policy = model_of("llama", device, layers=1), Beam(2, 2)
    levels = padded(model, device, policy, 4)
    options = {"max_length": 64, "prefill_chunk": 16}
    whole = Engine(TargetModel(model), fused_draft(model, device), policy, **options)
    mixed = Engine(TargetModel(model), cascade_of(levels, policy, 4), policy, **options)
    with torch.inference_mode():
        root = begin(whole, PROMPT)
        begin(mixed, PROMPT)
        tree, expected = Tree(8, device), []
        for _ in range(2):
            frontier = tree.last_level if expected else tree.plant(root)
            expected.append(whole.draft.expand(tree, frontier).clone())
            policy.grow(tree, frontier, expected[-1], 0.2)
        known, tokens = KnownNodes(8, 4, device), tree.tokens[:3].tolist()
        known.plant(tokens[0], ())
        known.children([(0, token) for token in tokens[1:]])
        for _ in range(2):  # the second tree reuses the rows of the first
            first, second = levels.expand(known, [2, 0]).clone(), levels.expand(known, [1]).clone()
            got = torch.cat([first[1:], second, first[:1]])
            torch.testing.assert_close(got.float(), torch.cat(expected).float(), rtol=0.03, atol=0.03)
            levels.commit(tree, torch.tensor([0], device=device))
        levels.expand(known, [0])
        said, wanted = levels.likeliest(known, [1, 2], 0.5, 3), likeliest(got[1:], 0.5, 3)
        torch.testing.assert_close(said[:, 3:], wanted[1], rtol=0.03, atol=0.1)
        own = got[1:].float().gather(1, said[:, :3].long())
        torch.testing.assert_close(own, got[1:].float().gather(1, wanted[0]), rtol=0.03, atol=0.03)
        with pytest.raises(ValueError, match="at most 2 passes"):
            levels.expand(known, [0])


def cascade_of(levels, policy, proposed):
    vocab = levels.levels.model.vocab_size
    return CascadeDraft(levels, levels.levels.temperature, None, policy, proposed, vocab)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9)], ids=["greedy", "sampling"])
def test_texts_pass_the_audit(device, sampling):
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model = model_of("qwen3", device, layers=1, vocab_size=128)
    policy = Adaptive(12, 3, level_cost=0.05, check_every=2, min_depth=1) if on_gpu else Beam(2, 2)
    target = TargetModel(model)
    draft = cascade_of(padded(model, device, policy, 5), policy, 5)
    engine = Engine(target, draft, policy, sampling=sampling, max_length=96, prefill_chunk=4)
    found = engine.generate(PROMPT, max_new_tokens=60 if on_gpu else 6, seed=3)
    audit = Auditor(target, sampling).audit(PROMPT, found.token_ids, seed=3)
    assert audit.mismatch == 0
    assert found.stats.verified_tokens > found.stats.iterations  # tokens of the draft were accepted
    assert found.stats.draft_passes <= sum(found.stats.drafted_by_depth)
