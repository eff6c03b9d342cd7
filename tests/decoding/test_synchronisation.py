"""Drafting and verifying never ask the host for a tensor's value, and never loop over tree nodes.

The whole iteration runs on fake tensors, which have shapes but no values: anything that needs a value on the
host (``.item()``, ``.tolist()``, ``bool(tensor)``, ``nonzero`` ...) raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from subspec.decoding import target_model
from subspec.decoding.bitwise import ROLES, BitwiseArithmetic
from subspec.decoding.eagle2 import Eagle2
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import PositionNoise, Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.drafts.eagle import EagleDraft
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft, share_parameters
from subspec.kernels.invariant_linear import CANDIDATES
from tests.helpers.drafts import begin, engine_for, grow, verified
from tests.helpers.eagle import SHAPES, random_head
from tests.helpers.taught import draft_engine
from tests.helpers.tiny import tiny_model

SAMPLINGS = [Sampling(), Sampling(0.8, 5, 0.9)]


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.setattr(target_model, "kernels_for", lambda model: "fake tensors have no addresses")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", layers=1)  # real weights: only what the engine makes itself has to be fake


def fake_engine(model, sampling, own_cache=False):
    draft = SubstituteDraft(share_parameters(model))
    policy = Beam(4, 3)
    if own_cache:
        size = {"max_length": 64, "draft_rows": policy.draft_rows, "vocab_size": model.config.vocab_size}
        draft = SeparateCacheDraft(draft, draft.model, **size)
    return Engine(TargetModel(model), draft, policy, sampling=sampling, max_length=64, prefill_chunk=8)


@pytest.mark.parametrize(
    ("sampling", "own_cache"), zip(SAMPLINGS, (False, True), strict=True), ids=["greedy", "sampling, own cache"]
)
def test_an_iteration_reads_nothing_back_but_the_acceptance(model, sampling, own_cache, monkeypatch):
    # Fake tensors cannot draw with a generator; the real noise is covered by the test on a GPU below.
    monkeypatch.setattr(PositionNoise, "_row", lambda self, position: torch.zeros(self.vocab_size))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        engine = fake_engine(model, sampling, own_cache)
        root = begin(engine, [1, 2, 3, 4, 5, 6, 7, 8, 9])
        for iteration in range(2):
            grow(engine, root, most_levels=10)
            judged = verified(engine)
            assert judged.share.hidden.final.shape == (13, 64)
            with pytest.raises((DataDependentOutputException, RuntimeError)):
                judged.acceptance.read()  # the one read-back of an iteration; on fake tensors it has to fail
            # Once in the middle of the tree, once down to the level that the draft never ran.
            engine._commit(judged, 3 if iteration == 0 else 5)
            root = judged.acceptance.bonus
        assert engine.cache.length == 17
        if own_cache:
            assert engine.draft.cache.length == 17


@pytest.mark.parametrize(
    ("sampling", "policy"),
    zip(SAMPLINGS, (Beam(4, 3), Eagle2(4, 3, 9)), strict=True),
    ids=["greedy beam", "sampled eagle2"],
)
def test_an_iteration_with_an_eagle_head_reads_nothing_back_either(model, sampling, policy, monkeypatch):
    monkeypatch.setattr(PositionNoise, "_row", lambda self, position: torch.zeros(self.vocab_size))
    head = random_head(SHAPES["qwen2"])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        decoder = TargetModel(model)
        draft = EagleDraft(head, decoder, policy)
        engine = Engine(decoder, draft, policy, sampling=sampling, max_length=64, prefill_chunk=4)
        root = begin(engine, [1, 2, 3, 4, 5, 6, 7, 8, 9])
        for accepted in (3, 1):
            grow(engine, root, most_levels=10)
            judged = verified(engine)
            assert judged.share.hidden.final.shape == (policy.pass_nodes, 64)
            engine._commit(judged, accepted)
            root = judged.acceptance.bonus
        assert draft.cache.length == engine.cache.length - 1 == 12


def test_the_check_notices_a_read_back(model):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        engine = fake_engine(model, SAMPLINGS[0])
        root = begin(engine, [1, 2, 3])
        grow(engine, root, 10)
        with pytest.raises(DataDependentOutputException):
            bool(engine.tree.scores[1] > 0)


class OperationCount(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(engine):
    with torch.inference_mode():
        root = begin(engine, [1, 2, 3])
        grow(engine, root, 10)
        judged = verified(engine)
        engine._commit(judged, 1)
        with OperationCount() as drafting:
            grow(engine, root, 10)
        with OperationCount() as verifying:
            verified(engine).acceptance.read()
    assert engine.tree.size == engine.policy.pass_nodes
    return drafting.count, verifying.count


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampling"])
def test_the_number_of_operations_does_not_depend_on_the_number_of_nodes(sampling):
    # A tree that is sampled in one piece; larger ones take an operation more per piece, to bound memory.
    few, many = (engine_for(tiny_model("llama"), Beam(4, w), sampling=sampling) for w in (2, 7))
    assert operations(few) == operations(many)
    few, many = (draft_engine(tiny_model("llama"), Eagle2(4, w, 5 * w), sampling=sampling) for w in (2, 6))
    assert operations(few) == operations(many)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [Beam(4, 3), Eagle2(4, 3, 9)], ids=["beam", "eagle2"])
@pytest.mark.parametrize("kind", ["substitute", "eagle"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampling"])
@pytest.mark.parametrize("bitwise", [False, True], ids=["modules", "bitwise"])
def test_no_synchronisation_on_a_gpu(sampling, kind, policy, bitwise):
    model = tiny_model("llama").cuda().bfloat16()
    decoder = TargetModel(model)
    if bitwise:
        decoder.bitwise = BitwiseArithmetic(model, dict.fromkeys(ROLES, CANDIDATES[2]))
    if kind == "eagle":
        draft = EagleDraft(random_head(SHAPES["qwen2"]).cuda().bfloat16(), decoder, policy)
    else:
        draft = SubstituteDraft(share_parameters(model))
    engine = Engine(decoder, draft, policy, sampling=sampling, max_length=64, prefill_chunk=8)
    with torch.inference_mode():
        root = begin(engine, [1, 2, 3])
        grow(engine, root, 10)
        judged = verified(engine)
        judged.acceptance.read()
        engine._commit(judged, 1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            grow(engine, root, 10)
            judged = verified(engine)
            engine._commit(judged, 2)
            with pytest.raises(RuntimeError, match="synchroniz"):
                judged.acceptance.read()
        finally:
            torch.cuda.set_sync_debug_mode("default")
