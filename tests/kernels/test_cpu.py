"""Our kernels for a few rows on a CPU, against the model's own modules."""

import pytest
import torch

from subspec.decoding.batch import TokenBatch
from subspec.decoding.cpu_pass import MOST_ROWS, kernels_for
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.errors import SubspecError
from subspec.kernels import cpu
from tests.helpers.tiny import FAMILIES, tiny_model

compiled = pytest.mark.skipif(isinstance(cpu.cpu_kernels(), str), reason="no CPU kernels here")


def tree_of(rows):
    """Ancestors and depths of a tree that branches everywhere."""
    ancestors, depths = torch.eye(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    for node in range(1, rows):
        parent = (node - 1) // 2
        ancestors[node] |= ancestors[parent]
        depths[node] = depths[parent] + 1
    return ancestors, depths


def passed(target, rows, prefix, seed=0):
    """Logits of a tree behind a prefix, the cache, and the residual stream behind the first layer."""
    cache = target.new_cache(max_length=64, draft_rows=0, target_rows=max(rows, 32))
    torch.manual_seed(seed)
    tokens = torch.randint(0, target.vocab_size, (64,))
    target.append(tokens[:prefix], cache)
    ancestors, depths = tree_of(rows)
    view = cache.target_view(rows)
    batch = TokenBatch(tokens[prefix : prefix + rows], depths, prefix, view, int(depths.max()), ancestors)
    hidden = target.forward(batch, hidden_of=(0,))
    return target.logits(hidden.final), cache.rows, hidden.layers[0]


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_pass_is_that_of_the_modules(family, rows):
    model = tiny_model(family, hidden_size=128, layers=2, kv_heads=2, heads=4)
    own, modules = TargetModel(model), TargetModel(model)
    assert own.cpu_reason == ""
    modules._cpu = None
    for found, expected in zip(passed(own, rows, 5), passed(modules, rows, 5), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@compiled
@torch.inference_mode()
def test_a_rows_logits_have_the_same_bits_in_every_pass():
    target = TargetModel(tiny_model("qwen3", hidden_size=128, layers=2, kv_heads=2, heads=4))
    alone, wide = passed(target, 1, 7)[0], passed(target, MOST_ROWS, 7)[0]
    assert torch.equal(alone[0], wide[0])


@compiled
def test_weights_that_are_no_numbers_are_noticed():
    model = tiny_model("llama", hidden_size=128, layers=2, kv_heads=2, heads=4)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(SubspecError, match="not finite"):
        Engine(TargetModel(model), max_length=32).generate([1, 2, 3], max_new_tokens=4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.to(torch.bfloat16), "float32"),
        (lambda model: model.model.layers[0].register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_models_that_the_kernels_cannot_run_keep_their_modules(change, why):
    model = tiny_model("llama", hidden_size=128, layers=2, kv_heads=2, heads=4)
    change(model)
    assert why in kernels_for(model)


@pytest.mark.parametrize(
    ("set_up", "why"),
    [
        (lambda patch: patch.setenv(cpu.SWITCH, "off"), "off"),
        (lambda patch: patch.setattr(cpu.shutil, "which", lambda name: None), "no C compiler"),
        (lambda patch: patch.setattr(cpu, "FLAGS", ("--no-such-flag",)), "failed"),
    ],
)
def test_without_a_compiler_torch_computes(monkeypatch, tmp_path, set_up, why):
    monkeypatch.setenv("SUBSPEC_CACHE", str(tmp_path))
    set_up(monkeypatch)
    assert why in cpu.cpu_kernels.__wrapped__()
