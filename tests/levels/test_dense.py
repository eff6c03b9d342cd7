"""Fused levels over exact weights: layers of the target that draft, and a small model on a cache of its own."""

import pytest
import torch

pytest.importorskip("triton")

from subspec.decoding.audit import Auditor
from subspec.decoding.engine import Engine
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.drafts.layer_skip import skip_layers
from subspec.drafts.separate_cache import SeparateCacheDraft
from subspec.drafts.substitute import SubstituteDraft
from subspec.errors import ConfigError
from subspec.levels.build import level_model
from subspec.levels.captured_draft import CapturedDraft
from subspec.levels.dense import check_level_support, dense_layer
from subspec.levels.model import NEVER, Attention
from subspec.targets.layer_bytes import PlainCodec, flat_bytes, flat_layer
from tests.helpers.levels import DEVICES, PROMPT, apart, grown_alike, model_of
from tests.helpers.tiny import FAMILIES


def fused_model(model, device, layers):
    """The layers ``layers`` of ``model``; each knows whose cache rows it uses."""
    fused = []
    for index in layers:
        tensors = {name: p.data for name, p in model.model.layers[index].named_parameters()}
        fused.append(dense_layer(flat_layer(tensors, torch.bfloat16, device), cache_layer=index))
    return level_model(model, fused)


