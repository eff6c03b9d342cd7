"""The planner's formulas against what the engine's own code allocates, counted on tensors that hold no memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config

from subspec.decoding.batch import TokenBatch
from subspec.decoding.bitwise import ROLES, BitwiseArithmetic, PassShapes
from subspec.decoding.kv_cache import KVCache
from subspec.decoding.sampling import Sampler, Sampling
from subspec.decoding.target_model import TargetModel
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.kernels.invariant_linear import REFERENCE
from subspec.planning.sizes import (
    GIB,
    MIB,
    headroom,
    held,
    kv_bytes,
    least_budget,
    level_bytes,
    pass_bytes,
    tree_bytes,
    verify_bytes,
)
from subspec.targets.layer_bytes import PlainCodec
from subspec.targets.meta_model import empty_model
from subspec.targets.model_spec import ModelSpec
from subspec.targets.planted import SHAPES
from tests.helpers.tiny import tiny_model

META = torch.device("meta")
CPU = torch.device("cpu")


class Live(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def know(self, tensor: torch.Tensor) -> None:
        """A storage that was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def two_layers(name: str) -> Qwen2Config:
    config = SHAPES[name]()
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


@pytest.mark.parametrize("name", ["qwen2_5_7b", "llama3_1_8b", "tiny_tied"])
@pytest.mark.parametrize(("rows", "past"), [(6, 2048), (64, 1984), (289, 2048), (1024, 1024), (2048, 0)])
def test_a_pass_holds_what_the_formula_says(name, rows, past, monkeypatch):
    # The fused attention kernels of a GPU need their output alone.
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)
    )
    config = two_layers(name)
    decoder = TargetModel(empty_model(config, torch.bfloat16, META))
    decoder.base.rotary_emb.to(META)
    cache = decoder.new_cache(max_length=2048, draft_rows=0, target_rows=max(rows, 289))
    cache.length = past
    with torch.inference_mode(), Live() as counted:
        counted.know(cache.rows)
        tokens = torch.zeros(rows, dtype=torch.int64, device=META)
        visible = torch.ones(rows, past + rows, dtype=torch.bool, device=META)
        decoder.forward(tokens, tokens, visible, cache.target_view(rows))
    formula = pass_bytes(ModelSpec.of(config), rows, past + rows, 2)
    # The padded copy of the mask is made inside the kernel's dispatch, which the count does not see.
    peak = counted.peak + 2 * rows * (past + rows)
    assert peak <= formula + 64 * rows
    assert formula < 1.35 * peak + MIB


@pytest.mark.parametrize("name", ["qwen2_5_7b", "llama3_1_8b", "tiny_tied"])
@pytest.mark.parametrize(("rows", "past"), [(1, 2047), (6, 2000), (289, 1700), (1024, 1024), (2048, 0)])
def test_a_bitwise_pass_holds_what_the_formula_says(name, rows, past, monkeypatch):
    for kernels in ("level", "invariant"):
        monkeypatch.setattr(f"subspec.kernels.{kernels}", NoKernels(), raising=False)
    config = two_layers(name)
    decoder = TargetModel(empty_model(config, torch.bfloat16, META))
    decoder.base.rotary_emb.to(META)
    decoder.bitwise = BitwiseArithmetic(decoder.model, dict.fromkeys(ROLES, REFERENCE))
    cache = decoder.new_cache(max_length=2048, draft_rows=0, target_rows=max(rows, 289))
    ancestors = torch.ones(rows, rows, dtype=torch.bool, device=META) if rows == 289 else None
    depths = torch.zeros(rows, dtype=torch.int64, device=META)
    levels = 48 if rows == 289 else rows - 1
    with torch.inference_mode(), Live() as counted:
        counted.know(cache.rows)
        tokens = torch.zeros(rows, dtype=torch.int64, device=META)
        batch = TokenBatch(tokens, depths, past, cache.target_view(rows), levels, ancestors)
        decoder.run(batch)
    formula = PassShapes.of(config, 2).pass_bytes(rows, 2048, is_tree=ancestors is not None)
    assert counted.peak <= formula + 64 * rows
    assert formula < 1.35 * counted.peak + MIB


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    ],
)
def test_choosing_and_drafting_hold_what_the_formula_says(options):
    nodes, levels, width = 97, 16, 6
    config = two_layers("tiny")
    shapes = ModelSpec.of(config)
    sampling = Sampling(**options)
    sampler = Sampler(sampling, shapes.vocab, CPU)
    sampler.reseed(0)
    with torch.inference_mode(), Live() as counted:
        logits = torch.zeros(nodes, shapes.vocab, dtype=torch.bfloat16)
        sampler.choose(logits, 5, torch.arange(nodes) % (levels + 1), levels + 1)
    formula = verify_bytes(shapes, nodes, levels, sampling, 2)
    assert counted.peak <= formula
    assert formula < (2 if sampling.top_p < 1 else 1.4) * counted.peak  # room for a GPU's sort

    if sampling.greedy:
        return  # a greedy level grows inside its graph: the next test
    tree, growth = Tree(nodes, CPU), Beam(levels, width)
    frontier = growth.grow(
        tree, tree.plant(torch.zeros(1, dtype=torch.int64)), torch.randn(1, shapes.vocab), 1.0
    )
    with torch.inference_mode(), Live() as counted:
        drafted = torch.randn(width, shapes.vocab, dtype=torch.bfloat16)
        growth.grow(tree, frontier, sampler.perturb(drafted, 5), 0.2)
    small = 16 * width * nodes + 8 * shapes.vocab  # the tree's own rows, and a level's noise
    assert counted.peak <= level_bytes(shapes, width, sampling, 2) + small


