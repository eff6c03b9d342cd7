"""The fused level against the substitute run module by module: same tree, same logits, same cache rows."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.decoding.adaptive import Adaptive
from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.sampling import Sampling
from subspec.decoding.scheduler import Scheduler
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree_policy import Beam
from subspec.levels.model import Attention
from tests.helpers.drafts import begin, grow
from tests.helpers.levels import DEVICES, PROMPT, apart, fused_draft, grown_alike, model_of, module_draft


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "layers"),
    # Neither biases nor norms of queries and keys, and one of both; Mistral's graph is Llama's.
    [("llama", 2), ("qwen2", 1), ("qwen3", 1), pytest.param("mistral", 2, marks=pytest.mark.slow)],
)
def test_a_tree_is_the_module_by_module_substitutes(family, layers, device):
    device = torch.device(device)
    model = model_of(family, device, layers=layers)
    engines, logits = grown_alike(model, [module_draft(model), fused_draft(model, device)], Beam(3, 3))
    for expected, got in zip(*logits, strict=True):
        assert apart(expected, got) < 0.08  # bfloat16 in another order
    assert apart(*(engine.cache.rows[:, :, :, : engine.cache.draft_rows] for engine in engines)) < 0.08


@pytest.mark.parametrize("device", DEVICES)
def test_every_setting_of_attention_gives_the_same_logits(device):
    """Several chunks, blocks of the prefix alone, of the tree alone and of both."""
    device = torch.device(device)
    model = model_of("llama", device, heads=8, kv_heads=1, layers=1)
    logits, others = [], (Attention(2, 16, 16, 2, 1, False), Attention(8, 32, 0, 4, 2, False))
    with torch.inference_mode():
        for settings in (Attention(splits=4), *others, Attention(1, 128, 16, 8, 1)):
            draft = fused_draft(model, device, attention=settings)
            engine = Engine(TargetModel(model), draft, Beam(2, 3), max_length=96, prefill_chunk=64)
            root = begin(engine, PROMPT * 6)
            grow(engine, root, 40)
            logits.append(draft._logits_of(3).float().clone())  # of the last level, which sees all others
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("device", DEVICES)
def test_a_tree_does_not_depend_on_the_widths_of_those_before(device):
    """Widths change with the number of texts; levels that were captured are replayed."""
    device = torch.device(device)
    model = model_of("qwen2", device, layers=1)
    engine = Engine(TargetModel(model), fused_draft(model, device), Beam(3, 3), max_length=64, prefill_chunk=16)
    seen = {}
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        for policy in (Beam(3, 3), Beam(4, 2), Beam(3, 3), Beam(4, 2)):
            engine.policy = policy
            grow(engine, root, 10)
            tree = engine.tree
            now = [tree.tokens[: tree.size].clone(), tree.scores[: tree.size].clone()]
            before = seen.setdefault(policy.width, now)
            assert torch.equal(now[0], before[0])
            torch.testing.assert_close(now[1], before[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [Beam(2, 3), Adaptive(2, 1, level_cost=0.1)], ids=["beam", "adaptive chain"])
def test_growth_in_the_kernel_is_the_policys(policy, device):
    device = torch.device(device)
    model = model_of("qwen2", device, vocab_size=4200, layers=1)  # two blocks of logits
    engine = Engine(TargetModel(model), fused_draft(model, device), policy, max_length=64, prefill_chunk=16)
    with torch.inference_mode():
        root = begin(engine, PROMPT)
        grow(engine, root, 10)
        tree = engine.tree
        fused = [t[: tree.size].clone() for t in (tree.tokens, tree.parents, tree.depths, tree.scores)]
        ancestors = tree.ancestors[: tree.size, : tree.size].clone()
        assert tree.size == policy.capacity
        # Again with torch's policy on the fused logits.
        engine.draft.captures = lambda policy: False
        engine.draft.commit(tree, None, None)
        grow(engine, root, 10)
    for ours, expected in zip(fused[:3], (tree.tokens, tree.parents, tree.depths), strict=True):
        assert torch.equal(ours, expected[: tree.size])
    torch.testing.assert_close(fused[3], tree.scores[: tree.size], rtol=1e-4, atol=1e-3)
    assert torch.equal(ancestors, tree.ancestors[: tree.size, : tree.size])


@pytest.mark.parametrize("device", DEVICES)
def test_speculative_text_passes_the_audit(device):
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model = model_of("llama", device, layers=2 if on_gpu else 1)
    policy = Beam(4, 3) if on_gpu else Beam(2, 2)
    engine = Engine(TargetModel(model), fused_draft(model, device), policy, max_length=96, prefill_chunk=16)
    count = 60 if on_gpu else 6
    for _ in range(2 if on_gpu else 1):  # the second text replays the first one's graphs
        result = engine.generate(PROMPT, max_new_tokens=count)
        assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert result.stats.iterations < count - 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", [None, Sampling(0.8)], ids=["greedy", "sampling"])
def test_trees_that_grow_together_are_those_that_grow_alone(sampling, device):
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model = model_of("qwen2", device, vocab_size=4200 if on_gpu else 320, layers=1)
    policy = Beam(6, 3) if on_gpu else Beam(2, 2)
    prompts = [PROMPT, PROMPT[:2], PROMPT[::-1] * 2][: 3 if on_gpu else 2]
    options = {"max_length": 64, "prefill_chunk": 32, "sampling": sampling}

    def trees(texts):
        engine = Engine(TargetModel(model), fused_draft(model, device), policy, texts=len(texts), **options)
        with torch.inference_mode():
            for prompt in texts:
                engine.admit(engine.text(prompt))
            engine._read_prompts()
            for _ in range(1 + on_gpu):  # graphs are captured, then replayed
                engine._grow(engine.running, 10)
        assert all(text.own.tree.levels == policy.max_depth for text in engine.running)
        return [text.own for text in engine.running]

    for together, prompt in zip(trees(prompts), prompts, strict=True):
        [alone] = trees([prompt])
        size = alone.tree.size
        for name in ("tokens", "parents", "depths"):
            assert torch.equal(getattr(together.tree, name)[:size], getattr(alone.tree, name)[:size]), name
        assert torch.equal(together.tree.ancestors[:size, :size], alone.tree.ancestors[:size, :size])
        torch.testing.assert_close(together.tree.scores[:size], alone.tree.scores[:size], rtol=1e-2, atol=2e-2)
        rows = [own.cache.rows[:, :, :, : own.cache.draft_rows].float() for own in (together, alone)]
        torch.testing.assert_close(*rows, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_texts_side_by_side_draft_with_captured_levels(device):
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    model = model_of("llama", device, layers=1)
    policy = Adaptive(6, 3) if on_gpu else Beam(2, 2)
    options = {"max_length": 64, "prefill_chunk": 16}
    engine = Engine(TargetModel(model), fused_draft(model, device), policy, texts=3, **options)
    scheduler = Scheduler(engine, 3)
    lengths = (40, 12, 30, 25) if on_gpu else (3, 2, 4)
    texts = [scheduler.add(PROMPT[n:], max_new_tokens=length) for n, length in enumerate(lengths)]
    while not scheduler.idle:
        scheduler.step()
    for text in texts:
        assert Auditor(TargetModel(model)).audit(list(text.prompt), text.result.token_ids).mismatch == 0
    assert sum(sum(text.result.stats.accepted_by_depth) for text in texts) > 0


@pytest.mark.gpu
def test_both_kernels_give_the_same_logits():
    device = torch.device("cuda")
    model = model_of("llama", device, hidden_size=256, intermediate_size=512)
    pytest.importorskip("gemlite.core")
    drafts = [fused_draft(model, device, kernel=kernel) for kernel in ("int4_mma", "gemlite")]
    _, logits = grown_alike(model, drafts, Beam(1, 3))
    assert apart(logits[0][0], logits[1][0]) < 0.05  # gemlite keeps scales in bfloat16, ours in float16


@pytest.mark.parametrize("device", DEVICES)
def test_candidates_of_logits_without_numbers_are_tokens_all_the_same(device):
    from subspec.kernels import level

    rows, vocab, width, block = 3, 100, 4, 64
    blocks = -(-vocab // block)
    logits = torch.stack([torch.randperm(vocab) for _ in range(rows)]).bfloat16().to(device)  # no ties
    logits[1] = float("nan")
    logits[2, ::3] = float("nan")
    best = torch.empty(rows, blocks, width, device=device)
    tokens = torch.full((rows, blocks, width), -1, dtype=torch.int32, device=device)
    sums = torch.empty(2, rows, blocks, device=device)
    level.block_candidates[(rows, blocks)](
        logits, best, tokens, sums[0], sums[1], vocab, 1.0, BLOCKS=blocks, K=width, BLOCK=block
    )
    assert tokens.min() >= 0
    assert tokens.max() < vocab
    assert not torch.isnan(best).any()
    assert torch.equal(tokens[0, 0].long(), logits[0, :block].float().topk(width).indices)
    assert (tokens[2] % 3 != 0).all()