def own_cache(levels, small, policy, vocab_size):
    options = {"max_length": 96, "draft_rows": policy.draft_rows, "width": policy.width}
    return SeparateCacheDraft(levels, TargetModel(small), vocab_size=vocab_size, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flat_layer_is_the_layer(family):
    model = model_of(family, "cpu")
    tensors = {name: p.data for name, p in model.model.layers[0].named_parameters()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    views = flat_layer(tensors, torch.bfloat16, torch.device("cpu"))
    assert list(views) == list(tensors)
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert len({view.untyped_storage().data_ptr() for view in views.values()}) == 1
    assert views["input_layernorm.weight"].untyped_storage().nbytes() == flat_bytes(shapes, 2)
    assert flat_bytes(shapes, 2) <= PlainCodec(2).layer_bytes(shapes)
    fused = dense_layer(views)
    assert torch.equal(fused.qkv.weight, torch.cat([tensors[f"self_attn.{n}_proj.weight"] for n in "qkv"]))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    gate, up = (x @ tensors[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    torch.testing.assert_close(fused.gate_up(x), torch.nn.functional.silu(gate) * up)
    with pytest.raises(ValueError, match="do not lie next to each other"):
        dense_layer(tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["layer_skip", "small_model"])
def test_a_fused_tree_is_the_module_by_module_one(kind, device):
    device = torch.device(device)
    model, policy = model_of("qwen2", device, layers=3), Beam(3, 3)
    if kind == "layer_skip":
        layers = (0, 2)
        drafts = [
            SubstituteDraft(skip_layers(model, layers), 1.0),
            CapturedDraft(fused_model(model, device, layers), 1.0, attention=Attention(splits=4)),
        ]
    else:
        small = model_of("llama", device, layers=2, hidden_size=64, intermediate_size=96, seed=5)
        levels = (
            SubstituteDraft(small, 1.0),
            CapturedDraft(fused_model(small, device, (0, 1)), 1.0, attention=Attention(splits=4)),
        )
        drafts = [own_cache(each, small, policy, 320) for each in levels]
    engines, rows = grown_alike(model, drafts, policy, 1.0)
    for expected, got in zip(*rows, strict=True):
        assert apart(expected, got) < 0.08  # bfloat16 in another order
    with torch.inference_mode():
        if kind == "layer_skip":
            kept = [engine.cache.rows[list(layers)][:, :, :, : policy.draft_rows] for engine in engines]
            assert apart(*kept) < 0.08
            assert (engines[1].cache.rows[1, :, :, : policy.draft_rows] == 0).all()
            return
        # Accept a path down to the deepest level: the last node has not run.
        reference = engines[0].tree
        leaf = reference.size - 1
        path = reference.ancestors[leaf, : reference.size].nonzero()[:, 0]
        assert path.numel() == policy.max_depth + 1
        for engine in engines:
            engine.draft.commit(engine.tree, path, None)
            assert engine.draft.cache.length == len(PROMPT) + path.numel()
        caches = [draft.cache.rows[:, :, :, draft.cache.draft_rows :] for draft in drafts]
        end = len(PROMPT) + path.numel()
        for one, two in zip(*(cache[:, :, :, :end].unbind(3) for cache in caches), strict=True):
            assert apart(one, two) < 0.08


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_small_model_passes_the_audit_and_a_perfect_one_is_accepted(device):
    device = torch.device(device)
    model, policy = model_of("llama", device, layers=1), Beam(2, 1)
    levels = CapturedDraft(fused_model(model, device, (0,)), 1.0, attention=Attention(splits=2))
    draft = own_cache(levels, model, policy, 320)
    engine = Engine(TargetModel(model), draft, policy, max_length=96, prefill_chunk=16)
    count = 60 if device.type == "cuda" else 8
    for _ in range(2 if device.type == "cuda" else 1):  # the second text replays the first one's graphs
        result = engine.generate(PROMPT, max_new_tokens=count)
        assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
    assert result.stats.iterations < (count - 1) / 2


@pytest.mark.gpu
def test_graphs_are_captured_once():
    device = torch.device("cuda")
    model, policy = model_of("llama", device, layers=2), Beam(6, 3)
    small = model_of("llama", device, layers=2)
    levels = CapturedDraft(fused_model(small, device, (0, 1)), 1.0)
    draft = own_cache(levels, small, policy, 320)
    engine = Engine(TargetModel(model), draft, policy, max_length=96, prefill_chunk=16)
    engine.prepare(PROMPT)
    captured = draft.facts()["graphs_captured"]
    assert captured == 6 + 1  # every level, and the one token behind the prefix
    for _ in range(2):
        result = engine.generate(PROMPT, max_new_tokens=60)
        assert Auditor(TargetModel(model)).audit(PROMPT, result.token_ids).mismatch == 0
        assert draft.cache.length == engine.cache.length
    assert draft.facts()["graphs_captured"] == captured


def test_shapes_and_types_that_the_kernels_do_not_know_are_refused():
    config = model_of("llama", "cpu", hidden_size=96, heads=4).config
    with pytest.raises(ConfigError, match=r"^draft has heads of 24 numbers"):
        check_level_support(config, torch.bfloat16, "draft")
    with pytest.raises(ConfigError, match=r"^draft is in float32"):
        check_level_support(model_of("llama", "cpu").config, torch.float32, "draft")


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_of_some_ids_gives_their_logits_and_lets_no_other_grow(device):
    device, ids = torch.device(device), torch.arange(3, 320, 7)
    model, policy = model_of("qwen2", device), Beam(2, 3)
    found = []
    for known in (None, ids):
        levels = fused_model(model, device, (0,))
        draft = CapturedDraft(level_model(model, levels.layers, None, known), attention=Attention(splits=2))
        cache = TargetModel(model).new_cache(max_length=32, draft_rows=policy.draft_rows, target_rows=9)
        draft.begin(cache)
        tree = Tree(policy.capacity, device)
        with torch.inference_mode():
            root = tree.plant(torch.tensor([5], device=device))
            found.append(draft.expand(tree, root).clone())
            level = draft.extend(tree, tree.plant(torch.tensor([5], device=device)), policy)
            draft.extend(tree, level, policy)
    whole, part = found
    torch.testing.assert_close(part[:, ids.to(device)], whole[:, ids.to(device)])
    assert int((part > NEVER / 2).sum()) == len(ids)
    assert set(tree.tokens[1 : tree.size].tolist()) <= set(ids.tolist())