class NoKernels:
    """Stands in for ``kernels.level``: Triton's kernels allocate nothing themselves (its interpreter would)."""

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("name", ["qwen2_5_7b", "tiny"])
@pytest.mark.parametrize("width", [1, 6, 16])
def test_fused_levels_hold_what_the_formula_says(name, width):
    pytest.importorskip("triton")
    from subspec.levels.captured_draft import CapturedDraft
    from subspec.levels.model import FusedLayer, FusedModel
    from subspec.quant.level_linear import Dense

    shapes = ModelSpec.of(two_layers(name))
    hidden, query, kv = shapes.hidden, shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim

    def weight(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    layer = FusedLayer(
        qkv=Dense(weight(query + 2 * kv, hidden)),
        out=Dense(weight(hidden, query)),
        gate_up=Dense(weight(2 * shapes.intermediate, hidden), swiglu=True),
        down=Dense(weight(hidden, shapes.intermediate)),
        qkv_bias=None,
        input_norm=weight(hidden),
        post_norm=weight(hidden),
    )
    draft = CapturedDraft(
        FusedModel(
            layers=[layer] * shapes.layers,
            embedding=weight(shapes.vocab, hidden),
            final_norm=weight(hidden),
            head=weight(shapes.vocab, hidden),
            inverse_frequency=weight(shapes.head_dim // 2),
            attention_scaling=1.0,
            eps=1e-6,
            q_heads=shapes.heads,
            kv_heads=shapes.kv_heads,
            head_dim=shapes.head_dim,
            hidden=hidden,
            vocab_size=shapes.vocab,
        )
    )
    draft.kernels = NoKernels()
    growth = Beam(5, width)
    cache = KVCache(
        layers=shapes.layers,
        kv_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        max_length=64,
        draft_rows=growth.draft_rows,
        target_rows=64,
        dtype=torch.bfloat16,
        device=META,
    )
    draft.begin(cache)
    tree, run, logits = Tree(growth.capacity, META), draft._run, []
    draft._run = lambda *arguments: logits.append(run(*arguments))  # the captured graphs keep them too
    step = draft.level_step(growth)
    tree.plant(torch.zeros(1, dtype=torch.int64, device=META))
    with torch.inference_mode(), Live() as counted:
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
            counted.know(linear.weight)
        for owner in (draft, draft.model, tree, cache):
            for tensor in filter(torch.is_tensor, vars(owner).values()):
                counted.know(tensor)
        for _ in range(growth.max_depth):
            step(tree)
    assert [len(rows) for rows in logits] == [1, width, width, width, width]
    assert len({rows.untyped_storage()._cdata for rows in logits}) == 1, "one buffer for all levels"
    kept = logits[0].untyped_storage().nbytes()
    assert kept == 2 * max(width, 8) * shapes.vocab
    formula = level_bytes(shapes, width, Sampling(), 2)
    candidates = (8 * width + 8) * width * (shapes.vocab // 4096 + 1) + 4096
    assert kept < counted.peak <= formula + candidates
    assert formula < 1.35 * counted.peak


def test_a_layers_bytes_are_those_of_its_parameters():
    model = tiny_model("qwen3", hidden_size=256, heads=4)
    shapes = ModelSpec.of(model.config)
    parameters = dict(model.model.layers[0].named_parameters())
    assert shapes.layer.keys() == parameters.keys()
    exact = sum(parameter.nbytes for parameter in parameters.values())
    assert exact <= PlainCodec(4).layer_bytes(shapes.layer) < exact + 256 * len(parameters)
    assert sorted(shapes.vector_sizes(4)) == sorted(p.nbytes for p in parameters.values() if p.dim() == 1)


def test_cache_and_tree():
    shapes = ModelSpec.of(SHAPES["qwen2_5_7b"]())
    bytes_per_row = 28 * 2 * 4 * 128 * 2
    cache = kv_bytes(shapes, max_length=2048, draft_rows=283, target_rows=289, itemsize=2)
    assert cache == (2048 + 283 + 289) * bytes_per_row
    assert tree_bytes(289) >= 289**2


@pytest.mark.parametrize("used", [0, 5 * GIB, 99 * 64 * MIB, 99 * 64 * MIB + 1, 7_987_654_321, 140 * GIB])
def test_the_least_budget_leaves_its_headroom_and_no_more(used):
    budget = least_budget(used)
    assert budget - headroom(budget) >= used
    assert budget - 1 - headroom(budget - 1) < used


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        (0, 0),
        (1, 512),
        (MIB, MIB),
        (2 * MIB, 2 * MIB),
        (2 * MIB + 2**15, -(-20 * MIB // 9)),
        (9 * MIB, 10 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (466_115_584, 446 * MIB),
    ],
)
def test_what_the_allocator_takes(size, taken):
    assert held(size) == taken
