"""Settings of a draft level's kernels, each by itself: right or wrong, and how fast (level_variants_benchmark.py)."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from kernel_benchmark import DEVICE
from torch import Tensor

from subspec.decoding.kv_cache import KVCache
from subspec.decoding.tree import Tree
from subspec.decoding.tree_policy import Beam
from subspec.kernels import int4, launch
from subspec.kernels.timing import graph_time
from subspec.levels.captured_draft import CapturedDraft, _Level
from subspec.levels.model import Attention, LevelModel
from subspec.quant.hqq import HqqFormat
from subspec.quant.integers import Int4Linear
from subspec.quant.kernel_times import rotation
from subspec.quant.level_linear import Variant

ATTENTIONS = (
    Attention(),
    Attention(16, 64, 0, 4, 3, True),
    Attention(16, 64, 16, 8, 1, True),
    Attention(16, 64, 16, 8, 2, False),
    Attention(16, 32, 16, 4, 2, False),
    Attention(32, 32, 16, 4, 1, False),
    Attention(32, 32, 16, 4, 3, False),
    Attention(32, 16, 16, 4, 2, False),
    Attention(64, 32, 16, 4, 2, False),
    Attention(32, 64, 16, 8, 1, False),
    Attention(8, 64, 16, 8, 2, False),
)
CACHES = 112
"""Layers whose rows together exceed the L2 cache."""

LENGTHS = (512, 2000)
"""Prefixes that attention is timed at."""


def check_kernels(shapes: Mapping[str, tuple[int, int]], overlap: bool) -> dict[str, float]:
    """Relative error against the reference by role and setting; a second call must give the same bits."""
    errors: dict[str, float] = {}
    for role, (n, k) in shapes.items():
        codes, swiglu = HqqFormat().random_weight(min(n, 8192), k, DEVICE), role == "gate_up"
        variants = HqqFormat().variants("int4_mma", role, n, k)
        for tiles in sorted({variant.tiles for variant in variants}):
            packed = int4.pack(codes.q, codes.scale, codes.zero, tiles=tiles, swiglu=swiglu)
            for rows in (1, 6, 8):
                x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
                expected = int4.reference(packed, x)
                for variant in (variant for variant in variants if variant.tiles == tiles):
                    linear = Int4Linear(packed, variant.splits, variant.warps)
                    with launch.overlapping(overlap):
                        got, again = linear(x), linear(x)
                    y = got.float() if swiglu else got.sum(0)
                    error = ((y[:, : expected.shape[1]] - expected).norm() / expected.norm()).item()
                    name = f"{role} {variant}"
                    errors[name] = max(error, errors.get(name, 0.0))
                    if not (error < (6e-3 if swiglu else 2e-3) and torch.equal(got, again)):
                        errors[name] = float("inf")
                        print(
                            f"WRONG: {name} {rows=} {overlap=}: {error:.1e}, {torch.equal(got, again)=}",
                            flush=True,
                        )
    return errors


def call_each(linears: list[Int4Linear], x: Tensor) -> None:
    for linear in linears:
        linear(x)


def time_kernels(
    shapes: Mapping[str, tuple[int, int]], width: int, overlap: bool
) -> dict[str, dict[Variant, float]]:
    """Microseconds per call, weights not cached, one call behind the other."""
    times: dict[str, dict[Variant, float]] = {}
    for role, (n, k) in shapes.items():
        times[role] = {}
        x = torch.randn(width, k, device=DEVICE, dtype=torch.bfloat16)
        variants = HqqFormat().variants("int4_mma", role, n, k)
        for tiles in sorted({variant.tiles for variant in variants}):
            base = Variant("int4_mma", tiles, 1)
            own = rotation(HqqFormat().random_linear(base, n, k, DEVICE, swiglu=role == "gate_up"), DEVICE)
            for variant in (variant for variant in variants if variant.tiles == tiles):
                linears = [Int4Linear(linear.weight, variant.splits, variant.warps) for linear in own]
                with launch.overlapping(overlap):
                    times[role][variant] = graph_time(partial(call_each, linears, x)) / len(linears) * 1e6
            del own, linears
    return times


def best_of(times: Mapping[str, Mapping[Variant, float]]) -> dict[str, Variant]:
    """The fastest of each role; of those within 2 % the one with the fewest slices."""
    best = {}
    for role, known in times.items():
        limit = 1.02 * min(known.values())
        near = [variant for variant, value in known.items() if value <= limit]
        best[role] = min(near, key=lambda variant: (variant.splits, known[variant]))
    return best


def time_attention(
    model: LevelModel, width: int, overlap: bool, say: Callable[[str], None]
) -> dict[Attention, list[float]]:
    """Microseconds of a layer's attention, rotary embedding and merge included, at each prefix of :data:`LENGTHS`.

    In the middle of a tree of 24 levels, and over many layers' caches, so that none is found in the L2 cache.
    """
    policy, layers = Beam(24, width), CACHES
    cache = KVCache(
        layers=layers, kv_heads=model.kv_heads, head_dim=model.head_dim, max_length=2048, dtype=torch.bfloat16,
        draft_rows=policy.draft_rows, target_rows=policy.capacity, device=DEVICE,
    )  # fmt: skip
    cache.rows.normal_()
    tree = Tree(policy.capacity, DEVICE)
    tree.plant(torch.tensor([17], device=DEVICE))
    for _ in range(policy.max_depth):
        parents = tree._slots[tree.size - tree.level_size : tree.size].repeat(width)[:width]
        tree.append(torch.full_like(parents, 17), parents, torch.zeros(width, device=DEVICE))
    used = tree.size - 2 * width  # the last level of a tree is not run through the draft
    place = _Level(rows=width, used=used, first_frontier=used, first_new=tree.size)
    nodes, depths = (part[used : used + width] for part in (tree._slots, tree.depths))
    qkv = torch.randn(3, width, (model.q_heads + 2 * model.kv_heads) * model.head_dim, device=DEVICE)
    expected: dict[int, Tensor] = {}
    times: dict[Attention, list[float]] = {}

    def all_layers(draft: CapturedDraft) -> Tensor:
        with launch.overlapping(overlap):
            for index in range(layers):
                out = draft._attention(index, model.layers[0], qkv, tree, 1, nodes, depths, place)
        return out

    for settings in ATTENTIONS:
        draft = CapturedDraft(model, attention=settings, overlap=overlap)
        draft.begin(cache)  # every row of the tree holds node 0, the root: everyone's ancestor
        own = []
        try:
            for length in LENGTHS:
                draft._state.lengths.fill_(length)
                out = all_layers(draft).float()
                off = ((out - expected.setdefault(length, out)).norm() / expected[length].norm()).item()
                if not off < 1e-2:
                    raise ValueError(f"relative error {off} at a prefix of {length}")
                own.append(graph_time(partial(all_layers, draft), repeats=5) / layers * 1e6)
        except Exception as error:
            say(f"attention {settings} FAILED: {type(error).__name__}: {str(error)[:300]}")
            continue
        times[settings] = own
    return times


def best_attention(times: Mapping[Attention, list[float]]) -> Attention:
    """The fastest at the shorter prefix of those that are at most 3 % slower than any at the longer one."""
    limit = 1.03 * min(own[-1] for own in times.values())
    usable = {how: own for how, own in times.items() if own[-1] <= limit}
    return min(usable, key=lambda how: usable[how][0])
